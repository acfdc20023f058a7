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

import contextlib
import dataclasses
import importlib
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cfvlm_ds.errors import masked, tell, unwritten, without_secrets
from cfvlm_ds.reading import MAX_RECORD, open_regular, parse_json, read_bytes
from cfvlm_ds.run_files import Lines, keep, replace

METRICS_FILE = "metrics.jsonl"
RECORD_FILE = ".mlflow_delivery.json"
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread below tries again itself, and can be stopped while it waits
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow prints the URI with its password
    "MLFLOW_DISABLE_TELEMETRY": "true",  # usage statistics that MLflow sends to its makers
}

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]

_POLL_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 30.0
_CLOSING_BACKOFF_SECONDS = 2.0
_MAX_PER_REQUEST = {"metrics": 1000, "params": 100, "tags": 100}
_MAX_PARAM_CHARS, _MAX_TAG_CHARS, _MAX_NAME_CHARS = 6000, 5000, 250
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_TOKEN_TAG = "cfvlm_ds.run_token"

_UNFIT_FOR_A_NAME = re.compile(r"[^\w\-./: ]")


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
) -> Tracker | NullTracker:
    """Start tracking: a ``Tracker`` where ``enabled`` (rank 0), else an object with the same methods that does nothing.

    Args:
        run_dir: the run's folder, of one run at a time; made if missing.
        experiment, run_name: names in MLflow (``MLFLOW_EXPERIMENT_NAME`` overrides the first).
        params: nested mapping; MLflow gets it flattened with dots and cut at its length limits, and whole as an artifact in ``config/``.
            Secrets are masked (``cfvlm_ds.errors.masked``). On resume a changed value becomes a tag ``param_changed.<name>``, since
            MLflow's parameters are immutable.
        tags: plain strings, masked likewise.
        run_id: the MLflow run to continue, as kept in a checkpoint. The run folder's own record comes first, being at least as new.
        resume_step: None starts a new run in ``run_dir`` and discards the metrics of an earlier one there. A step continues: metrics of
            later steps are dropped from ``metrics.jsonl``, to be logged again.
        mlflow: False keeps the metrics in ``metrics.jsonl`` alone; ``deliver`` can bring them to MLflow later.
        close_timeout: the most seconds that ``close`` waits for MLflow.

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
    record = _Record.load(run_dir) or _Record(run_id=run_id, start_ms=_now_ms())
    kept_names, record.offset = _truncate_metrics(run_dir / METRICS_FILE, resume_step, record.offset)
    record.experiment = without_secrets(os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment)
    record.run_name = without_secrets(run_name)
    record.params, record.tags = masked(params), masked(tags)
    record.resume_step, record.status, record.end_ms = resume_step, None, None
    if problem := record.kept(run_dir):
        _say(f"{problem}: the run goes on, and it is tried again with every delivery")
    return Tracker(run_dir, record, kept_names, mlflow, close_timeout)


def import_mlflow() -> threading.Thread:
    """Begin to import MLflow (2-3 s), which touches no run; the thread that does it, to be joined before data workers are forked."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    thread = threading.Thread(target=_import, name="cfvlm_ds-import", daemon=True)
    thread.start()
    return thread


def _import() -> None:
    with contextlib.suppress(Exception):  # what is wrong with it is reported where it is used
        for name in _IMPORTED:
            importlib.import_module(name)


_IMPORTED = ("mlflow", "mlflow.store.tracking.rest_store", "mlflow.store.tracking.sqlalchemy_store")  # and what they import


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

    def __init__(self, run_dir: Path, record: _Record, kept_names: set[str], mlflow: bool, close_timeout: float) -> None:
        self._kept_names, self._close_timeout = kept_names, close_timeout
        self._lines = Lines(run_dir / METRICS_FILE, _say)
        self._delivery = _Delivery(run_dir, record, wanted=mlflow)

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
        line: dict[str, Any] = {"step": int(step), "time": _now_ms() / 1000}
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
            steps = sorted(row["step"] for row in (_parse(line.encode() + b"\n") for line in lost) if row is not None)
            span = f" (steps {steps[0]} to {steps[-1]})" if steps else ""
            _say(f"{len(lost)} records of metrics{span} are lost: {self._lines.path} could not be written to the end")
        self._delivery.finish(status, _now_ms(), self._close_timeout if timeout is None else timeout)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "FAILED")


