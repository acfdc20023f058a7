"""Which rows a shard has. The ids say it, so all rows are read for it once, and by each shard its own alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.work_folder import WorkFolder, shard_of
from cfvlm_ds.data.store import GroupStore

_MAGIC = b"cfshard1"
_BLOCK = 1 << 16


def places_of(store: GroupStore, work: WorkFolder, shard: int, say: Callable[[str], object]) -> Sequence[int]:
    """The places of a shard's groups, in the order of the data. A row that cannot be read belongs to the shard that its place says."""
    if work.shards == 1:
        return range(len(store))
    path = work.path / "shards.bin"
    made_once(path, lambda: _write(path, store, work.shards, say))
    shards = np.memmap(path, np.uint32, "r", len(_MAGIC), (len(store),))
    return array("q", np.flatnonzero(shards == shard).astype(np.int64).tobytes())


def _write(path: Path, store: GroupStore, shards: int, say: Callable[[str], object]) -> None:
    progress = Progress(say, "propose: rows by shard", len(store), "rows")
    with whole_file(path) as file:
        file.write(_MAGIC)
        block = array("I")
        for place, entry in store.entries():
            block.append(shard_of(store.where(place) if isinstance(entry, DataError) else entry.id, shards))
            if len(block) == _BLOCK:
                file.write(block.tobytes())
                block = array("I")
            progress.advance()
        file.write(block.tobytes())
