"""Cost of scoring K texts on each of M images, forward and backward: in one row, and with training's gradient cache.

    python benchmarks/images.py                                    # LLaVA's shape, 256 visual tokens, 4 texts, 1 to 8 images
    python benchmarks/images.py --family qwen2_5_vl --visual 576
    python benchmarks/images.py --images 4 8 --per-forward 4       # small images, several per forward pass

The loss couples all images and texts, and both ways must give the same loss. The cache runs each forward pass twice, with --per-forward
images; in training, data.max_tokens_per_forward sets this number. Times are medians, in CPU seconds of one thread or in seconds on the
device. Memory is the peak above weights and gradients.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from scoring import SIZES, TEXT, VOCABULARY, add_common_options, build, case, clear, now, packed_inputs, peak, reset_peak
from torch import Tensor
from two_levels import two_levels

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.models import FAMILIES, Scorer
from cfvlm_ds.models.forest_attention import registered
from cfvlm_ds.training.gradient_cache import forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(VOCABULARY), default="llava")
    parser.add_argument("--visual", type=int, default=256, help="visual tokens of an image; the square of an even number")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--per-forward", type=int, default=1, help="images per forward of the cache")
    add_common_options(parser)
    arguments = parser.parse_args()
    print(f"{'images':>6} {'one row: s':>11} {'MB':>6} {'cache: s':>9} {'MB':>6}")
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as fresh:  # a new process, in which earlier counts have not fragmented memory
        for count, ways in zip(arguments.images, fresh.map(measure, itertools.repeat(arguments), arguments.images), strict=False):
            (cache, cache_time, cache_peak), (row, row_time, row_peak) = ways
            if abs(cache - row) > 1e-4 * abs(row) and arguments.dtype == "float32":
                raise SystemExit(f"the losses of the two ways on {count} images differ: {row} and {cache}")
            print(f"{count:>6} {row_time:>11.2f} {row_peak / 1e6:>6.0f} {cache_time:>9.2f} {cache_peak / 1e6:>6.0f}", flush=True)


def measure(arguments: argparse.Namespace, count: int) -> list[tuple[float, float, int]]:
    """Measure both methods in turns, and return each one's (loss, seconds, peak bytes): the cache, then one row. The first turn only
    measures memory.
    """
    torch.set_num_threads(1)
    size, device, dtype = SIZES[arguments.size], torch.device(arguments.device), getattr(torch, arguments.dtype)
    model = build(arguments.family, arguments.visual, size, device, dtype)
    model.config.get_text_config()._attn_implementation = registered(arguments.attention)
    texts, scorer = arguments.texts, Scorer(model, FAMILIES[model.config.model_type])
    clear(model)  # allocates gradients, which the first step's peak would otherwise include
    of = case(model, arguments.family, arguments.visual, texts)
    parts = [packed_inputs(case(model, arguments.family, arguments.visual, texts, seed)) for seed in range(count)]
    firsts = range(0, count, arguments.per_forward)
    batches: list[Any] = [Part(in_one_row(parts[k : k + arguments.per_forward]), k, count, texts) for k in firsts]

    def one_row() -> float:
        logp = scorer(**in_one_row(parts)).view(count, texts, TEXT).sum(-1)
        loss = coupled(Scores(None, logp, logp))  # type: ignore[arg-type]
        loss.backward()
        return loss.item()

    def cache() -> float:
        micro_batch = MicroBatch(tuple(batches))
        scores, backward = forward(Engine(scorer), micro_batch, len(batches), of.prefix.device, lambda _: None, last=True)
        loss = coupled(scores)
        backward(loss)
        return loss.item()

    ways: dict[Callable[[], float], list[float]] = {cache: [], one_row: []}
    losses: list[float] = []
    peaks: list[int] = []
    for turn in range(arguments.repeats + 1):
        for way, times in ways.items():
            before, start = reset_peak(of.prefix.device) if turn == 0 else 0, now(of)
            loss = way()
            if turn == 0:
                losses.append(loss)
                peaks.append(peak(of.prefix.device) - before)
            else:
                times.append(now(of) - start)
            clear(model)
    return [(loss, statistics.median(times), most) for loss, times, most in zip(losses, ways.values(), peaks, strict=True)]


def coupled(scores: Scores) -> Tensor:
    """Return InfoNCE over the images for the first text, plus InfoNCE over the texts of every image."""
    return -(scores.logp.log_softmax(0)[0, 0] + scores.logp.log_softmax(1)[:, 0].mean())


class Engine:
    """Module with the methods of DeepSpeed's engine that training uses."""

    def __init__(self, module: Scorer) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Tensor:
        return self.module(**inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """Consecutive images, with the interface of a batch."""

    model_inputs: dict[str, Any]
    first: int
    count: int
    texts: int
    reference: None = None

    def scores(self, logp: Tensor) -> Scores:
        own = logp.view(-1, self.texts, TEXT).sum(-1)
        matrix = torch.cat([own.new_zeros(self.first, self.texts), own, own.new_zeros(self.count - self.first - len(own), self.texts)])
        return Scores(None, matrix, matrix)  # type: ignore[arg-type]


def in_one_row(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the trees of several images into one row, as cfvlm_ds.batching.collator does."""
    scored = [len(part["scored"]) for part in parts]
    forests = [part["forest"] for part in parts]
    starts = [sum(forest.bounds[-1] for forest in forests[:k]) for k in range(len(parts))]
    return {
        "input_ids": torch.cat([part["input_ids"] for part in parts], 1),
        "position_ids": torch.cat([part["position_ids"] for part in parts], -1),
        "forest": two_levels([forest.lengths[0] for forest in forests], [forest.lengths[1:] for forest in forests]),
        **{name: torch.cat([part[name] + start for part, start in zip(parts, starts, strict=True)]) for name in ("visual", "scored")},
        "predicted_by": torch.cat([part["predicted_by"] + sum(scored[:k]) for k, part in enumerate(parts)]),
        "targets": torch.cat([part["targets"] for part in parts]),
        "images_of_tree": [(k,) for k in range(len(parts))],
        "visual_tokens": [part["visual_tokens"][0] for part in parts],
        "image_inputs": {name: torch.cat([part["image_inputs"][name] for part in parts]) for name in parts[0]["image_inputs"]},
    }


if __name__ == "__main__":
    main()