def deliver(run_dir: Path, timeout: float = 600.0) -> bool:
    """Deliver what MLflow lacks of a run that has ended, waiting at most ``timeout`` seconds; True when nothing is left to deliver.

    It also copies a run kept in its own folder to the server in ``MLFLOW_TRACKING_URI``. A run that was never closed becomes KILLED.
    Not for a run that still lives: two processes would write one record. Raises FileNotFoundError for a folder without a record.
    """
    run_dir = Path(run_dir).absolute()
    record = _Record.load(run_dir)
    if record is None:
        raise FileNotFoundError(f"{run_dir / RECORD_FILE}: no record of a tracked run; pass the run's own folder")
    if record.status is None:
        written = run_dir / METRICS_FILE
        record.status, record.end_ms = "KILLED", int((written if written.exists() else run_dir / RECORD_FILE).stat().st_mtime * 1000)
    return _Delivery(run_dir, record).finish(record.status, record.end_ms or _now_ms(), timeout)


@dataclass
class _Record:
    """What MLflow is to know besides the metrics, and how far delivery got; on disk so that another process can go on."""

    experiment: str = ""
    run_name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Finds the run again when the answer to its creation was lost."""
    run_id: str | None = None
    start_ms: int = 0
    resume_step: int | None = None
    offset: int = 0
    """Bytes of metrics.jsonl that have been delivered."""
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    status: Status | None = None
    end_ms: int | None = None

    @classmethod
    def load(cls, run_dir: Path) -> _Record | None:
        """None where there is none, and where a power loss has left something else in its place."""
        path = run_dir / RECORD_FILE
        try:
            record = cls(**parse_json(read_bytes(path, MAX_RECORD).decode()))
            whole = all(isinstance(getattr(record, name), kinds) for name, kinds in _KINDS.items())
            whole = whole and record.offset >= 0 and all(artifact.keys() == {"path", "folder", "pending"} for artifact in record.artifacts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            _say(f"{path} is damaged and left aside; what MLflow has is asked of it where a checkpoint knows the run")
            return None
        foreign = [each for each in record.artifacts if not _inside(run_dir, each["path"])]
        if any(each["pending"] for each in foreign):
            _say(f"{path} lists files that are not the run's, such as {foreign[0]['path']}; MLflow does not get them")
        record.artifacts = [each for each in record.artifacts if each not in foreign]
        return record

    def kept(self, run_dir: Path) -> str | None:
        """Write it; why it could not be written, or None."""
        path = run_dir / RECORD_FILE
        try:
            replace(path, json.dumps(dataclasses.asdict(self), indent=1).encode())
        except OSError as error:
            return unwritten(path, error)
        return None


def _inside(run_dir: Path, path: Any) -> bool:
    """Whether a file is of the run folder, links followed: a record may be somebody else's, and list a private key."""
    try:
        return (run_dir / path).resolve().is_relative_to(run_dir.resolve())
    except (OSError, ValueError, TypeError, RuntimeError):
        return False


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("experiment", "run_name", "token"), str),
    **dict.fromkeys(("params", "tags"), dict),
    **dict.fromkeys(("run_id", "status"), (str, type(None))),
    **dict.fromkeys(("resume_step", "end_ms"), (int, type(None))),
    **dict.fromkeys(("start_ms", "offset"), int),
    "artifacts": list,
}


