"""The engine between its steps: options of a restored optimizer, time spent waiting for weights, the prefetch trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError


def optimizer_options(engine: Any) -> dict[str, Any]:
    """This run's settings of optimizer, clipping and schedule; loading a checkpoint replaces them by those of its own run."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "step")} for group in engine.optimizer.param_groups]
    return {
        "groups": groups,
        "clip": getattr(engine.optimizer, "clip_grad", None),
        "rates": list(getattr(engine.lr_scheduler, "base_lrs", ())),
    }


def apply_optimizer_options(engine: Any, options: dict[str, Any]) -> None:
    """Set in a restored engine what ``optimizer_options`` returned before; the next step uses it, at its place in the schedule."""
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

    A module waits from its request for its weights to their arrival. On CUDA this is measured by events of the computing stream; events
    that it has not reached yet count in the next call, so that measuring delays nothing. Elsewhere it is measured by the process's clock.
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
    """Invalidate ZeRO-3's prefetch trace, because the next forward runs other modules than the last ones did; it records a new one."""
    coordinator = _coordinator(engine)
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def drop_prefetch_recording(engine: Any) -> None:
    """Drop the prefetch trace that ZeRO-3 records of a forward without a backward; it records the next forward with its backward."""
    coordinator = _coordinator(engine)
    if coordinator is not None and coordinator.is_record_trace():
        coordinator._invalidate_trace()


def _coordinator(engine: Any) -> Any:
    """ZeRO-3's parameter coordinator, which fetches weights; None where weights are not partitioned."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator()
