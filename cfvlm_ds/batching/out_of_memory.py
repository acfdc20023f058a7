"""Out-of-memory errors that state the size of the largest forward pass and a remedy, instead of the allocator's traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.core.errors import OutOfMemory


@contextlib.contextmanager
def explain_out_of_memory(where: str, parts: Sequence[Batch], remedy: str) -> Iterator[None]:
    """Convert an allocation failure to an OutOfMemory error that states the size of the largest of ``parts`` and the ``remedy``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and the CPU allocator raises a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        largest = max(parts, key=lambda part: part.num_tokens)
        sizes = f"{len(largest.layout.ids)} groups, {largest.num_tokens} tokens and {largest.num_images} images"
        message = (str(error) or "nothing").splitlines()[0]
        raise OutOfMemory(
            f"out of memory {where}; its largest forward pass has {sizes}; {remedy}; the allocator reports: {message}"
        ) from error
