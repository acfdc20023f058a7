"""Self-check before training: weights must be finite, and packed rows must give the same scores as unpacked rows, which have one text each
and run with transformers' own attention.

Untested combinations of kernels and library versions can give wrong scores without an error. The tolerance covers two rounding errors: that
of the module outputs, measured by perturbing them in unpacked rows, and that of the largest logit. A wrong mask or position causes a larger
difference.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from cfvlm_ds.batching.batch import STAND_IN, Batch, shown
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.deepspeed_compat.parameters import own_part
from cfvlm_ds.models import attention
from cfvlm_ds.models.forest_attention import stock_attention
from cfvlm_ds.models.model_files import explained

UNSUSPICIOUS = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Dtype -> largest difference, in nats per token, that is accepted without measuring the rounding error."""
_HALF = 0.05  # the same for half-precision dtypes
_CELLS, _REPEATS = 8, 2  # to measure the rounding error: additional cells, and differently rounded forward passes per cell
_SPREADS = 3  # largest accepted difference, as a multiple of the rounding error
_NAMED = 5


def refuse_nonfinite(model: nn.Module, source: str, world: World) -> None:
    """Raise ConfigError on all ranks if any weights are NaN or infinite, and name them. Under ZeRO-3, each rank checks its own partition.

    Clipping bounds (names ending in _min or _max) may be infinite: Gemma 4's clipped layers have infinite bounds if nothing is
    clipped.
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
            f"{source} has weights that are not finite: {', '.join(broken[:_NAMED])}{more}; download the model again, or convert it "
            "again from its published precision: float16 overflows where bfloat16 does not"
        )


def refuse_unusable(forward: Any, collator: Collator, name: str, device: torch.device) -> None:
    """Raise ConfigError if the model ``name`` cannot score one text on one image. Many errors in a config.json are only detected here.

    Every rank must call this. Machine errors, such as running out of memory, are raised unchanged.
    """
    with (
        explained(f"the model {name!r} cannot be run", "compare its config.json and processor files with the published ones"),
        torch.no_grad(),
    ):
        batch = collator.scoring_everything()([STAND_IN]).to(device)
        batch.scores(forward(**batch.model_inputs))


@dataclass
class Cell:
    """A cell that is scored in a packed row and in a separate row: both scores in nats, the number of tokens in the text, and the inputs
    and largest logit of the forward pass over the separate row.
    """

    packed: float
    alone: float
    tokens: int
    single: Batch
    largest_logit: float

    @property
    def off(self) -> float:
        """Absolute difference between the two scores in nats, or NaN if either score is NaN."""
        return abs(self.packed - self.alone)


def check_scores(config: RunConfig, forward: Any, collator: Collator, groups: Groups, world: World) -> None:
    """Score two cells of the first packed row of ``groups`` again in rows of their own, and compare the scores. The cells are the row's
    first cell and a cell that follows other texts.

    Every rank must call this with its own groups. ``forward`` is the engine in evaluation mode. Raises ConfigError on all ranks if a cell's
    two scores differ by more than the rounding error.
    """
    model = forward.module.model
    dtype = next(model.parameters()).dtype
    bound = UNSUSPICIOUS.get(dtype, _HALF)
    with torch.no_grad():
        readable = collator.readable(groups)[0]
        row = (
            (collator if readable else collator.scoring_everything())
            .parts(readable or [STAND_IN], config.data.max_tokens_per_forward)[0]
            .to(world.device)
        )
        places = torch.stack(torch.unravel_index(row.cell.unique(), row.layout.valid.shape), 1).tolist()
        scores = row.scores(forward(**row.model_inputs))
        compared = partial(_compared, forward, model, collator.scoring_everything(), readable or [STAND_IN], scores)
        cells = [compared(place) for place in (places[0], max(places, key=lambda place: place[2]))]
        worst = _largest(cells, world)
        allowed = bound
        if not worst <= bound and math.isfinite(worst):
            step = max(1, len(places) // _CELLS)
            cells += [compared(places[step * k % len(places)]) for k in range(_CELLS)]  # the same number of passes on every rank
            worst = _largest(cells, world)
            allowed = max(bound, worst * _SPREADS / _spreads(forward, model, cells, dtype, world))
    backend = attention(config.model.attn_implementation, model.config, dtype)
    if not worst <= allowed:
        other = "" if backend == "sdpa" else "use sdpa, "
        raise ConfigError(
            f"model.attn_implementation {backend} gives scores that differ by {worst:.3g} nats per token from single-row forwards, but "
            f"rounding in {str(dtype).removeprefix('torch.')} explains only {allowed:.2g}; {other}report the versions of torch and "
            "transformers, or set train.self_check=warn if you know the cause"
        )
    explained = "" if allowed == bound else f", which rounding in {str(dtype).removeprefix('torch.')} explains"
    world.say(f"self-check: packing changes scores by at most {worst:.1e} nats per token ({backend}){explained}")


def _compared(forward: Any, model: Any, collator: Collator, groups: Groups, scores: Scores, place: list[int]) -> Cell:
    """Score one cell (group, image, text) again in a row of its own, and return both scores as a ``Cell``."""
    g, i, c = place
    images, candidates = (shown(groups[g], i),), groups[g].candidates[c : c + 1]
    alone_in_row = replace(groups[g], images=images, candidates=candidates, match=((1,),), edits=(), keys=())
    single = collator([alone_in_row]).to(scores.logp.device)
    largest: list[float] = []

    def note(head: Any, inputs: Any) -> None:
        largest.append(float((inputs[0] @ head.weight.T).abs().max()))  # ZeRO-3 has gathered the weight at this point

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        alone = _alone(forward, model, single)
    finally:
        handle.remove()
    return Cell(float(scores.logp[g, i, c]), alone, int(scores.layout.num_tokens[g, i, c]), single, max(largest))


def _alone(forward: Any, model: Any, single: Batch) -> float:
    with stock_attention(model):
        return float(single.scores(forward(**single.model_inputs)).logp[0, 0, 0])


def _spreads(forward: Any, model: Any, cells: Sequence[Cell], dtype: torch.dtype, world: World) -> float:
    """Return the root mean square of the differences over cells and ranks, in units of the rounding error.

    The rounding error has two parts. The first is the spread of a text's score when outputs are rounded differently; it grows with the
    square root of the number of tokens. The second is one unit in the last place of the text's largest logit.
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
    return fmean(value for of_rank in gather_objects(values, world) for value in of_rank)


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module, dtype: torch.dtype, seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, randomly shift every module output of ``dtype`` by up to half a unit in the last place."""
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


def _largest(cells: Sequence[Cell], world: World) -> float:
    """Return the largest difference per token over all ranks, or NaN if any difference is NaN."""
    off = [value for of_rank in gather_objects([cell.off / cell.tokens for cell in cells], world) for value in of_rank]
    return math.nan if any(map(math.isnan, off)) else max(off)
