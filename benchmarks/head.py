"""Cost of the output head, forward and backward, with logits of all tokens and with log-probs of scored tokens only.

    python benchmarks/head.py
    python benchmarks/head.py --width 2048 --words 152064 --tokens 704 --scored 64

Times are medians, in CPU seconds of one thread or in seconds on the device. Memory is the peak above weights and inputs. It includes the
gradient of the head's weight (words x width elements).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from scoring import now, peak, reset_peak
from torch import Tensor

from cfvlm_ds.core.scores import token_logprobs
from cfvlm_ds.models.chunked_logprobs import head_logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--words", nargs="+", type=int, default=[32_000, 152_064])
    parser.add_argument("--tokens", type=int, default=1168, help="tokens of the row (default: 1024 visual, a prompt of 16, 8 texts of 16)")
    parser.add_argument("--scored", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'words':>7} {'every token: s':>15} {'MB':>6} {'scored: s':>10} {'MB':>6} {'ratio':>6}")
    for words in arguments.words:
        (every, every_peak), (scored, scored_peak) = measure(arguments, words)
        print(
            f"{words:>7} {every:>15.2f} {every_peak / 1e6:>6.0f} {scored:>10.2f} {scored_peak / 1e6:>6.0f} {scored / every:>6.2f}",
            flush=True,
        )


def measure(arguments: argparse.Namespace, words: int) -> list[tuple[float, int]]:
    """Measure both methods in turns, and return each one's (seconds, peak bytes): all tokens, then scored tokens only. The first turn only
    measures memory.
    """
    place: dict[str, Any] = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    weight = torch.randn(words, arguments.width, **place).requires_grad_()
    hidden = torch.randn(arguments.tokens, arguments.width, **place).requires_grad_()
    targets = torch.randint(words, (arguments.tokens,), device=arguments.device)
    kept, of = slice(-arguments.scored, None), SimpleNamespace(prefix=hidden)

    def every_token() -> Tensor:
        return token_logprobs(hidden @ weight.T, targets)[kept]

    def scored_only() -> Tensor:
        return head_logprobs(hidden[kept], weight, torch.arange(arguments.scored, device=arguments.device), targets[kept])

    ways: dict[Callable[[], Tensor], list[float]] = {every_token: [], scored_only: []}
    peaks: list[int] = []
    for turn in range(arguments.repeats + 1):
        for way, times in ways.items():
            before, start = reset_peak(of.prefix.device) if turn == 0 else 0, now(of)
            way().sum().backward()
            if turn == 0:
                peaks.append(peak(of.prefix.device) - before)
            else:
                times.append(now(of) - start)
            weight.grad = hidden.grad = None
    return [(statistics.median(times), most) for times, most in zip(ways.values(), peaks, strict=True)]


if __name__ == "__main__":
    main()
