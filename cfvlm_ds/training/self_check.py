"""Self-check before training: weights must be finite, and packed rows must score like single rows with stock attention.

Untested combinations of kernels and library versions can give wrong scores without an error. The allowed difference is the rounding error
of the precision. It has two sources: the spread of scores when every module's output is rounded differently, which is measured with single
rows, and the rounding of the largest logit. A wrong mask or position causes a larger difference than both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfvlm_ds.batching.batch import STAND_IN, Batch
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.deepspeed_compat.parameters import own_part
from cfvlm_ds.models import attention
from cfvlm_ds.models.forest_attention import stock_attention
from cfvlm_ds.models.model_files import explained

UNSUSPICIOUS = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Nats per token up to which a difference needs no explanation; half-precision types have 0.05."""
_HALF = 0.05
_CELLS, _REPEATS = 8, 2  # cells that are compared when a difference needs an explanation; forwards with other roundings for each
_SPREADS = 3  # a difference beyond this many spreads of those forwards' scores is not caused by rounding
_NAMED = 5


def refuse_nonfinite(model: nn.Module, source: str, world: World) -> None:
    """Raise ConfigError on all ranks, naming the weights with NaN or infinite values. Under ZeRO-3 every rank checks its own partition.

    Bounds may be infinite: those of Gemma 4's clipped layers are, where nothing is clipped.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        part = own_part(value).detach()
        if part.is_floating_point() and part.numel() and part.device.type != "meta":
            tensors[name] = part
    extremes = {name: torch.stack(torch.aminmax(part)) for name, part in tensors.items()}
    finite = {name: ~x.isnan().any() if name.endswith(("_min", "_max")) else x.isfinite().all() for name, x in extremes.items()}
    nonfinite = [name for name, is_finite in finite.items() if not is_finite]
    if broken := sorted({name for names in gather_objects(nonfinite, world) for name in names}):
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise ConfigError(
            f"{source} has weights that are not finite: {', '.join(broken[:_NAMED])}{more}; get the model again, or convert it from its "
            "published precision: float16 overflows where bfloat16 does not"
        )


def refuse_unusable(forward: Any, collator: Collator, name: str, device: torch.device) -> None:
    """Raise ConfigError if the model ``name`` cannot score one text on one image. Many errors of a config.json only show then.

    Every rank calls it. Errors of the machine, such as missing memory, are raised unchanged.
    """
    with (
        explained(f"the model {name!r} cannot be run", "compare its config.json and processor files with the published ones"),
        torch.no_grad(),
    ):
        batch = collator.scoring_everything()([STAND_IN]).to(device)
        batch.scores(forward(**batch.model_inputs))


@dataclass
class Cell:
    """One cell of a packed row, scored in the row and alone: nats, tokens of its text, and the inputs of the single-row forward."""

    packed: float
    alone: float
    tokens: int
    single: Batch
    largest_logit: float

    @property
    def off(self) -> float:
        """Absolute difference of the two scores in nats; NaN if either is NaN."""
        return abs(self.packed - self.alone)


def check_scores(config: RunConfig, forward: Any, collator: Collator, groups: Sequence[CounterfactualGroup], world: World) -> None:
    """Compare two cells of the first packed row of ``groups``, the first cell and one after other texts, with single-row forwards.

    Every rank calls it with its own groups. ``forward`` is the engine in evaluation mode. Raises ConfigError on all ranks if a score
    differs by more than its precision explains.
    """
    model = forward.module.model
    dtype = next(model.parameters()).dtype
    bound = UNSUSPICIOUS.get(dtype, _HALF)
    with torch.no_grad():
        packed = _Packed.of(forward, collator, groups, config.data.max_tokens_per_forward, world)
        cells = [_compared(forward, model, packed, place) for place in (packed.places[0], max(packed.places, key=lambda place: place[2]))]
        worst = _largest([cell.off / cell.tokens for cell in cells], world)
        allowed = bound
        if not worst <= bound and math.isfinite(worst):
            step = max(1, len(packed.places) // _CELLS)
            more = [packed.places[step * k % len(packed.places)] for k in range(_CELLS)]  # equally many forwards on every rank
            cells += [_compared(forward, model, packed, place) for place in more]
            worst = _largest([cell.off / cell.tokens for cell in cells], world)
            allowed = max(bound, worst * _SPREADS / _spreads(forward, model, cells, dtype, world))
    backend = attention(config.model.attn_implementation, model.config, dtype)
    if not worst <= allowed:
        other = "" if backend == "sdpa" else "use sdpa, or "
        raise ConfigError(
            f"model.attn_implementation {backend} gives scores that differ by {worst:.3g} nats per token from single-row forwards, and "
            f"{str(dtype).removeprefix('torch.')} explains {allowed:.2g}; {other}report the versions of torch and transformers, or go on "
            "with train.self_check=warn if you know the cause"
        )
    explained = "" if allowed == bound else f", which {str(dtype).removeprefix('torch.')} explains"
    world.say(f"scores of packed rows ({backend}) equal single-row forwards within {worst:.1e} nats per token{explained}")


@dataclass
class _Packed:
    """Scores of a packed row, and the (group, image, text) of its cells."""

    scores: Any
    places: list[list[int]]
    groups: Sequence[CounterfactualGroup]
    collator: Collator

    @classmethod
    def of(cls, forward: Any, collator: Collator, groups: Sequence[CounterfactualGroup], max_tokens: int | None, world: World) -> _Packed:
        kept, _ = collator.readable(groups)
        batch = (collator if kept else collator.scoring_everything()).parts(kept or [STAND_IN], max_tokens)[0].to(world.device)
        places = torch.stack(torch.unravel_index(batch.cell.unique(), batch.layout.valid.shape), 1).tolist()
        return cls(batch.scores(forward(**batch.model_inputs)), places, kept or [STAND_IN], collator.scoring_everything())


def _compared(forward: Any, model: Any, packed: _Packed, place: list[int]) -> Cell:
    g, i, c = place
    group, layout = packed.groups[g], packed.scores.layout
    part: dict[str, Any] = {
        "images": group.images[i : i + 1],
        "candidates": group.candidates[c : c + 1],
        "match": ((1,),),
        "edits": (),
        "keys": (),
    }
    single = packed.collator([replace(group, **part)]).to(packed.scores.logp.device)
    largest: list[float] = []

    def note(head: Any, inputs: Any) -> None:
        largest.append(float((inputs[0] @ head.weight.T).abs().max()))  # ZeRO-3 has gathered the weight at this point

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        alone = _alone(forward, model, single)
    finally:
        handle.remove()
    return Cell(float(packed.scores.logp[g, i, c]), alone, int(layout.num_tokens[g, i, c]), single, max(largest))


def _alone(forward: Any, model: Any, single: Batch) -> float:
    with stock_attention(model):
        return float(single.scores(forward(**single.model_inputs)).logp[0, 0, 0])


def _spreads(forward: Any, model: Any, cells: Sequence[Cell], dtype: torch.dtype, world: World) -> float:
    """Return the differences of the cells in units of rounding error: the root mean square over cells and ranks.

    The rounding error has two parts: the spread of a text's score under other roundings, which grows with the square root of its tokens,
    and one unit in the last place of its largest logit.
    """
    squares = []
    for number in range(_REPEATS):
        for cell in cells:
            with rounded_otherwise(model, dtype, number, world.device):
                squares.append((_alone(forward, model, cell.single) - cell.alone) ** 2 / cell.tokens)
    spread = _mean(squares, world)
    unit = torch.finfo(dtype).eps
    return _mean([cell.off**2 / (spread * cell.tokens + (unit * cell.largest_logit) ** 2) for cell in cells], world) ** 0.5


def _mean(values: Sequence[float], world: World) -> float:
    """Return the mean over all ranks."""
    total = torch.tensor([sum(values), float(len(values))], dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module, dtype: torch.dtype, seed: int, device: torch.device) -> Iterator[None]:
    """Move every module's output of ``dtype`` at random by up to half a unit in the last place, inside the block."""
    random = torch.Generator(device).manual_seed(seed)
    half_unit = torch.finfo(dtype).eps / 2

    def perturbed(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dtype != dtype:
            return value
        drawn = torch.rand(value.shape, generator=random, device=value.device, dtype=torch.float32)
        return (value.double() * (1 + half_unit * (2 * drawn.double() - 1))).to(dtype)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (perturbed(output[0]), *output[1:]) if type(output) is tuple and output else perturbed(output)

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest(values: Sequence[float], world: World) -> float:
    """Return the largest value over all ranks; NaN if any value is NaN."""
    local = torch.tensor(values, dtype=torch.float64, device=world.device)
    local = torch.stack([local.nan_to_num(0, posinf=math.inf).max(), local.isnan().any().double()])
    if world.size > 1:
        dist.all_reduce(local, op=dist.ReduceOp.MAX)
    return math.nan if local[1] else float(local[0])
