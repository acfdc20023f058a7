"""Before anything is trained: whether the weights are numbers, and whether packed rows score as single rows do, with stock attention.

Kernels and versions of libraries that were never tested together give wrong scores without an error. A score that is off is judged by what
the precision explains: forwards of single rows are repeated in which every module's output is rounded otherwise, and the largest logit
tells what one rounding of a logit is worth. A wrong mask or position is off by more than both.
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
"""Nats per token up to which a difference needs no explanation; 0.05 in types of half precision."""
_HALF = 0.05
_CELLS, _REPEATS = 8, 2  # looked at where a difference needs one; forwards with other roundings for each
_SPREADS = 3  # of those forwards' scores: what a difference of another kind than rounding is larger than
_NAMED = 5


def refuse_nonfinite(model: nn.Module, source: str, world: World) -> None:
    """Raise ConfigError on all ranks naming weights with NaN or infinite values; under ZeRO-3 every rank looks at its own part.

    Bounds may be infinite, as those of Gemma 4's clipped layers are where nothing is clipped.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        part = own_part(value).detach()
        if part.is_floating_point() and part.numel() and part.device.type != "meta":
            tensors[name] = part
    extremes = {name: torch.stack(torch.aminmax(part)) for name, part in tensors.items()}
    finite = {name: ~x.isnan().any() if name.endswith(("_min", "_max")) else x.isfinite().all() for name, x in extremes.items()}
    found = [name for name, good in finite.items() if not good]
    if named := sorted({name for names in gather_objects(found, world) for name in names}):
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        raise ConfigError(
            f"{source} has weights that are not finite: {', '.join(named[:_NAMED])}{more}; get the model again, or convert it from its "
            "published precision: float16 overflows where bfloat16 does not"
        )


def refuse_unusable(forward: Any, collator: Collator, name: str, device: torch.device) -> None:
    """Raise ConfigError if the model ``name`` cannot score one text on one image: only then do many errors of a config.json show.

    Every rank calls it; errors of the machine, such as missing memory, are raised as they are.
    """
    with (
        explained(f"the model {name!r} cannot be run", "compare its config.json and processor files with the published ones"),
        torch.no_grad(),
    ):
        batch = collator.scoring_everything()([STAND_IN]).to(device)
        batch.scores(forward(**batch.model_inputs))


@dataclass
class Cell:
    """One cell of a packed row, and the same scored alone: nats, tokens of its text, and the inputs of the single-row forward."""

    packed: float
    alone: float
    tokens: int
    single: Batch
    largest_logit: float

    @property
    def off(self) -> float:
        """Nats; NaN where one of the two is."""
        return abs(self.packed - self.alone)


def check_scores(config: RunConfig, forward: Any, collator: Collator, groups: Sequence[CounterfactualGroup], world: World) -> None:
    """Compare two cells of the first packed row of ``groups``, the first one and one after other texts, with one single-row forward each.

    Every rank calls it with groups of its own; ``forward`` is the engine, in evaluation mode. Raises ConfigError on all ranks where a score
    is off by more than its precision explains.
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
            more = [packed.places[step * k % len(packed.places)] for k in range(_CELLS)]  # as many forwards on every rank
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
        largest.append(float((inputs[0] @ head.weight.T).abs().max()))  # where ZeRO-3 has gathered the weight

    watched = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        alone = _alone(forward, model, single)
    finally:
        watched.remove()
    return Cell(float(packed.scores.logp[g, i, c]), alone, int(layout.num_tokens[g, i, c]), single, max(largest))


def _alone(forward: Any, model: Any, single: Batch) -> float:
    with stock_attention(model):
        return float(single.scores(forward(**single.model_inputs)).logp[0, 0, 0])


def _spreads(forward: Any, model: Any, cells: Sequence[Cell], dtype: torch.dtype, world: World) -> float:
    """The differences of the cells as multiples of what rounding explains, root mean square over cells and ranks.

    Rounding explains the spread of a text's score under other roundings, which grows with the square root of its tokens, and one unit in
    the last place of its largest logit.
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
    """Over all ranks."""
    total = torch.tensor([sum(values), float(len(values))], dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module, dtype: torch.dtype, seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block every module's output of ``dtype`` is moved at random by up to half a unit in the last place."""
    chance = torch.Generator(device).manual_seed(seed)
    step = torch.finfo(dtype).eps / 2

    def moved(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dtype != dtype:
            return value
        drawn = torch.rand(value.shape, generator=chance, device=value.device, dtype=torch.float32)
        return (value.double() * (1 + step * (2 * drawn.double() - 1))).to(dtype)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if type(output) is tuple and output else moved(output)

    hooks = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _largest(values: Sequence[float], world: World) -> float:
    """The largest value of all ranks; NaN where one is."""
    found = torch.tensor(values, dtype=torch.float64, device=world.device)
    found = torch.stack([found.nan_to_num(0, posinf=math.inf).max(), found.isnan().any().double()])
    if world.size > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return math.nan if found[1] else float(found[0])
