"""The import of DeepSpeed, and the removal of stale build locks from torch's extension cache."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cfvlm_ds.core.progress import Say

_STALE_AFTER_S = 300.0


def clear_stale_locks(folder: Path | None = None, say: Say = print) -> list[Path]:
    """Remove the build locks that killed processes left behind in torch's extension cache, and return their paths. Otherwise, every later
    start would wait for these locks forever.

    A lock is stale if no file in its folder has changed for five minutes. Until then, the process that holds it may still be building, on
    this machine or on another one.
    """
    if folder is None:
        from torch.utils.cpp_extension import _get_build_directory  # also honours TORCH_EXTENSIONS_DIR

        probe = Path(_get_build_directory("probe", verbose=False))
        folder = probe.parent
        with contextlib.suppress(OSError):
            probe.rmdir()
    removed = []
    for lock in sorted(folder.glob("*/lock")):
        with contextlib.suppress(FileNotFoundError):  # the build has ended
            while time.time() - max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir())) < _STALE_AFTER_S:
                say(f"waiting for the extension build lock {lock}: another process may be building")
                time.sleep(5)
            lock.unlink()
            removed.append(lock)
            say(f"removed the stale extension build lock {lock}, left by a process that was killed")
    return removed


def import_deepspeed() -> None:
    """Import DeepSpeed without the parts that training does not use."""
    with _absent("mlflow"):  # DeepSpeed's autotuner would import it on every rank, which costs 1.4 CPU seconds per rank
        import deepspeed
    # Only CPU inference uses the shared-memory all-reduce. It needs a compiler, and its build takes a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Within the block, make ``import module`` fail, unless the module is already imported."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
