"""The delivery of a run folder's record and metrics to MLflow, by a thread of its own that tries again for as long as the run lives."""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import keep, put_in_place
from cfvlm_ds.core.verbosity import shows_progress
from cfvlm_ds.tracking.inputs import log_inputs
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, now_ms, read_metrics, say
from cfvlm_ds.tracking.run_description import RECORD_FILE, Record, Status

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the thread below tries again itself, and can be stopped while it waits
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow prints the URI with its password
    "MLFLOW_DISABLE_TELEMETRY": "true",  # usage statistics that MLflow sends to its makers
}


_POLL_SECONDS = 1.0


_MAX_BACKOFF_SECONDS = 30.0


_CLOSING_BACKOFF_SECONDS = 2.0


_MAX_PER_REQUEST = {"metrics": 1000, "params": 100, "tags": 100}


_MAX_PARAM_CHARS, _MAX_TAG_CHARS, _MAX_NAME_CHARS = 6000, 5000, 250


_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


_TOKEN_TAG = "cfvlm_ds.run_token"


_UNFIT_FOR_A_NAME = re.compile(r"[^\w\-./: ]")


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


def deliver(run_dir: Path, timeout: float = 600.0) -> bool:
    """Deliver what MLflow lacks of a run that has ended, waiting at most ``timeout`` seconds; True when nothing is left to deliver.

    It also copies a run kept in its own folder to the server in ``MLFLOW_TRACKING_URI``. A run that was never closed becomes KILLED.
    Not for a run that still lives: two processes would write one record. Raises FileNotFoundError for a folder without a record.
    """
    run_dir = Path(run_dir).absolute()
    record = Record.load(run_dir)
    if record is None:
        raise FileNotFoundError(f"{run_dir / RECORD_FILE}: no record of a tracked run; pass the run's own folder")
    if record.status is None:
        written = run_dir / METRICS_FILE
        record.end("KILLED", int((written if written.exists() else run_dir / RECORD_FILE).stat().st_mtime * 1000))
    return Delivery(run_dir, record).finish(record.status or "KILLED", record.end_ms or now_ms(), timeout)


