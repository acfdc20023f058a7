"""Training with a deliberate fault: a rank without an image leaves the tower out of its backward pass. Collectives time out after 20 s."""

from collections.abc import Sequence
from datetime import timedelta

import torch

from cfvlm_ds import engine
from cfvlm_ds.cli.train import run
from cfvlm_ds.models import Scorer

encode = Scorer._encode


def left_out(self: Scorer, *arguments: object) -> tuple[dict[str, object], torch.Tensor]:
    encoded, unused = encode(self, *arguments)  # type: ignore[arg-type]
    return encoded, unused.detach()


def train(wrong: bool, options: Sequence[str]) -> None:
    start = engine.start
    engine.start = lambda: start(timedelta(seconds=20))
    if wrong:
        Scorer._encode = left_out  # type: ignore[assignment, method-assign]
    run(options)
