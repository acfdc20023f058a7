"""Every use of what is not DeepSpeed's, torch's or the schedules' public interface, read in DeepSpeed 0.19.8."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError

_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "fuse.sshfs", "ceph", "9p", "wekafs")
_STALE_AFTER_S = 300.0


def clear_stale_locks(folder: Path | None = None, say: Callable[[str], object] = print) -> list[Path]:
    """Remove build locks that a killed process left in torch's extension cache, where every later start would wait for ever.

    The holder of a lock keeps it open, so a lock that no process of this machine has open is stale; on a network file system the holder may
    be elsewhere, and the lock must also be untouched for five minutes. Returns the locks removed.
    """
    if folder is None:
        from torch.utils.cpp_extension import _get_build_directory  # also honours TORCH_EXTENSIONS_DIR

        probe = Path(_get_build_directory("probe", verbose=False))
        folder = probe.parent
        with contextlib.suppress(OSError):
            probe.rmdir()
    removed = []
    for lock in sorted(folder.glob("*/lock")):
        while (reason := _held(lock)) and reason != "process":
            say(f"waiting for the extension build lock {lock}: {reason}")
            time.sleep(5)
        if reason is None and lock.exists():
            lock.unlink(missing_ok=True)
            removed.append(lock)
            say(f"removed the stale extension build lock {lock}, left by a process that was killed")
    return removed


def _held(lock: Path) -> str | None:
    """Why a lock may still be in use: ``process``, another reason, or None when it is stale or gone."""
    import psutil

    with contextlib.suppress(OSError):
        identity = lock.stat()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        other = entry.stat()
                        if (other.st_dev, other.st_ino) == (identity.st_dev, identity.st_ino):
                            return "process"
        mounts = [p for p in psutil.disk_partitions(all=True) if lock.resolve().is_relative_to(p.mountpoint)]
        mount = max(mounts, key=lambda p: len(p.mountpoint))
        newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
        if mount.fstype in _NETWORK_FILE_SYSTEMS and time.time() - newest < _STALE_AFTER_S:
            return f"{mount.fstype} is shared and another machine may be building"
    return None


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


def optimizer_options(engine: Any) -> dict[str, Any]:
    """What optimizer, clipping and schedule were told by this run's options; a checkpoint puts those of its own run in their place."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in engine.optimizer.param_groups]
    return {
        "groups": groups,
        "clip": getattr(engine.optimizer, "clip_grad", None),
        "rates": list(getattr(engine.lr_scheduler, "base_lrs", ())),
    }


def apply_optimizer_options(engine: Any, options: dict[str, Any]) -> None:
    """Give a restored engine what ``optimizer_options`` returned before: the next step goes by it, at its place in the schedule."""
    if options["clip"] is not None:  # without ZeRO it is the engine's own, from its configuration
        engine.optimizer.clip_grad = options["clip"]
    groups, schedule = engine.optimizer.param_groups, engine.lr_scheduler
    for group, own in zip(groups, options["groups"], strict=True):
        group.update({name: value for name, value in own.items() if name != "lr"})
    if hasattr(schedule, "lr_lambdas"):  # of transformers
        schedule.base_lrs = options["rates"]
        schedule._last_lr = [rate * by(schedule.last_epoch) for rate, by in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    elif hasattr(schedule, "last_batch_iteration"):  # of DeepSpeed, which keeps nothing else
        schedule.step(schedule.last_batch_iteration)
    else:
        raise ConfigError(f"the schedule {type(schedule).__name__} of the DeepSpeed JSON takes no changed options; restore them")


def gather_clock(engine: Any, device: torch.device) -> Callable[[], float] | None:
    """A function that returns for how many seconds, since its last call, computation waited for ZeRO-3 to gather weights; None elsewhere.

    A module's wait is from its request for its weights to their arrival: on CUDA by events of the stream that computes, and those it has
    not reached yet count in the next call, so that nothing is held up to be measured; elsewhere by the process's own clock.
    """
    if (coordinator := _coordinator(engine)) is None:
        return None
    fetch, waited = coordinator.fetch_sub_module, 0.0
    underway: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def by_clock(*arguments: Any, **options: Any) -> None:
        nonlocal waited
        asked = time.perf_counter()
        fetch(*arguments, **options)
        waited += time.perf_counter() - asked

    def by_events(*arguments: Any, **options: Any) -> None:
        asked, arrived = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        asked.record()
        fetch(*arguments, **options)
        arrived.record()
        underway.append((asked, arrived))
        collect()

    def collect() -> None:
        nonlocal waited
        while underway and underway[0][1].query():
            asked, arrived = underway.popleft()
            waited += asked.elapsed_time(arrived) / 1000

    def since_last() -> float:
        nonlocal waited
        collect()
        found, waited = waited, 0.0
        return found

    coordinator.fetch_sub_module = by_events if device.type == "cuda" else by_clock
    return since_last


def invalidate_prefetch_trace(engine: Any) -> None:
    """Have ZeRO-3 prefetch nothing in the next forward, which runs other modules than the last ones did; it notes their order again."""
    coordinator = _coordinator(engine)
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _coordinator(engine: Any) -> Any:
    """What fetches the weights of modules; None where weights are not partitioned."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()