class Delivery:
    """The background thread that brings a record and a metrics file to MLflow. MlflowClient only: no global MLflow state is touched."""

    def __init__(self, run_dir: Path, record: Record, wanted: bool = True) -> None:
        self.record = record
        self._run_dir = run_dir
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir / 'mlflow.db').as_posix()}"
        self._lock = threading.Lock()  # guards the record; never held during a request
        self._closing, self._stop = threading.Event(), threading.Event()
        self._client: Any = None
        self._system_metrics: SystemMetrics | None = None
        self._steps_on_server: dict[str, set[int]] | None = None  # by metric; None: this process has created the run
        self._done, self._unsaved = not wanted, False
        self._thread = threading.Thread(target=self._run, name="cfvlm_ds-tracking", daemon=True)
        if wanted:
            self._thread.start()

    def add_artifact(self, path: str, folder: str) -> None:
        if Path(path).is_relative_to(self._run_dir):  # where it is found again when the folder has been moved
            path = str(Path(path).relative_to(self._run_dir))
        with self._lock:
            self.record.add_artifact(path, folder)
            self._save()

    def _save(self) -> None:
        """Keep the record, under its lock; a disk that does not take it costs the run nothing."""
        if (error := self.record.kept(self._run_dir)) is not None and not self._unsaved:
            say(f"{error}: how far MLflow got is known to this process alone until it can")
        self._unsaved = error is not None

    def finish(self, status: Status, end_ms: int, timeout: float) -> bool:
        with self._lock:
            self.record.end(status, end_ms)
            self._save()
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._stop.set()
        if not self._done:
            try:
                points, _ = read_metrics(self._run_dir / METRICS_FILE, self.record.offset, limit=sys.maxsize)
            except OSError as error:
                points = []
                say(f"{self._run_dir / METRICS_FILE} cannot be read ({error})")
            artifacts = sum(artifact["pending"] for artifact in self.record.artifacts)
            say(
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
                    say("MLflow answers again")
                failures = 0
            except (ImportError, ConfigError) as error:
                say(f"no MLflow, metrics go to {METRICS_FILE} only: {error}")
                return
            except Exception as error:  # whatever a store raises, the training must live
                failures += 1
                if failures == 1:
                    say(f"MLflow at {self._uri} does not answer, will try again; metrics are kept in {METRICS_FILE} ({_first_line(error)})")
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
            send(self._client, self.record.run_id, "metrics", self._system_metrics.sample() if self._system_metrics else [])
        elif status == "SCHEDULED":  # no end time
            self._client.update_run(self.record.run_id, status=status)
        else:  # before the artifacts, which an unfit artifact store may refuse for ever
            self._client.set_terminated(self.record.run_id, status, self.record.end_ms)
        self._deliver_artifacts()
        self._done = status is not None

    def _connect(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        client_class = _client_class(self._run_dir)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial database tables..."
        _make_store(self._uri)
        client = client_class(tracking_uri=self._uri)
        run = self._find_run(client) or self._create_run(client)
        self._client = client
        try:
            self._describe(run)
        except Exception:
            self._client = None
            raise
        self._system_metrics = SystemMetrics(run.info.run_id, run.info.start_time, self._uri)
        if shows_progress():
            say(f"MLflow run {run.info.run_id} at {self._uri}, experiment {self.record.experiment!r}")

    def _find_run(self, client: Any) -> Any:
        """The run that exists already, set to RUNNING; None if there is none. A run unknown to this server is delivered again."""
        from mlflow.exceptions import MlflowException

        run = None
        if self.record.run_id is not None:
            try:
                run = client.get_run(self.record.run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", *_REFUSED) or self.record.run_id not in str(error):
                    raise
            if run is None or run.info.lifecycle_stage == "deleted":
                say(f"MLflow at {self._uri} has no run {self.record.run_id}: a new one gets all that is in {METRICS_FILE}")
                with self._lock:
                    self.record.start_over()
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
        """Parameters, tags, data sets and the full configuration; then the run id counts as known."""
        from mlflow.entities import Param, RunTag

        run_id = run.info.run_id
        params = {_name(name): text[:_MAX_PARAM_CHARS] for name, text in _flat(self.record.params).items()}
        tags = {_name(name): text[:_MAX_TAG_CHARS] for name, text in _flat(self.record.tags).items()}
        changed = {name: text for name, text in params.items() if run.data.params.get(name, text) != text}
        tags.update({_name(f"param_changed.{name}"): text[:_MAX_TAG_CHARS] for name, text in changed.items()})
        send(self._client, run_id, "params", [Param(name, text) for name, text in params.items() if name not in run.data.params])
        send(self._client, run_id, "tags", [RunTag(name, text) for name, text in tags.items()])
        log_inputs(self._client, run, self.record.inputs)
        suffix = f"_resumed_at_{self.record.resume_step}" if self.record.resume_step else ""  # at 0 it is still the run's beginning
        with self._lock:
            self.record.known_as(run_id)
        if keep(config := self._run_dir / f"params{suffix}.json", json.dumps(self.record.params, indent=2), say):
            self.add_artifact(str(config), "config")

    def _deliver_metrics(self) -> bool:
        """Send the next part of metrics.jsonl; True if there was any."""
        from mlflow.entities import Metric

        points, offset = read_metrics(self._run_dir / METRICS_FILE, self.record.offset, _MAX_PER_REQUEST["metrics"])
        metrics = [
            Metric(_name(name), value, milliseconds, step)
            for name, value, milliseconds, step in points
            if not self._is_on_server(_name(name), step)
        ]
        send(self._client, self.record.run_id, "metrics", metrics)
        if offset == self.record.offset:
            return False
        with self._lock:
            self.record.delivered_to(offset)
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
                say(f"{path} is gone before MLflow got it")
            with self._lock:  # an artifact that changed meanwhile has a new entry, still pending
                artifact["pending"] = False
                self._save()


def _client_class(run_dir: Path) -> Any:
    """MLflow's client. Raises ConfigError where a run folder has no address as a database, or MLflow finds no home."""
    folder = str(run_dir)
    if not os.environ.get("MLFLOW_TRACKING_URI") and ("?" in folder or unquote(folder) != folder):
        raise ConfigError(f"the address of a database in {folder} cannot have its ? or %; set MLFLOW_TRACKING_URI, or rename the folder")
    try:
        from mlflow import MlflowClient
    except RuntimeError as error:  # Path.home()
        raise ConfigError(f"{error} MLflow needs one: set HOME to a folder that may be written") from error
    return MlflowClient


def send(client: Any, run_id: str | None, kind: Literal["metrics", "params", "tags"], entities: list[Any]) -> None:
    """log_batch in requests of permitted size. What MLflow refuses is named and left out, so that it does not hold up the rest."""
    from mlflow.exceptions import MlflowException

    size = min(_MAX_PER_REQUEST[kind], len(entities)) or 1
    for start in range(0, len(entities), size):
        part = entities[start : start + size]
        batch: dict[str, list[Any]] = {"metrics": [], "params": [], "tags": []}
        try:
            client.log_batch(run_id, **{**batch, kind: part}, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            if len(part) == 1:
                say(f"MLflow refuses {kind[:-1]} {part[0].key!r}: {_first_line(error)}")
            else:
                for entity in part:
                    send(client, run_id, kind, [entity])


class SystemMetrics:
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
            say(f"no more system metrics: {_first_line(error)}")
            return []
        now = now_ms()
        return [Metric(f"system/{name}", value, now, (now - self._start_ms) // 1000) for name, value in values.items()]


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


def _make_store(uri: str) -> None:
    """A local store with all of its tables, or none: MLflow refuses one whose making was cut off, at every later start."""
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    made = path.with_name(path.name + ".tmp")
    made.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{made.as_posix()}").search_experiments()
    put_in_place(made, path, path.with_name(path.name + ".old.tmp"))
