"""Delivery of a run folder's data to MLflow, by a thread that retries until the run ends.

MLflow's own asynchronous logging drops a batch if its request fails. The thread therefore sends the batches itself, and advances its
position in metrics.jsonl only after the server has confirmed a batch. training/trainer.py logs the metrics, and training/run_record.py
provides parameters and tags. The delivery record in the run folder contains all other data and the progress of the delivery, so that
another process can finish it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import shlex
import sys
import threading
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from cfvlm_ds.core.errors import ConfigError, first_line, unwritten
from cfvlm_ds.core.files import put_in_place
from cfvlm_ds.core.files import replace as write_whole
from cfvlm_ds.core.options import flat
from cfvlm_ds.core.verbosity import shows_progress
from cfvlm_ds.tracking.metrics_log import METRICS_FILE, read_metrics, say

RECORD_FILE = ".mlflow_delivery.json"

INPUT = ("name", "digest", "source", "context", "groups")
"""Keys of a data set's entry: name in the configuration, digest of its identity, manifest, "training" or "evaluation", number of groups."""

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]


@dataclass(frozen=True)
class DeliveryRecord:
    """Data that a run sends to MLflow (except metrics), and the progress of their delivery.

    Attributes:
        inputs: data sets used since the latest start of the run, each a dict with the keys listed in ``INPUT``.
        token: random id, used to find the run on the server if the response to the create request was lost.
        offset: number of bytes of metrics.jsonl that have been delivered.
        artifacts: maps a file's path (relative if in the run folder) to its ``folder`` in MLflow and to ``pending`` (True until it is
            uploaded).
    """

    experiment: str = ""
    run_name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    start_ms: int = 0
    resume_step: int | None = None
    offset: int = 0
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: Status | None = None
    end_ms: int | None = None

    @classmethod
    def load(cls, run_dir: Path) -> DeliveryRecord | None:
        """Read the record in a run folder. Return None if there is no record, or if it is damaged."""
        path = run_dir / RECORD_FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            say(f"{path} is damaged and ignored; the run's id is taken from its checkpoint, if there is one")
            return None

    def save(self, run_dir: Path) -> str | None:
        """Write the record. Return None, or the reason if it cannot be written."""
        path = run_dir / RECORD_FILE
        try:
            write_whole(path, json.dumps(asdict(self), indent=1).encode())
        except OSError as error:
            return unwritten(path, error)
        return None


ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the delivery thread retries instead, and can be stopped while it waits
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow would print the URI with its password
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_POLL_SECONDS, _MAX_BACKOFF_SECONDS, _CLOSING_BACKOFF_SECONDS = 1.0, 30.0, 2.0
_MAX_PER_REQUEST = {"metrics": 1000, "params": 100, "tags": 100}
_MAX_PARAM_CHARS, _MAX_TAG_CHARS, _MAX_NAME_CHARS, _MAX_DATASET_CHARS = 6000, 5000, 250, 500
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_TOKEN_TAG = "cfvlm_ds.run_token"
_UNFIT_FOR_A_NAME = re.compile(r"[^\w\-./: ]|(?<![^/])\.{0,2}(?![^/])")  # also matches the path segments "", "." and ".."
_FIRST_PAGE = re.compile("loss|learning_rate|grad_norm|throughput/(groups_per_s|mfu)|eval/[^/]+/(covered|cover|yes_ratio)")
"""Metrics that MLflow shows first (``Main/``), in addition to the headline metrics of evaluation sets."""
_HEADLINES = (
    *("f1_macro", "g_acc", "mean_pictures", "individual", "group_macro", "macro", "cv_bench", "perception", "chair", "hallucinated"),
    *("group", "pair", "image_pair", "f1", "accuracy", "factual", "nll"),
)
"""Headline metrics of evaluation sets and benchmarks, in order of priority. The first one that a set has is shown in ``Main/``."""
_OWN_HEADLINES = {"cola": "image", "visual_counterfact": "text", "vsr": "accuracy"}
NOTE, TABLES = "mlflow.note.content", "mlflow.loggedArtifacts"
"""MLflow's tags for a run's description (Markdown), and for JSON files that it shows as tables."""


def import_mlflow() -> threading.Thread:
    """Start a thread that imports MLflow, which takes 2 to 3 s, and return the thread. The caller must join the thread before data workers
    are forked.
    """
    thread = threading.Thread(target=_import, name="cfvlm_ds-import", daemon=True)
    thread.start()
    return thread


def _import() -> None:
    with contextlib.suppress(Exception):  # the delivery reports the error
        for name in ("mlflow", "mlflow.store.tracking.rest_store", "mlflow.store.tracking.sqlalchemy_store"):
            _mlflow(name)


