"""A checkpoint of one number of ranks resharded for another: every rank writes its own new files only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create
from cfvlm_ds.deepspeed_compat.shards import Shapes, Shards


def reshard(source: Path, target: Path, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int]) -> None:
    """Write the files of ``rank`` of ``ranks`` into ``target``, a folder that DeepSpeed then loads as its own.

    ``shapes`` is the engine's layout of the new run, and ``sizes`` the elements of this rank's flat tensors. Raises ConfigError when the
    checkpoint's weights are not this run's.
    """
    shards = Shards(source)
    if shards.trained != {name for group in shapes for name in group}:
        raise ConfigError(f"{source} trained other weights than this run does; restore model.*.tuning or choose another output_dir")
    for name, contents in shards.resharded(rank, ranks, shapes, sizes):
        with create(target / name) as handle:
            torch.save(contents, handle)
