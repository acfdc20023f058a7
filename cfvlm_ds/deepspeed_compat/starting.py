"""DeepSpeed import, and removal of stale build locks from torch's extension cache."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse.sshfs", "ceph", "9p", "wekafs")
_STALE_AFTER_S = 300.0


def clear_stale_locks() -> None:
    """Remove the build locks that killed processes left behind in torch's extension cache, and print each. Otherwise, every later start
    would wait for these locks forever.

    A lock's holder keeps the file open, so a lock that no process on this machine has open is stale. On a network file system, the holder
    can be on another machine, so a lock there is removed only if its folder has not changed for five minutes.
    """
    from torch.utils.cpp_extension import _get_build_directory  # also honours TORCH_EXTENSIONS_DIR

    probe = Path(_get_build_directory("probe", verbose=False))
    with contextlib.suppress(OSError):
        probe.rmdir()
    for lock in sorted(probe.parent.glob("*/lock")):
        while (reason := _held(lock)) and reason != "process":
            print(f"waiting for the extension build lock {lock}: {reason}")
            time.sleep(5)
        if reason is None and lock.exists():
            lock.unlink(missing_ok=True)
            print(f"removed the stale extension build lock {lock}, left by a process that was killed")


def _held(lock: Path) -> str | None:
    """Return why a lock might be in use, or None if it is stale or gone. The reason is ``process`` if a process on this machine has the
    lock open, otherwise a message about another machine.
    """
    import psutil

    with contextlib.suppress(OSError):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if any(Path(file.path) == lock.resolve() for file in process.open_files()):
                    return "process"
        mounts = [p for p in psutil.disk_partitions(all=True) if lock.resolve().is_relative_to(p.mountpoint)]
        mount = max(mounts, key=lambda p: len(p.mountpoint))
        newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
        if mount.fstype in _NETWORK_FILE_SYSTEMS and time.time() - newest < _STALE_AFTER_S:
            return f"{mount.fstype} is shared and another machine may be building"
    return None


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
