"""Passes over all groups of a data set, in chunks and optionally in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.progress import Alive, Progress, no_op
from cfvlm_ds.core.ranks import cores_per_rank

T = TypeVar("T")
Array = npt.NDArray[Any]
"""A numpy array of any dtype."""
Keyed = tuple[Array, Array]
"""64-bit keys, and a value for each key."""
Done = Callable[[], object]
"""Function that a pass calls after every item of a chunk."""

_CHUNK = 256
_MANY = 1 << 14  # number of items above which several processes are faster than one


@dataclass(frozen=True)
class Scan:
    """Pass over all groups in chunks. If there are many groups, the chunks are processed in parallel on all cores.

    Args:
        alive: function that is called repeatedly during a pass; it can raise an exception to abort the pass.
        shield: function that is called with the worker's number at the start of each worker process.
    """

    alive: Alive = no_op
    shield: Callable[[int], None] = lambda worker: None

    def over(self, places: Sequence[int], work: Callable[[Sequence[int], Done], T], progress: Progress) -> Iterator[T]:
        """Yield the result of ``work`` for each chunk of the indices ``places``, in order. ``work`` can run in other processes and must not
        raise an exception.
        """
        chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
        if len(places) < _MANY or (cores := cores_per_rank()) < 2:

            def done() -> None:
                progress.advance()
                self.alive()

            for chunk in chunks:
                self.alive()
                yield work(chunk, done)
            return
        from torch.utils.data import DataLoader

        from cfvlm_ds.core.distributed import isolated_rng

        loader: Any = DataLoader(
            chunks,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(work, done=lambda: None),  # type: ignore[call-arg]
            num_workers=cores,
            prefetch_factor=8,  # the workers continue while this process writes a file to disk
            worker_init_fn=self.shield,
            generator=isolated_rng(),
        )
        for chunk, result in zip(chunks, loader, strict=True):
            self.alive()
            yield result
            progress.advance(len(chunk))


def distinct(parts: Sequence[Keyed]) -> Keyed:
    """Return the sorted distinct 64-bit keys of all parts, and the first value for each key."""
    keys, values = map(np.concatenate, zip(*parts, strict=True))
    keys, first = np.unique(keys, return_index=True)
    return keys, values[first]


def contains(keys: Array, wanted: Array) -> Array:
    """Return a mask over ``wanted`` that is True for each key in the sorted array ``keys``."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    mask: Array = np.asarray(keys)[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
    return mask
