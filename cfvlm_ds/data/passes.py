"""Passes over all groups of a data set, in chunks and in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

from cfvlm_ds.core.distributed import cores_per_rank, isolated_rng
from cfvlm_ds.core.progress import Progress

T = TypeVar("T")
Array = npt.NDArray[Any]
Done = Callable[[], object]
"""Callback after every place of a chunk."""

_CHUNK = 256
_MANY = 1 << 14  # number of places from which several processes are worth their start


@dataclass(frozen=True)
class Scan:
    """Execution of a pass over all groups: in chunks, and in processes on all cores if there are many groups.

    Args:
        alive: called for every row and picture; may raise to end the pass.
        shield: called in each process that is started.
    """

    alive: Callable[[], object] = lambda: None
    shield: Callable[[int], None] = lambda worker: None

    def over(self, places: Sequence[int], work: Callable[[Sequence[int], Done], T], progress: Progress) -> Iterator[T]:
        """Yield the result of ``work`` for each chunk of places, in order. It may run in other processes and must not raise there."""
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
            generator=isolated_rng(),
        )
        for chunk, result in zip(chunks, loader, strict=True):
            self.alive()
            yield result
            progress.advance(len(chunk))


class Firsts:
    """Distinct 64-bit keys and the first place of each, added chunk by chunk with growing places."""

    def __init__(self) -> None:
        self._keys, self._places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, keys: Array, places: Array) -> None:
        """Add keys with their places."""
        self._keys.append(keys)
        self._places.append(places)
        self._waiting += len(keys)
        if self._waiting > max(1 << 20, len(self._keys[0])):
            self.sorted()

    def sorted(self) -> tuple[Array, Array]:
        """Return the distinct keys in order, and their first places."""
        keys, first = np.unique(np.concatenate(self._keys), return_index=True)
        self._keys, self._places, self._waiting = [keys], [np.concatenate(self._places)[first]], 0
        return keys, self._places[0]


def contains(keys: Array, wanted: Array) -> Array:
    """Return a mask of the wanted keys that are among sorted keys."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    mask: Array = np.asarray(keys)[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
    return mask
