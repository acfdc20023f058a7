"""Going through all groups: each rank through a range of them, in chunks, in processes on all its cores where there are many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from cfvlm_ds.core.distributed import apart, cores_per_rank
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.picture_index import PictureNotes

T = TypeVar("T")
Array = npt.NDArray[Any]
Done = Callable[[], object]
"""Called after every place of a chunk."""

_CHUNK = 256
_MANY = 1 << 14  # places from which on processes are worth their start


class Board:
    """Arrays that ranks show one another: files in a folder that all of them see, mapped; for one process its own.

    Args:
        folder: where they are; None for one process.
        rank: which process this is, of ``size``.
        meet: waits until every process has arrived.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, size: int = 1, meet: Callable[[], object] = lambda: None) -> None:
        self._folder, self._rank, self._size, self._meet = folder, rank, size, meet
        self._shown: list[str] = []
        self.problem: str | None = None
        """Why an array could not be shown; nothing is raised, because other processes would wait where they meet."""

    def show(self, name: str, array: Array) -> list[Array]:
        """The arrays of all ranks under this name; collective. The rank's own is the one given."""
        if self._folder is None or self._size == 1:
            return [array]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._file(name, self._rank)) as handle:
                np.save(handle, array, allow_pickle=False)
        except OSError as error:
            reason = f"what ranks tell one another cannot be kept ({error.strerror})"
            self.problem = f"{self._folder}: {reason}; make room, or correct the folder"
        self._shown.append(name)
        self._meet()
        found = []
        for rank in range(self._size):
            each = array if rank == self._rank else array[:0]
            if rank != self._rank:
                with contextlib.suppress(OSError, ValueError, EOFError):
                    each = np.load(self._file(name, rank), mmap_mode="r", allow_pickle=False)
            found.append(each)
        return found

    def clear(self) -> None:
        """Take the arrays away, once nobody reads them; collective."""
        self._meet()
        for name in self._shown:
            with contextlib.suppress(OSError):
                self._file(name, self._rank).unlink(missing_ok=True)
        self._shown.clear()

    def _file(self, name: str, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.{rank}.npy"


@dataclass(frozen=True)
class Share:
    """This process's part of what goes through all groups, and where it notes what it has seen.

    ``alive`` is called for every row and picture; it may raise in order to leave. ``shield`` is called in each process that is started.
    """

    rank: int = 0
    size: int = 1
    notes: PictureNotes = field(default_factory=PictureNotes)
    alive: Callable[[], object] = lambda: None
    board: Board = field(default_factory=Board)
    shield: Callable[[int], None] = lambda worker: None

    @property
    def whose(self) -> str:
        """Which part this is, for a line about its progress; nothing where one process does it all."""
        return f" (rank {self.rank}; {self.size} ranks share them)" if self.size > 1 else ""

    def of(self, count: int) -> range:
        """The places of this rank: one after the other, so that files are read as they lie."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def over(self, places: Sequence[int], work: Callable[[Sequence[int], Done], T], progress: Progress) -> Iterator[T]:
        """What ``work`` gives for each chunk of places, in their order. It may run in other processes, and raises nothing there."""
        chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
        if len(places) < _MANY or (cores := cores_per_rank()) < 2:

            def done() -> None:
                progress.advance()
                self.alive()

            for chunk in chunks:
                self.alive()
                yield work(chunk, done)
            return
        loader: Any = DataLoader(
            chunks,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(work, done=lambda: None),  # type: ignore[call-arg]
            num_workers=cores,
            worker_init_fn=self.shield,
            generator=apart(),
        )
        for chunk, found in zip(chunks, loader, strict=True):
            self.alive()
            yield found
            progress.advance(len(chunk))


class Firsts:
    """Distinct keys of 64 bits, and the place where each comes first; added chunk by chunk, places growing."""

    def __init__(self) -> None:
        self._keys, self._places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, keys: Array, places: Array) -> None:
        """Add keys, each with its place."""
        self._keys.append(keys)
        self._places.append(places)
        self._waiting += len(keys)
        if self._waiting > max(1 << 20, len(self._keys[0])):
            self.sorted()

    def sorted(self) -> tuple[Array, Array]:
        """Distinct keys in order, and their first places."""
        keys, first = np.unique(np.concatenate(self._keys), return_index=True)
        self._keys, self._places, self._waiting = [keys], [np.concatenate(self._places)[first]], 0
        return keys, self._places[0]


def owned(mine: Array, of_all: Sequence[Array], rank: int) -> Array:
    """Of sorted distinct keys of this rank, which are its to look after: each key has one owner among the ranks that have it, and those
    have about as many each."""
    holders, before = np.zeros(len(mine), np.uint64), np.zeros(len(mine), np.uint64)
    for other, keys in enumerate(of_all):
        has = np.ones(len(mine), bool) if other == rank else contains(keys, mine)
        holders += has
        before += has & (other < rank)
    return mine[mine % holders == before]


def contains(keys: Array, wanted: Array) -> Array:
    """Which of the wanted are among sorted keys."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    found: Array = np.asarray(keys)[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
    return found
