"""Number of elements that ZeRO-3 gathers in a training step, relative to the number of parameters, with one or eight texts per image.

    deepspeed --num_gpus 2 benchmarks/zero3_comm.py                # gloo on a machine without GPUs
    deepspeed --num_gpus 2 benchmarks/zero3_comm.py --json runs/zero3_comm.json

The layouts are the shared prefix and the supervised step of benchmarks/scoring.py and, for comparison, one forward pass of the engine per
text. The second step is measured: by then, DeepSpeed has recorded the order of modules, and prefetches their weights. Weights are released
after each use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from scoring import LAYOUTS, Case, build, case
from torch import Tensor, nn

SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 20_000_000,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
}
VISUAL = 64
NAMES = ("supervised", "shared prefix", "one by one")


class Layout(nn.Module):
    """Module that DeepSpeed runs for one layout."""

    def __init__(self, model: Any, layout: Callable[[Case], Tensor]) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, of: Case) -> Tensor:
        return self.layout(of)


@contextmanager
def gathered() -> Iterator[list[int]]:
    """Yield a list to which each collective within the block appends the number of elements that it gathers."""
    counts: list[int] = []
    originals = {name: getattr(comm, name) for name in ("allgather_fn", "all_gather_into_tensor", "all_gather_coalesced")}

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(output: Any, *arguments: Any, **options: Any) -> Any:
            counts.append(sum(t.numel() for t in output) if isinstance(output, list) else output.numel())
            return original(output, *arguments, **options)

        return wrapped

    for name, original in originals.items():
        setattr(comm, name, counting(original))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(comm, name, original)


def step(engine: Any, of: Case, one_by_one: bool) -> None:
    parts = [replace(of, texts=text.unsqueeze(0)) for text in of.texts] if one_by_one else [of]
    logp = torch.cat([engine(part) for part in parts])
    engine.backward(-logp.sum(-1).log_softmax(0)[0] - logp.mean())
    engine.step()


def measure(name: str, texts: int, recompute: bool) -> dict[str, Any]:
    model = build("llava", VISUAL, SIZE, torch.device("cpu"), torch.float32).to(_device())
    size = sum(p.numel() for p in model.parameters())
    of = case(model, "llava", VISUAL, texts)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = LAYOUTS["shared prefix" if name == "one by one" else name]
    wrapped = Layout(model, layout)
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), config=CONFIG)
    step(engine, of, name == "one by one")
    with gathered() as counts:
        step(engine, of, name == "one by one")
    engine.destroy()
    return {"layout": name, "texts": texts, "recompute": recompute, "elements": sum(counts) / size, "collectives": len(counts)}


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to which all results are also written")
    parser.add_argument("--layouts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--recompute", nargs="+", type=int, choices=(0, 1), default=(0, 1), help="gradient checkpointing (default both)")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    main_rank = comm.get_rank() == 0
    cases = [(name, texts, bool(recompute)) for recompute in arguments.recompute for texts in (1, 8) for name in arguments.layouts]
    rows = [measure(*each) for each in cases]
    if main_rank:
        print(f"{'layout':<15} {'texts':>5} {'recompute':>9} {'gathered / parameters':>22} {'collectives':>11}")
        for row in rows:
            print(f"{row['layout']:<15} {row['texts']:>5} {row['recompute']!s:>9} {row['elements']:>22.2f} {row['collectives']:>11}")
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
