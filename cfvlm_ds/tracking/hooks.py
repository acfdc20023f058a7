"""Tracking hooks: TensorBoard, and user-defined classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.named import imported
from cfvlm_ds.core.text import one_line
from cfvlm_ds.tracking.metrics_log import say


class Hook(Protocol):
    """Interface of a class that receives a run's metrics on rank 0.

    Args:
        run_dir: folder of the run.
        params: resolved options, nested, with secrets masked.
        step: last finished step of a resumed run; 0 for a new run.
    """

    def __init__(self, run_dir: Path, params: Mapping[str, Any], step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the metrics of a step. The run waits until this returns."""

    def close(self, status: str) -> None:
        """Receive the final status of the run, in MLflow's terms: FINISHED, FAILED, KILLED or SCHEDULED."""


class TensorBoard:
    """Hook that writes TensorBoard event files to ``RUN/tensorboard``."""

    def __init__(self, run_dir: Path, params: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        self._writer.close()


def hook_class(name: str) -> type[Hook]:
    """Return the class named by an entry of ``tracking.also``. Raises ConfigError if there is no such class."""
    if name == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("tracking.also: tensorboard is not installed; pip install tensorboard")
        return TensorBoard
    found = imported(name, "tracking.also", "tensorboard or MODULE:CLASS")
    if not isinstance(found, type) or not all(callable(getattr(found, method, None)) for method in ("log", "close")):
        raise ConfigError(f"tracking.also: {name!r} is not a class with the methods log and close; write them, as in docs/extending.md")
    return found


def _line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)


class Hooks:
    """The hooks of a run. A hook that raises an exception is reported and disabled."""

    def __init__(self, names: Sequence[str], run_dir: Path, params: Mapping[str, Any], step: int) -> None:
        self._hooks: dict[str, Hook] = {}
        for name in dict.fromkeys(names):
            try:
                self._hooks[name] = hook_class(name)(run_dir, params, step)
            except Exception as error:
                self._drop(name, error)

    def call(self, method: str, *arguments: Any) -> None:
        """Call ``method`` of every hook with ``arguments``."""
        for name, hook in [*self._hooks.items()]:
            try:
                getattr(hook, method)(*arguments)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        say(f"warning: tracking.also {name}: {_line(error)}; it is disabled")
        self._hooks.pop(name, None)