def _mlflow(name: str = "mlflow") -> Any:
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return importlib.import_module(name)


def deliver(run_dir: Path, timeout: float = 600.0) -> bool:
    """Send a finished run's remaining data to MLflow within ``timeout`` seconds, and return whether everything has arrived.

    If ``MLFLOW_TRACKING_URI`` is set, a run that was tracked in its own folder is copied to the server that this variable points to. A run
    whose tracker was never closed gets the status KILLED. Do not call this for a live run, because two processes would write the same
    record. Raises FileNotFoundError if the folder has no record.
    """
    run_dir = Path(run_dir).absolute()
    record = DeliveryRecord.load(run_dir)
    if record is None:
        raise FileNotFoundError(f"{run_dir / RECORD_FILE}: no record of a tracked run; pass the run's own folder")
    if record.status is None:
        metrics = run_dir / METRICS_FILE
        end_ms = int((metrics if metrics.exists() else run_dir / RECORD_FILE).stat().st_mtime * 1000)
        record = replace(record, status="KILLED", end_ms=end_ms)
    return Delivery(run_dir, record).finish(record.status or "KILLED", record.end_ms or 0, timeout)


class Delivery:
    """Sends a record and metrics.jsonl to MLflow in a background thread. It uses only MlflowClient and leaves MLflow's global state
    unchanged.
    """

    def __init__(self, run_dir: Path, record: DeliveryRecord, enabled: bool = True) -> None:
        self.record = record
        self._run_dir = run_dir
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run_dir / 'mlflow.db').as_posix()}"
        self._lock = threading.Lock()  # guards the record; not held during a request
        self._closing, self._stop = threading.Event(), threading.Event()
        self._client: Any = None
        self._steps_on_server: dict[str, set[int]] | None = None  # metric -> steps; None if this process created the run
        self._note: str | None = None  # run description on the server
        self._done, self._unsaved = not enabled, False
        self._thread = threading.Thread(target=self._run, name="cfvlm_ds-tracking", daemon=True)
        if enabled:
            self._thread.start()

    def add_artifact(self, path: str, folder: str) -> None:
        """Schedule a file for upload to ``folder``, even if it has been uploaded before."""
        if Path(path).is_relative_to(self._run_dir):  # a relative path stays valid when the folder is moved
            path = str(Path(path).relative_to(self._run_dir))
        self._change(artifacts={path: {"folder": folder, "pending": True}})

    def describe(self, text: str) -> None:
        """Schedule an update of the run's description to ``text`` (Markdown). ``RUN_ID`` in the text is replaced by the MLflow run's id."""
        self._change(tags={**self.record.tags, NOTE: text})

    def _change(self, artifacts: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Change values in the record, add ``artifacts``, and save the record. A full disk is reported once and does not stop the run."""
        with self._lock:
            self.record = replace(self.record, **values, artifacts={**self.record.artifacts, **(artifacts or {})})
            if (error := self.record.save(self._run_dir)) is not None and not self._unsaved:
                say(f"{error}: until it can be written, only this process knows which data MLflow has")
            self._unsaved = error is not None

    def finish(self, status: Status, end_ms: int, timeout: float) -> bool:
        """Set the final status, wait up to ``timeout`` seconds for the delivery, and return whether everything has arrived."""
        self._change(status=status, end_ms=end_ms)
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._stop.set()
        if not self._done:
            points, _ = read_metrics(self._run_dir / METRICS_FILE, self.record.offset, limit=sys.maxsize)
            artifacts = sum(artifact["pending"] for artifact in self.record.artifacts.values())
            say(
                f"MLflow at {self._uri} did not receive {len(points)} points, {artifacts} artifacts and the status {status} within "
                f"{timeout:g} s. They are kept in {self._run_dir}. To deliver them later: "
                f"cfvlm-ds track {shlex.quote(str(self._run_dir))}"
            )
        return self._done

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set() and not self._done:
            try:
                self._deliver_everything()
                if failures:
                    say("MLflow answers again")
                failures = 0
            except (ImportError, ConfigError) as error:
                say(f"MLflow is not available, so metrics are written only to {METRICS_FILE}: {error}")
                return
            except Exception as error:  # no tracking error may stop the training
                failures += 1
                if failures == 1:
                    say(f"MLflow at {self._uri} does not answer ({first_line(error)}); retrying; metrics are kept in {METRICS_FILE}")
            backoff = min(_POLL_SECONDS * 2**failures, _MAX_BACKOFF_SECONDS)
            if self._closing.is_set():
                self._stop.wait(min(backoff, _CLOSING_BACKOFF_SECONDS) if failures else 0)
            else:
                self._closing.wait(backoff if failures else _POLL_SECONDS)

    def _deliver_everything(self) -> None:
        status = self.record.status  # read first, because metrics.jsonl is complete once the status is set
        if self._client is None:
            self._connect()
        while self._deliver_metrics():
            pass
        note = self.record.tags.get(NOTE)
        if note is not None and note != self._note:
            text = note.replace("RUN_ID", str(self.record.run_id))[:_MAX_TAG_CHARS]
            send(self._client, self.record.run_id, "tags", [_mlflow("mlflow.entities").RunTag(NOTE, text)])
            self._note = note
        if status == "SCHEDULED":  # no end time
            self._client.update_run(self.record.run_id, status=status)
        elif status is not None:  # before the artifacts, which a misconfigured artifact store may refuse forever
            self._client.set_terminated(self.record.run_id, status, self.record.end_ms)
        self._deliver_artifacts()
        self._done = status is not None

    def _connect(self) -> None:
        folder = str(self._run_dir)
        if not os.environ.get("MLFLOW_TRACKING_URI") and ("?" in folder or unquote(folder) != folder):
            raise ConfigError(
                f"the address of a database cannot contain the ? or % in {folder}; set MLFLOW_TRACKING_URI, or rename the folder"
            )
        client_class = _mlflow().MlflowClient
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial database tables..."
        _make_store(self._uri)
        client = client_class(tracking_uri=self._uri)
        if (run := self._find_run(client)) is None:
            if (experiment := client.get_experiment_by_name(self.record.experiment)) is not None:
                number = experiment.experiment_id
            else:
                local = None if os.environ.get("MLFLOW_TRACKING_URI") else (self._run_dir / "mlartifacts").as_uri()
                number = client.create_experiment(self.record.experiment, artifact_location=local)
            run = client.create_run(number, self.record.start_ms, {_TOKEN_TAG: self.record.token}, self.record.run_name)
        self._describe(client, run)
        self._client = client
        if shows_progress():
            say(f"MLflow run {run.info.run_id} at {self._uri}, experiment {self.record.experiment!r}")

    def _find_run(self, client: Any) -> Any:
        """Return the existing run, or None. The status of a run that is not finished is set to RUNNING. If the server no longer has the
        run, everything is sent to a new run.
        """
        record, run = self.record, None
        if record.run_id is not None:
            try:
                run = client.get_run(record.run_id)
            except _mlflow("mlflow.exceptions").MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", *_REFUSED) or record.run_id not in str(error):
                    raise
            if run is None or run.info.lifecycle_stage == "deleted":
                say(f"MLflow at {self._uri} has no run {record.run_id}; everything in {METRICS_FILE} is sent to a new one")
                with self._lock:
                    artifacts = {path: {**artifact, "pending": True} for path, artifact in record.artifacts.items()}
                    tags, token = {**record.tags, "continues_run": record.run_id}, uuid.uuid4().hex
                    self.record = replace(record, tags=tags, run_id=None, offset=0, token=token, artifacts=artifacts)
                run = None
        elif (experiment := client.get_experiment_by_name(record.experiment)) is not None:
            runs = client.search_runs([experiment.experiment_id], f"tags.`{_TOKEN_TAG}` = '{record.token}'", max_results=1)
            run = runs[0] if runs else None
        if run is not None:
            self._steps_on_server = {}
            if record.status is None:
                client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _describe(self, client: Any, run: Any) -> None:
        """Send parameters, tags and data sets, and save the run's id."""
        entities = _mlflow("mlflow.entities")
        run_id = run.info.run_id
        params = {_name(name): text[:_MAX_PARAM_CHARS] for name, text in _texts(self.record.params).items()}
        tags = {_name(name): text[:_MAX_TAG_CHARS] for name, text in _texts(self.record.tags).items() if name != NOTE}
        known, complete = run.data.params, self.record.run_id is not None  # otherwise, only some of the parameters may have arrived
        changed = {name: text for name, text in params.items() if known.get(name, "None" if complete else text) != text}
        tags |= {_name(f"param_changed.{name}"): text[:_MAX_TAG_CHARS] for name, text in changed.items()}
        unknown = [entities.Param(name, text) for name, text in params.items() if name not in known and text != "None"]
        send(client, run_id, "params", unknown)
        send(client, run_id, "tags", [entities.RunTag(name, text) for name, text in tags.items()])
        context = _mlflow("mlflow.utils.mlflow_tags").MLFLOW_DATASET_CONTEXT
        known = {(each.dataset.name, each.dataset.digest, *(tag.value for tag in each.tags)) for each in run.inputs.dataset_inputs}
        new = []
        for each in self.record.inputs:
            name, digest = each["name"][:_MAX_DATASET_CHARS], each["digest"][:36]
            if (name, digest, each["context"]) not in known:
                source, profile = (
                    json.dumps({"uri": each["source"]}),
                    json.dumps({"num_rows": each["groups"]}),
                )
                dataset = entities.Dataset(name=name, digest=digest, source_type="local", source=source, profile=profile)
                new.append(entities.DatasetInput(dataset=dataset, tags=[entities.InputTag(context, each["context"])]))
        if new:
            client.log_inputs(run_id, datasets=new)
        self._change(run_id=run_id)

    def _deliver_metrics(self) -> bool:
        """Send the next part of metrics.jsonl. Return False if there was nothing left to send."""
        metric = _mlflow("mlflow.entities").Metric
        points, offset = read_metrics(self._run_dir / METRICS_FILE, self.record.offset, _MAX_PER_REQUEST["metrics"])
        names = mlflow_names({name for name, *_ in points})
        new = [
            metric(names[name], value, milliseconds, step)
            for name, value, milliseconds, step in points
            if not self._is_on_server(names[name], step)
        ]
        send(self._client, self.record.run_id, "metrics", sorted(new, key=lambda point: point.key.startswith("detail/")))
        if offset == self.record.offset:
            return False
        self._change(offset=offset)
        return True

    def _is_on_server(self, name: str, step: int) -> bool:
        if self._steps_on_server is None:
            return False
        if name not in self._steps_on_server:
            history = self._client.get_metric_history(self.record.run_id, name)
            self._steps_on_server[name] = {metric.step for metric in history}
        return step in self._steps_on_server[name]

    def _deliver_artifacts(self) -> None:
        for path, artifact in self.record.artifacts.items():
            if not artifact["pending"]:
                continue
            if (file := self._run_dir / path).exists():
                self._client.log_artifact(self.record.run_id, str(file), artifact["folder"] or None)
            else:
                say(f"{file} was deleted before it was sent to MLflow")
            if self.record.artifacts[path] is artifact:  # otherwise the file has changed in the meantime and is uploaded again
                self._change(artifacts={path: {**artifact, "pending": False}})


def send(client: Any, run_id: str | None, kind: Literal["metrics", "params", "tags"], entities: list[Any]) -> None:
    """Log entities (metrics, parameters or tags) in batches no larger than MLflow permits. An entity that MLflow refuses is reported and
    skipped.
    """
    size = _MAX_PER_REQUEST[kind]
    for part in (entities[start : start + size] for start in range(0, len(entities), size)):
        try:
            client.log_batch(run_id, **{kind: part})
        except _mlflow("mlflow.exceptions").MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            if len(part) == 1:
                say(f"MLflow refuses {kind[:-1]} {part[0].key!r}: {first_line(error)}")
            else:
                for entity in part:
                    send(client, run_id, kind, [entity])


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) if isinstance(value, (list, Mapping)) else str(value) for name, value in flat(values).items()}


