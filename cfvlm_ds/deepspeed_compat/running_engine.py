"""Operations on a running engine: restore optimizer options, time the waiting for weights, drop the prefetch trace, and release memory."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError


def optimizer_options(engine: Any) -> dict[str, Any]:
    """Return this run's optimizer, clipping and schedule settings. Loading a checkpoint replaces them with the earlier run's settings."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in engine.optimizer.param_groups]
    return {
        "groups": groups,
        "clip": engine.optimizer.clip_grad,
        "rates": list(getattr(engine.lr_scheduler, "base_lrs", ())),
    }


def apply_optimizer_options(engine: Any, options: dict[str, Any]) -> None:
    """Apply settings from ``optimizer_options`` to a restored engine, from the next step on. The position in the schedule is kept."""
    engine.optimizer.clip_grad = options["clip"]
    groups, schedule = engine.optimizer.param_groups, engine.lr_scheduler
    for group, saved in zip(groups, options["groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "lr"})
    if hasattr(schedule, "lr_lambdas"):  # a transformers schedule
        schedule.base_lrs = options["rates"]
        schedule._last_lr = [rate * by(schedule.last_epoch) for rate, by in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    elif hasattr(schedule, "last_batch_iteration"):  # a DeepSpeed schedule, which has no other state
        schedule.step(schedule.last_batch_iteration)
    else:
        raise ConfigError(f"the schedule {type(schedule).__name__} of the DeepSpeed JSON does not support changed options; restore them")


def gather_clock(engine: Any, device: torch.device) -> Callable[[], float] | None:
    """Return a function that measures how long computation waits for ZeRO-3 to gather weights, or None if weights are not partitioned.

    The function returns the seconds waited since its last call. A module's wait lasts from the request for its weights until their arrival.
    On CUDA, it is measured with events on the compute stream. Events that the stream has not yet reached are included in the result of a
    later call, so that measuring never blocks. On other devices, it is measured with the process's clock.
    """
    if (coordinator := _coordinator(engine)) is None:
        return None
    fetch, waited = coordinator.fetch_sub_module, 0.0
    pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def by_clock(*arguments: Any, **options: Any) -> None:
        nonlocal waited
        requested = time.perf_counter()
        fetch(*arguments, **options)
        waited += time.perf_counter() - requested

    def by_events(*arguments: Any, **options: Any) -> None:
        requested, arrived = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        requested.record()
        fetch(*arguments, **options)
        arrived.record()
        pending.append((requested, arrived))
        collect()

    def collect() -> None:
        nonlocal waited
        while pending and pending[0][1].query():
            requested, arrived = pending.popleft()
            waited += requested.elapsed_time(arrived) / 1000

    def since_last() -> float:
        nonlocal waited
        collect()
        seconds, waited = waited, 0.0
        return seconds

    coordinator.fetch_sub_module = by_events if device.type == "cuda" else by_clock
    return since_last


def drop_prefetch_recording(engine: Any) -> None:
    """Drop the trace of a forward pass that had no backward pass, so that the next forward pass is recorded with its backward pass."""
    coordinator = _coordinator(engine)
    if coordinator is not None and coordinator.is_record_trace():
        coordinator._invalidate_trace()


def release(engine: Any) -> None:
    """Free the memory of an engine that is no longer used.

    Under ZeRO-3, two references otherwise keep its weights and optimizer state until the process ends: DeepSpeed's list of modules refers
    to the model, and the cache of a method refers to the parameter coordinator.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    with contextlib.suppress(ValueError):  # only ZeRO-3 lists its models
        parameter_offload.FWD_MODULE_STACK.remove(engine.module)
    cached = parameter_offload.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def _coordinator(engine: Any) -> Any:
    """Return ZeRO-3's parameter coordinator, which fetches weights, or None if weights are not partitioned."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()
