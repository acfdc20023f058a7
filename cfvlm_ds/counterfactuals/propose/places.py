"""Which rows a shard has. The ids say it, so all rows are read for it once, and by each shard its own alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.work_folder import WorkFolder, shard_of
from cfvlm_ds.data.store import GroupStore


def places_of(store: GroupStore, work: WorkFolder, shard: int, say: Callable[[str], object]) -> Sequence[int]:
    """The places of a shard's groups, in the order of the data. A row that cannot be read belongs to the shard that its place says."""
    if work.shards == 1:
        return range(len(store))
    path = work.path / "shards.bin"

    def write() -> None:
        progress = Progress(say, "propose: rows by shard", len(store), "rows")
        names = (store.where(k) if isinstance(entry, DataError) else entry.id for k, entry in progress.over(store.entries()))
        replace(path, array("I", (shard_of(name, work.shards) for name in names)).tobytes())

    shards = np.fromfile(made_once(path, write), np.uint32)
    return array("q", np.flatnonzero(shards == shard).astype(np.int64).tobytes())
