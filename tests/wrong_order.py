"""A training with a deliberate mistake: a rank without an image leaves the tower out of its backward pass. Collectives wait 20 s."""

import sys
from datetime import timedelta

import torch

from cfvlm_ds import engine
from cfvlm_ds.cli import run
from cfvlm_ds.models import Scorer

start, encode = engine.start, Scorer._encode
engine.start = lambda: start(timedelta(seconds=20))


def left_out(self: Scorer, *arguments: object) -> tuple[dict[str, object], torch.Tensor]:
    encoded, unused = encode(self, *arguments)  # type: ignore[arg-type]
    return encoded, unused.detach()


if "--wrong" in sys.argv:
    Scorer._encode = left_out  # type: ignore[assignment, method-assign]
run([argument for argument in sys.argv[1:] if argument != "--wrong" and not argument.startswith("--local_rank")])