class _Delivery:
    """The background thread that brings a record and a metrics file to MLflow. MlflowClient only: no global MLflow state is touched."""

    def __init__(self, run_dir: Path, record: _Record, wanted: bool = True) -> None:
        self.record = record
        self._run_dir = run_dir
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir / 'mlflow.db').as_posix()}"
        self._lock = threading.Lock()  # guards the record; never held during a request
        self._closing, self._stop = threading.Event(), threading.Event()
        self._client: Any = None
        self._system_metrics: _SystemMetrics | None = None
        self._steps_on_server: dict[str, set[int]] | None = None  # by metric; None: this process has created the run
        self._done, self._unsaved = not wanted, False
        self._thread = threading.Thread(target=self._run, name="cfvlm_ds-tracking", daemon=True)
        if wanted:
            self._thread.start()

    def add_artifact(self, path: str, folder: str) -> None:
        if Path(path).is_relative_to(self._run_dir):  # where it is found again when the folder has been moved
            path = str(Path(path).relative_to(self._run_dir))
        with self._lock:
            others = [a for a in self.record.artifacts if (a["path"], a["folder"]) != (path, folder)]
            self.record.artifacts = [*others, {"path": path, "folder": folder, "pending": True}]
            self._save()

    def _save(self) -> None:
        """Keep the record, under its lock; a disk that does not take it costs the run nothing."""
        if (error := self.record.kept(self._run_dir)) is not None and not self._unsaved:
            _say(f"{error}: how far MLflow got is known to this process alone until it can")
        self._unsaved = error is not None

    def finish(self, status: Status, end_ms: int, timeout: float) -> bool:
        with self._lock:
            self.record.status, self.record.end_ms = status, end_ms
            self._save()
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._stop.set()
        if not self._done:
            try:
                points, _ = _read_metrics(self._run_dir / METRICS_FILE, self.record.offset, limit=sys.maxsize)
            except OSError as error:
                points = []
                _say(f"{self._run_dir / METRICS_FILE} cannot be read ({error})")
            artifacts = sum(artifact["pending"] for artifact in self.record.artifacts)
            _say(
                f"MLflow at {self._uri} did not get {len(points)} points, {artifacts} artifacts and the status {status} in {timeout:g} s. "
                f"All is kept in {self._run_dir}. To deliver it later: python -m cfvlm_ds.tracking {shlex.quote(str(self._run_dir))}"
            )
        return self._done

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._deliver_everything()
                if failures:
                    _say("MLflow answers again")
                failures = 0
            except ImportError as error:
                _say(f"no MLflow, metrics go to {METRICS_FILE} only: {error}")
                return
            except Exception as error:  # whatever a store raises, the training must live
                failures += 1
                if failures == 1:
                    _say(
                        f"MLflow at {self._uri} does not answer, will try again; metrics are kept in {METRICS_FILE} ({_first_line(error)})"
                    )
            if self._done:
                return
            backoff = min(_POLL_SECONDS * 2**failures, _MAX_BACKOFF_SECONDS)
            if self._closing.is_set():
                self._stop.wait(min(backoff, _CLOSING_BACKOFF_SECONDS) if failures else 0)
            else:
                self._closing.wait(backoff if failures else _POLL_SECONDS)

    def _deliver_everything(self) -> None:
        status = self.record.status  # read first: once it is set, metrics.jsonl is complete
        if self._client is None:
            self._connect()
        while self._deliver_metrics():
            pass
        if status is None:
            self._send(self.record.run_id, "metrics", self._system_metrics.sample() if self._system_metrics else [])
        elif status == "SCHEDULED":  # no end time
            self._client.update_run(self.record.run_id, status=status)
        else:  # before the artifacts, which an unfit artifact store may refuse for ever
            self._client.set_terminated(self.record.run_id, status, self.record.end_ms)
        self._deliver_artifacts()
        self._done = status is not None

    def _connect(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial database tables..."
        client = MlflowClient(tracking_uri=self._uri)
        run = self._find_run(client) or self._create_run(client)
        self._client = client
        try:
            self._describe(run)
        except Exception:
            self._client = None
            raise
        self._system_metrics = _SystemMetrics(run.info.run_id, run.info.start_time, self._uri)
        _say(f"MLflow run {run.info.run_id} at {self._uri}, experiment {self.record.experiment!r}")

    def _find_run(self, client: Any) -> Any:
        """The run that exists already, set to RUNNING; None if there is none. A run unknown to this server is delivered anew."""
        from mlflow.exceptions import MlflowException

        run = None
        if self.record.run_id is not None:
            try:
                run = client.get_run(self.record.run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", *_REFUSED) or self.record.run_id not in str(error):
                    raise
            if run is None or run.info.lifecycle_stage == "deleted":
                _say(f"MLflow at {self._uri} has no run {self.record.run_id}: a new one gets all that is in {METRICS_FILE}")
                with self._lock:
                    self.record.tags = {**self.record.tags, "continues_run": self.record.run_id}
                    self.record.run_id, self.record.offset, self.record.token = None, 0, uuid.uuid4().hex
                    self.record.artifacts = [{**artifact, "pending": True} for artifact in self.record.artifacts]
                run = None
        else:
            experiment = client.get_experiment_by_name(self.record.experiment)
            if experiment is not None:
                found = client.search_runs([experiment.experiment_id], f"tags.`{_TOKEN_TAG}` = '{self.record.token}'", max_results=1)
                run = found[0] if found else None
        if run is not None:
            self._steps_on_server = {}
            if self.record.status is None:
                client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _create_run(self, client: Any) -> Any:
        experiment = client.get_experiment_by_name(self.record.experiment)
        if experiment is None:
            local = None if os.environ.get("MLFLOW_TRACKING_URI") else (self._run_dir / "mlartifacts").as_uri()
            experiment_id = client.create_experiment(self.record.experiment, artifact_location=local)
        else:
            experiment_id = experiment.experiment_id
        return client.create_run(experiment_id, self.record.start_ms, {_TOKEN_TAG: self.record.token}, self.record.run_name)

    def _describe(self, run: Any) -> None:
        """Parameters, tags and the full configuration; then the run id counts as known."""
        from mlflow.entities import Param, RunTag

        run_id = run.info.run_id
        params = {_name(name): text[:_MAX_PARAM_CHARS] for name, text in _flat(self.record.params).items()}
        tags = {_name(name): text[:_MAX_TAG_CHARS] for name, text in _flat(self.record.tags).items()}
        changed = {name: text for name, text in params.items() if run.data.params.get(name, text) != text}
        tags.update({_name(f"param_changed.{name}"): text[:_MAX_TAG_CHARS] for name, text in changed.items()})
        self._send(run_id, "params", [Param(name, text) for name, text in params.items() if name not in run.data.params])
        self._send(run_id, "tags", [RunTag(name, text) for name, text in tags.items()])
        suffix = f"_resumed_at_{self.record.resume_step}" if self.record.resume_step else ""  # at 0 it is still the run's beginning
        with self._lock:
            self.record.run_id = run_id
        if keep(config := self._run_dir / f"params{suffix}.json", json.dumps(self.record.params, indent=2), _say):
            self.add_artifact(str(config), "config")

    def _deliver_metrics(self) -> bool:
        """Send the next part of metrics.jsonl; True if there was any."""
        from mlflow.entities import Metric

        points, offset = _read_metrics(self._run_dir / METRICS_FILE, self.record.offset, _MAX_PER_REQUEST["metrics"])
        metrics = [
            Metric(_name(name), value, milliseconds, step)
            for name, value, milliseconds, step in points
            if not self._is_on_server(_name(name), step)
        ]
        self._send(self.record.run_id, "metrics", metrics)
        if offset == self.record.offset:
            return False
        with self._lock:
            self.record.offset = offset
            self._save()
        return True

    def _is_on_server(self, name: str, step: int) -> bool:
        if self._steps_on_server is None:
            return False
        if name not in self._steps_on_server:
            history = self._client.get_metric_history(self.record.run_id, name)
            self._steps_on_server[name] = {metric.step for metric in history}
        return step in self._steps_on_server[name]

    def _deliver_artifacts(self) -> None:
        for artifact in self.record.artifacts:
            if not artifact["pending"]:
                continue
            if (path := self._run_dir / artifact["path"]).exists():
                self._client.log_artifact(self.record.run_id, str(path), artifact["folder"] or None)
            else:
                _say(f"{path} is gone before MLflow got it")
            with self._lock:  # an artifact that changed meanwhile has a new entry, still pending
                artifact["pending"] = False
                self._save()

    def _send(self, run_id: str | None, kind: Literal["metrics", "params", "tags"], entities: list[Any]) -> None:
        """log_batch in requests of permitted size. What MLflow refuses is named and left out, so that it does not hold up the rest."""
        from mlflow.exceptions import MlflowException

        size = min(_MAX_PER_REQUEST[kind], len(entities)) or 1
        for start in range(0, len(entities), size):
            part = entities[start : start + size]
            batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}
            try:
                self._client.log_batch(run_id, **{**batch, kind: part}, synchronous=True)
            except MlflowException as error:
                if error.error_code not in _REFUSED:
                    raise
                if len(part) == 1:
                    _say(f"MLflow refuses {kind[:-1]} {part[0].key!r}: {_first_line(error)}")
                else:
                    for entity in part:
                        self._send(run_id, kind, [entity])


class _SystemMetrics:
    """Samples of MLflow's own monitor (CPU, memory, disk, network, GPU), as ``system/...``.

    Not its thread: that one gives up for good at the first request that fails. The step is the seconds since the start of the run, which
    grows across resumes.
    """

    def __init__(self, run_id: str, start_ms: int, uri: str) -> None:
        self._run_id, self._start_ms, self._uri = run_id, start_ms, uri
        self._monitor: Any = None
        self._next_sample = 0.0

    def sample(self) -> list[Any]:
        """MLflow metrics; none if ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` (10 s) has not passed since the last sample."""
        from mlflow.entities import Metric

        if time.monotonic() < self._next_sample:
            return []
        try:
            if self._monitor is None:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self._monitor = SystemMetricsMonitor(self._run_id, tracking_uri=self._uri)
            self._next_sample = time.monotonic() + self._monitor.sampling_interval
            self._monitor.collect_metrics()
            values = self._monitor.aggregate_metrics()
            for source in self._monitor.monitors:
                source.clear_metrics()
        except Exception as error:  # drivers raise what they like, and this is the least of the metrics
            self._next_sample = math.inf
            _say(f"no more system metrics: {_first_line(error)}")
            return []
        now = _now_ms()
        return [Metric(f"system/{name}", value, now, (now - self._start_ms) // 1000) for name, value in values.items()]


def _read_metrics(path: Path, offset: int, limit: int) -> tuple[list[tuple[str, float, int, int]], int]:
    """(name, value, milliseconds, step) of the lines after ``offset`` bytes, at least ``limit`` points if there are; and where to go on."""
    points: list[tuple[str, float, int, int]] = []
    if not path.exists():
        return points, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            row = _parse(line)
            if not line.endswith(b"\n") or len(points) >= limit:
                break
            offset += len(line)
            if row is not None:
                step, milliseconds = row.pop("step"), round(row.pop("time") * 1000)
                points += [(name, float(value), milliseconds, step) for name, value in row.items()]
    return points, offset


def _truncate_metrics(path: Path, resume_step: int | None, offset: int) -> tuple[set[str], int]:
    """Drop steps after ``resume_step`` (None: all) and torn lines. The names recorded at that step, and where ``offset`` has moved."""
    if not path.exists():
        return set(), 0
    kept: list[bytes] = []
    names: set[str] = set()
    new_offset = position = 0
    with open_regular(path) as file:
        lines = file.read().splitlines(keepends=True)
    for line in lines:
        position += len(line)
        row = _parse(line)
        if resume_step is None or row is None or row["step"] > resume_step:
            continue
        kept.append(line)
        if position <= offset:
            new_offset += len(line)
        if row["step"] == resume_step:
            names |= row.keys()
    if kept != lines[: len(kept)]:
        replace(path, b"".join(kept))
    elif len(kept) < len(lines):
        os.truncate(path, sum(map(len, kept)))  # in place: takes no room
    return names, new_offset


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None if a killed process left it torn, or a disk has damaged it."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
        [float(value) for value in row.values()], round(row["time"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return row if type(row.get("step")) is int else None


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, (list, Mapping)) else str(value)
    return flat


def _name(name: str) -> str:
    return _UNFIT_FOR_A_NAME.sub("_", name)[:_MAX_NAME_CHARS]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _now_ms() -> int:
    return int(time.time() * 1000)


def _say(message: str) -> None:
    tell(f"cfvlm_ds tracking: {message}", error=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cfvlm_ds.tracking RUN_DIR")
    sys.exit(0 if deliver(Path(sys.argv[1])) else 1)
