"""Tracker of a run: metrics go to ``metrics.jsonl``, and from there to MLflow, which may be slow, down or absent.

The run folder is the source of truth. ``log`` appends one line to ``metrics.jsonl`` and returns; a thread sends new lines to MLflow in
order. ``.mlflow_delivery.json`` holds everything else that MLflow gets and the position reached in the file, so that a resumed run, or
``cfvlm-ds track RUN`` after a run has ended, finishes the delivery.

Nothing is delivered twice. MLflow's stores identify a point by (run, name, step, timestamp, value) and ignore a second copy, and the
timestamp is the one in the file. A process that continues a run reads from the server which steps it has and skips them: a step that is
computed again after a resume keeps, in MLflow, the value that was recorded first.

The destination is ``MLFLOW_TRACKING_URI`` if set, else ``mlflow.db`` and ``mlartifacts/`` in the run folder, which ``mlflow ui`` shows
when started there. ``MLFLOW_EXPERIMENT_NAME`` overrides the experiment.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cfvlm_ds.core.journal import Waiting
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.tracking.delivery_record import RECORD_FILE, DeliveryRecord, Status
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, last_values, now_ms, parse_line, say, truncate_metrics
from cfvlm_ds.tracking.mlflow_delivery import Delivery


def open_tracker(
    enabled: bool,
    run_dir: Path,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None = None,
    resume_step: int | None = None,
    mlflow: bool = True,
    close_timeout: float = 30.0,
    inputs: Sequence[Mapping[str, Any]] = (),
) -> Tracker | NullTracker:
    """Start tracking and return a ``Tracker`` where ``enabled`` (rank 0), else an object with the same methods that does nothing.

    Args:
        run_dir: the run's folder; created if missing.
        experiment, run_name: names in MLflow (``MLFLOW_EXPERIMENT_NAME`` overrides the first).
        params: nested mapping. MLflow gets it flattened with dots and cut at its length limits.
            Secrets are masked, here and in the tags and inputs. On resume a changed value becomes a tag ``param_changed.<name>``, since
            MLflow's parameters are immutable.
        tags: plain strings.
        run_id: the MLflow run to continue, as stored in a checkpoint. The run folder's own record takes precedence.
        resume_step: None starts a new run and discards earlier metrics in ``run_dir``. A step continues a run: metrics of later steps are
            dropped from ``metrics.jsonl``, to be logged again.
        mlflow: False keeps the metrics in ``metrics.jsonl`` alone; ``deliver`` can send them later.
        close_timeout: seconds that ``close`` waits for MLflow at most.
        inputs: data sets with the keys cfvlm_ds.tracking.delivery_record.INPUT; one that the run has already is not logged again.

    Raises:
        OSError: ``metrics.jsonl`` cannot be truncated. Any other trouble with a full disk or MLflow is reported on stderr and never raised.
    """
    if not enabled:
        return NullTracker()
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    if resume_step is None:
        (run_dir / RECORD_FILE).unlink(missing_ok=True)
    record = DeliveryRecord.load(run_dir) or DeliveryRecord(run_id=run_id, start_ms=now_ms())
    kept_names, offset = truncate_metrics(run_dir / METRICS_FILE, resume_step, record.offset)
    record = replace(
        record,
        experiment=_experiment(experiment),
        run_name=without_secrets(run_name),
        params=masked(params),
        tags=masked(tags),
        inputs=masked(inputs),
        offset=offset,
        resume_step=resume_step,
        status=None,
        end_ms=None,
    )
    if problem := record.save(run_dir):
        say(f"{problem}: the run goes on, and it is tried again with every delivery")
    return Tracker(run_dir, record, kept_names, mlflow, close_timeout)


def _experiment(name: str) -> str:
    return without_secrets(os.environ.get("MLFLOW_EXPERIMENT_NAME") or name)


def going_on(run_dir: Path, experiment: str) -> tuple[dict[str, float], int] | None:
    """Return the last values and the last step of the run that a folder has in an experiment, or None where it has none."""
    record = DeliveryRecord.load(Path(run_dir).absolute())
    if record is None or record.experiment != _experiment(experiment):
        return None
    return last_values(Path(run_dir) / METRICS_FILE)


class NullTracker:
    """The tracker of the other ranks: does nothing and touches no file."""

    run_id: str | None = None

    def log(self, *given: Any, **options: Any) -> None:
        """Do nothing, as ``artifact`` and ``close`` do."""

    artifact = close = __exit__ = log

    def __enter__(self) -> NullTracker:
        return self


class Tracker:
    """Writes a run's metrics to ``metrics.jsonl`` and has them delivered to MLflow. Made by ``open_tracker``.

    As a context manager it marks the run FAILED when left by an exception, KILLED by KeyboardInterrupt or a non-zero SystemExit, else
    FINISHED, and lets the exception pass.
    """

    def __init__(self, run_dir: Path, record: DeliveryRecord, kept_names: set[str], mlflow: bool, close_timeout: float) -> None:
        self._kept_names, self._close_timeout = kept_names, close_timeout
        self._lines = Waiting(run_dir / METRICS_FILE, say)
        self._delivery = Delivery(run_dir, record, wanted=mlflow)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, to be kept in checkpoints; None until MLflow has answered for the first time."""
        return self._delivery.record.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an optimizer step to ``metrics.jsonl``; returns without waiting for MLflow.

        What the disk does not take waits in memory, with a warning, and goes to the file in order as soon as it does.

        Raises:
            TypeError: a value that is not a number.
        """
        line: dict[str, Any] = {"step": int(step), "time": now_ms() / 1000}
        for name, value in metrics.items():
            if step == self._delivery.record.resume_step and name in self._kept_names:
                continue  # such as the evaluation at a checkpoint's step, logged before the interruption and computed again
            number = float(value)
            line[name] = number if math.isfinite(number) else str(number)
        self._lines.write(json.dumps(line))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have a file uploaded into ``folder``. It is read later, so leave it in place. The same path again means: it has changed."""
        self._delivery.add_artifact(str(Path(path).absolute()), folder)

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:
        """Set the final status and wait, at most ``timeout`` or else ``close_timeout`` seconds, for MLflow to get the rest.

        A second call does nothing.

        SCHEDULED is the status of a run that was asked to stop and is to go on: MLflow's other words are for runs that live or are over.
        What could not be delivered is counted on stderr, with the command that delivers it later.
        """
        if self._lines.closed:
            return
        if lost := self._lines.close():
            steps = sorted(row["step"] for row in (parse_line(line.encode() + b"\n") for line in lost) if row is not None)
            span = f" (steps {steps[0]} to {steps[-1]})" if steps else ""
            say(f"{len(lost)} records of metrics{span} are lost: {self._lines.path} could not be written to the end")
        self._delivery.finish(status, now_ms(), self._close_timeout if timeout is None else timeout)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "FAILED")
