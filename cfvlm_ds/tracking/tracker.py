"""Metrics of a run: always to ``metrics.jsonl``, and from there to MLflow, which may be slow, down or absent.

The run folder is the source of truth. ``log`` appends one line to ``metrics.jsonl`` and returns; one background thread reads the file and
delivers what is new to MLflow, in order, trying again for as long as the run lives. Everything else MLflow is to know (parameters, tags,
artifacts, the final status) and the position reached in the file are kept in ``.mlflow_delivery.json``, so that a later process can
finish the work: a resumed run does so by itself, and after a run has ended ``python -m cfvlm_ds.tracking RUN_DIR`` does.

Nothing is delivered twice. MLflow's stores identify a point by (run, name, step, timestamp, value) and ignore a second copy, and the
timestamp is the one in the file, so a batch whose answer was lost is simply sent again. A process that continues a run asks the server
which steps it has and skips those: a step that is computed again after a resume keeps, in MLflow, the value first recorded.

Where: ``MLFLOW_TRACKING_URI`` if set, else ``mlflow.db`` and ``mlartifacts/`` in the run folder, which is what ``mlflow ui`` shows when
started in that folder (MLflow >= 3.7). ``MLFLOW_EXPERIMENT_NAME`` overrides the experiment. When tracking starts, the variables in
``ENVIRONMENT`` get a default unless they are set; they hold for the whole process, since MLflow has no other way to bound a request.

MLflow is imported in the background thread (2-3 s); importing this module costs nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cfvlm_ds.core.files import Lines
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, last_values, now_ms, parse_line, say, truncate_metrics
from cfvlm_ds.tracking.mlflow_delivery import Delivery
from cfvlm_ds.tracking.run_description import RECORD_FILE, Record, Status


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
    """Start tracking: a ``Tracker`` where ``enabled`` (rank 0), else an object with the same methods that does nothing.

    Args:
        run_dir: the run's folder, of one run at a time; made if missing.
        experiment, run_name: names in MLflow (``MLFLOW_EXPERIMENT_NAME`` overrides the first).
        params: nested mapping; MLflow gets it flattened with dots and cut at its length limits, and whole as an artifact in ``config/``.
            Secrets are masked (``cfvlm_ds.core.secrets.masked``). On resume a changed value becomes a tag ``param_changed.<name>``, since
            MLflow's parameters are immutable.
        tags: plain strings, masked likewise.
        run_id: the MLflow run to continue, as kept in a checkpoint. The run folder's own record comes first, being at least as new.
        resume_step: None starts a new run in ``run_dir`` and discards the metrics of an earlier one there. A step continues: metrics of
            later steps are dropped from ``metrics.jsonl``, to be logged again.
        mlflow: False keeps the metrics in ``metrics.jsonl`` alone; ``deliver`` can bring them to MLflow later.
        close_timeout: the most seconds that ``close`` waits for MLflow.
        inputs: the data sets, see cfvlm_ds.tracking.run_description.INPUT; one that the run has already is not logged again. Masked too.

    Raises:
        ValueError: a run id without a step to resume at.
        OSError: metrics of another start cannot be taken out of ``metrics.jsonl``. Any other trouble, with a full disk or with MLflow, is
            reported on stderr and never raised.
    """
    if not enabled:
        return NullTracker()
    if run_id is not None and resume_step is None:
        raise ValueError("a run id without resume_step: pass the step of the checkpoint that the run continues from")
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    if resume_step is None:
        (run_dir / RECORD_FILE).unlink(missing_ok=True)
    record = Record.load(run_dir) or Record(run_id=run_id, start_ms=now_ms())
    kept_names, offset = truncate_metrics(run_dir / METRICS_FILE, resume_step, record.offset)
    record.delivered_to(offset)
    named = without_secrets(os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment)
    shown = [{name: without_secrets(value) if isinstance(value, str) else value for name, value in each.items()} for each in inputs]
    record.begin(named, without_secrets(run_name), masked(params), masked(tags), shown, resume_step)
    if problem := record.kept(run_dir):
        say(f"{problem}: the run goes on, and it is tried again with every delivery")
    return Tracker(run_dir, record, kept_names, mlflow, close_timeout)


def going_on(run_dir: Path, experiment: str) -> tuple[dict[str, float], int] | None:
    """The last values, and the last step, of the run that a folder has in an experiment; None where a new one begins there."""
    record = Record.load(Path(run_dir).absolute())
    if record is None or record.experiment != without_secrets(os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment):
        return None
    return last_values(Path(run_dir) / METRICS_FILE)


class NullTracker:
    """The tracker of the other ranks: does nothing and touches no file."""

    run_id: str | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:
        """Nothing."""

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class Tracker:
    """Writes a run's metrics to ``metrics.jsonl`` and has them delivered to MLflow. Made by ``open_tracker``.

    As a context manager it marks the run FAILED when left by an exception, KILLED by KeyboardInterrupt or a non-zero SystemExit, else
    FINISHED, and lets the exception pass.
    """

    def __init__(self, run_dir: Path, record: Record, kept_names: set[str], mlflow: bool, close_timeout: float) -> None:
        self._kept_names, self._close_timeout = kept_names, close_timeout
        self._lines = Lines(run_dir / METRICS_FILE, say)
        self._delivery = Delivery(run_dir, record, wanted=mlflow)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, to be kept in checkpoints; None until MLflow has answered for the first time."""
        return self._delivery.record.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an optimizer step to ``metrics.jsonl``; returns without waiting for MLflow.

        What the disk does not take waits in memory, with a warning, and goes to the file in order as soon as it does.

        Raises:
            ValueError: a metric named "step" or "time", or a closed tracker. TypeError: a value that is not a number.
        """
        line: dict[str, Any] = {"step": int(step), "time": now_ms() / 1000}
        for name, value in metrics.items():
            if name in ("step", "time"):
                raise ValueError(f"{name!r} is reserved in {METRICS_FILE}: give the metric another name")
            if step == self._delivery.record.resume_step and name in self._kept_names:
                continue  # such as the evaluation at a checkpoint's step, logged before the interruption and computed again
            number = float(value)
            line[name] = number if math.isfinite(number) else str(number)
        if self._lines.closed:
            raise ValueError("this tracker is closed")
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