def mlflow_names(metrics: Collection[str]) -> dict[str, str]:
    """Map names of metrics in metrics.jsonl to names in MLflow, such as ``Main/eval_test_group`` and ``detail/loss/csd``.

    MLflow sorts the prefix ``Main/`` before ``detail/`` because of its capital letter. ``Main/`` contains a headline metric of each
    evaluation set and benchmark in ``metrics``, and ``pair`` of each evaluation set, because more groups have it.
    """
    first = {metric for metric in metrics if _FIRST_PAGE.fullmatch(metric)}
    for name in {metric.split("/")[1] for metric in metrics if metric.startswith("eval/")}:
        wanted = (f"eval/{name}/{metric}" for metric in (_OWN_HEADLINES.get(name), *_HEADLINES))
        first |= {*[metric for metric in wanted if metric in metrics][:1]}
        if f"eval/{name}/nll" in metrics:  # not a benchmark
            first |= {f"eval/{name}/pair"}.intersection(metrics)
    return {metric: _name("Main/" + metric.replace("/", "_") if metric in first else f"detail/{metric}") for metric in metrics}


def _name(name: str) -> str:
    return _UNFIT_FOR_A_NAME.sub("_", name)[:_MAX_NAME_CHARS]


def _make_store(uri: str) -> None:
    """Create a local store atomically, because MLflow refuses a store whose creation was interrupted."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    _mlflow().MlflowClient(tracking_uri=f"sqlite:///{partial.as_posix()}").search_experiments()
    put_in_place(partial, path, path.with_name(path.name + ".old.tmp"))
