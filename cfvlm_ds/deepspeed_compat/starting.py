"""Importing DeepSpeed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


def import_deepspeed() -> None:
    """Import DeepSpeed without the parts that no training here uses."""
    with _absent("mlflow"):  # its autotuner would import it on every rank: 1.4 CPU seconds each
        import deepspeed
    # The shared-memory all-reduce serves CPU inference; ZeRO-3 makes no use of it, and it costs a compiler and a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make ``import module`` fail inside the block, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
