"""Run tracker: writes metrics to ``metrics.jsonl`` and delivers them from there to MLflow, which can be slow or unreachable.

MLflow receives

- every metric in ``metrics.jsonl``, logged by training/trainer.py, explained in docs/metrics.md and renamed by ``mlflow_names``;
- the run record's parameters, tags and files (training/run_record.py);
- the result tables and figures (training/results.py). The first table and the figures also form the run's description.

The run folder is the source of truth. ``log`` appends one line to ``metrics.jsonl`` and returns. A thread sends new lines to MLflow in
order. ``.mlflow_delivery.json`` holds all other data for MLflow, and the position up to which ``metrics.jsonl`` has been delivered. A
resumed run, or ``cfvlm-ds track RUN`` after a run has ended, can therefore finish the delivery.

No point is recorded twice. MLflow's stores identify a point by (run, name, step, timestamp, value) and ignore duplicates; the timestamp
comes from ``metrics.jsonl``. A process that continues a run skips the steps that the server already has, so a step that is recomputed after
a resume keeps its first value in MLflow.

The destination is ``MLFLOW_TRACKING_URI`` if it is set, otherwise ``mlflow.db`` and ``mlartifacts/`` in the run folder. To view these, run
``mlflow ui`` there. ``MLFLOW_EXPERIMENT_NAME`` overrides the experiment.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from cfvlm_ds.core.journal import Waiting
from cfvlm_ds.core.secrets import masked, without_secrets
from cfvlm_ds.tracking.hooks import Hooks
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, now_ms, parse_line, say, truncate_metrics
from cfvlm_ds.tracking.mlflow_delivery import RECORD_FILE, Delivery, DeliveryRecord, Status


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
    also: Sequence[str] = (),
) -> Tracker | NullTracker:
    """Start tracking and return a ``Tracker`` if ``enabled`` (rank 0), else a ``NullTracker``, which does nothing.

    Args:
        run_dir: folder of the run; created if missing.
        experiment, run_name: names in MLflow (``MLFLOW_EXPERIMENT_NAME`` overrides ``experiment``).
        params: nested mapping. For MLflow, nested names are joined with dots, values are truncated to MLflow's length limits, and values
            of None are left out. Secrets are masked, as in tags and inputs. On resume, a changed value becomes a tag
            ``param_changed.<name>``, because MLflow's parameters are immutable.
        tags: tags of the MLflow run.
        run_id: MLflow run to continue, as stored in a checkpoint. The record in the run folder takes precedence.
        resume_step: step that a run continues from. Metrics of later steps are removed from ``metrics.jsonl``, because they will be logged
            again. None starts a new run and discards earlier metrics in ``run_dir``.
        mlflow: if False, metrics are written only to ``metrics.jsonl``; ``deliver`` can send them later.
        close_timeout: maximum time in seconds that ``close`` waits for MLflow.
        inputs: data sets, each a dict with the keys in cfvlm_ds.tracking.mlflow_delivery.INPUT. Data sets that MLflow's run already has are
            not logged again.
        also: additional trackers: ``tensorboard`` or MODULE:CLASS (see cfvlm_ds.tracking.hooks.Hook).

    Raises:
        OSError: ``metrics.jsonl`` cannot be truncated. Any other disk or MLflow problem is reported on stderr, not raised.
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
        experiment=without_secrets(os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment),
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
        say(f"{problem}: the run continues, and every delivery tries again")
    hooks = Hooks(also, run_dir, masked(params), resume_step or 0)
    return Tracker(Waiting(run_dir / METRICS_FILE, say), Delivery(run_dir, record, enabled=mlflow), hooks, kept_names, close_timeout)


class NullTracker:
    """Tracker for ranks other than rank 0. It does nothing and touches no file."""

    run_id: str | None = None

    def log(self, *arguments: Any, **options: Any) -> None:
        """Do nothing, like ``artifact``, ``describe`` and ``close``."""

    artifact = describe = close = __exit__ = log

    def __enter__(self) -> NullTracker:
        return self


@dataclass(frozen=True)
class Tracker:
    """Writes metrics to ``metrics.jsonl`` and delivers them from there to MLflow. Created by ``open_tracker``.

    As a context manager, it marks the run KILLED after KeyboardInterrupt or a non-zero SystemExit, FAILED after any other exception, and
    FINISHED otherwise. The exception is not suppressed.
    """

    lines: Waiting
    delivery: Delivery
    hooks: Hooks
    kept_names: set[str]
    close_timeout: float

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, to be stored in checkpoints; None until MLflow has answered for the first time."""
        return self.delivery.record.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of an optimizer step to ``metrics.jsonl``, without waiting for MLflow.

        Lines that cannot be written are kept in memory, with a warning, and written in order as soon as possible.

        Raises:
            TypeError: a value is not a number.
        """
        line: dict[str, Any] = {"step": int(step), "time": now_ms() / 1000}
        for name, value in metrics.items():
            if step == self.delivery.record.resume_step and name in self.kept_names:
                continue  # for example, metrics of the evaluation at a checkpoint, which a resumed run repeats
            number = float(value)
            line[name] = number if math.isfinite(number) else str(number)
        self.lines.write(json.dumps(line))
        self.hooks.call("log", int(step), {name: float(value) for name, value in line.items() if name not in ("step", "time")})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Schedule a file for upload to ``folder``. The file is read later, so it must stay in place. Calling this again for the same file
        uploads it again.
        """
        self.delivery.add_artifact(str(Path(path).absolute()), folder)

    def describe(self, text: str) -> None:
        """Set the run's description in MLflow to ``text`` (Markdown). ``RUN_ID`` in the text is replaced by the MLflow run's id."""
        self.delivery.describe(without_secrets(text))

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:
        """Set the final status and wait up to ``timeout`` seconds (default ``close_timeout``) for the delivery to finish.

        A second call does nothing. A run that stopped on request and is to be resumed gets the status SCHEDULED, since MLflow's other
        statuses are for live or ended runs. If MLflow has not received everything, a message on stderr states how many metric values
        and files are missing and which command delivers them.
        """
        if self.lines.closed:
            return
        if lost := self.lines.close():
            steps = sorted(row["step"] for row in (parse_line(line.encode() + b"\n") for line in lost) if row is not None)
            span = f" (steps {steps[0]} to {steps[-1]})" if steps else ""
            say(f"{len(lost)} records of metrics{span} are lost, because {self.lines.path} could not be written")
        self.delivery.finish(status, now_ms(), self.close_timeout if timeout is None else timeout)
        self.hooks.call("close", status)  # last, because a hook may take any time or be killed

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "FAILED")
