"""Tracking against a real MLflow server, which is started, stopped and killed; nothing is simulated."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import pytest
from conftest import free_port, read_json, read_rows, wait_for
from mlflow_server import Server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfvlm_ds.cli.main import main as cfvlm_ds_main
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.tracking import NullTracker, Tracker, deliver, open_tracker
from cfvlm_ds.tracking.hooks import hook_class
from cfvlm_ds.tracking.mlflow_delivery import mlflow_names, send


@pytest.fixture
def remote(server, monkeypatch):
    server.up()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return server


@pytest.fixture
def client(server):
    server.up()
    return mlflow.MlflowClient(tracking_uri=server.url)


def _delivered(run_dir: Path) -> str:
    """The id of the run that the folder was delivered to."""
    run_id = read_json(run_dir / ".mlflow_delivery.json")["run_id"]
    assert isinstance(run_id, str)
    return run_id


def _open(run_dir: Path, params: dict[str, Any] | None = None, **where: Any) -> Tracker:
    tracker = open_tracker(True, run_dir, "tests", "a run", params or {"lr": 0.1}, {"kind": "test"}, **where)
    assert isinstance(tracker, Tracker)
    return tracker


def _history(client: Any, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, mlflow_names({name})[name])]


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_rows(run_dir / "metrics.jsonl")


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_server_that_starts_late_or_is_killed_loses_nothing(killed, server, tmp_path, capsys, monkeypatch):
    """It comes first: the server of the other tests does not run yet."""
    server.kill()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    longest, last = 0.0, 0

    def log(steps: int) -> None:
        nonlocal longest, last
        for _ in range(steps):
            last += 1
            start = time.perf_counter()
            tracker.log(last, {"loss": float(last), "other": -float(last)})
            longest = max(longest, time.perf_counter() - start)
            time.sleep(0.005)

    with _open(tmp_path, close_timeout=120) as tracker:  # a server on a busy machine takes its time to come back
        log(100)
        assert tracker.run_id is None
        server.start()
        wait_for(lambda: tracker.run_id is not None)
        log(200)
        if killed:
            server.kill()
            log(200)
            server.start()
            log(100)
    client = mlflow.MlflowClient(tracking_uri=server.url)
    for name, sign in (("loss", 1.0), ("other", -1.0)):
        assert _history(client, tracker.run_id, name) == [(step, sign * step) for step in range(1, last + 1)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert longest < 0.1
    assert "answers again" in capsys.readouterr().err


def test_everything_arrives(remote, client, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named by the environment")
    report = tmp_path / "report.txt"
    report.write_text("hello")
    params = {"model": {"name": "llava", "layers": [1, 2], "empty": {}, "unset": None}, "text": "x" * 7000}
    with _open(tmp_path / "run", params) as tracker:
        for step in range(1, 4):
            tracker.log(step, {"loss/lm": 1.0 / step, "odd@name": step, "eval/http://x/../group/": 1.0, "bad": math.nan, "huge": math.inf})
        tracker.log(3, {"eval/val/group": 0.5, "eval/val/factual": 0.75, "eval/val/sham": 0.25})
        tracker.artifact(report, "reports")
        tracker.describe("first")
        tracker.describe("![x](get-artifact?path=x.png&run_uuid=RUN_ID)")
    run = client.get_run(tracker.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "named by the environment"
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "a run", "test")
    assert run.data.params == {"model.name": "llava", "model.layers": "[1, 2]", "model.empty": "{}", "text": "x" * 6000}
    assert [name for name in run.data.metrics if name.startswith("Main/")] == ["Main/eval_val_group"]
    assert {"detail/eval/val/factual", "detail/eval/val/sham", "detail/loss/lm", "detail/odd_name"} <= run.data.metrics.keys()
    assert run.data.tags["mlflow.note.content"] == f"![x](get-artifact?path=x.png&run_uuid={tracker.run_id})"
    assert _history(client, tracker.run_id, "loss/lm") == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
    assert _history(client, tracker.run_id, "odd@name") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert _history(client, tracker.run_id, "eval/val/group") == [(3, 0.5)]
    assert "detail/eval/http:/_/x/_/group/_" in run.data.metrics and "refuses" not in capsys.readouterr().err
    send(client, tracker.run_id, "metrics", [mlflow.entities.Metric(name, 1.0, 0, 1) for name in ("not//a name", "another")])
    assert "refuses metric 'not//a name'" in capsys.readouterr().err
    assert client.get_metric_history(tracker.run_id, "another")[0].value == 1.0
    assert math.isnan(_history(client, tracker.run_id, "bad")[0][1])
    assert _history(client, tracker.run_id, "huge")[0][1] > 1e300
    assert _lines(tmp_path / "run")[0]["bad"] == "nan" and _lines(tmp_path / "run")[0]["huge"] == "inf"
    assert [item.path for item in client.list_artifacts(tracker.run_id, "reports")] == ["reports/report.txt"]


def test_resume_continues_the_run_and_doubles_no_step(remote, client, tmp_path):
    with pytest.raises(SystemExit), _open(tmp_path, {"lr": 0.1, "seed": 1, "end": 5, "new": None}) as first:
        for step in range(1, 6):
            first.log(step, {"loss": float(step)})
        first.log(3, {"eval": 0.25})
        sys.exit(75)
    assert client.get_run(first.run_id).info.status == "KILLED"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')  # what a kill in the middle of a write leaves
    second = _open(tmp_path, {"lr": 0.2, "seed": 1, "end": None, "new": True}, run_id=first.run_id, resume_step=3)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 3]
    second.log(3, {"eval": 0.25})
    for step in range(4, 8):
        second.log(step, {"loss": float(step)})
    wait_for(lambda: client.get_run(first.run_id).info.status == "RUNNING")
    second.close()
    assert second.run_id == first.run_id
    assert _history(client, first.run_id, "loss") == [(step, float(step)) for step in range(1, 8)]
    assert _history(client, first.run_id, "eval") == [(3, 0.25)]
    assert [line["step"] for line in _lines(tmp_path) if "loss" in line] == list(range(1, 8))
    run = client.get_run(first.run_id)
    assert run.data.params == {"lr": "0.1", "seed": "1", "end": "5", "new": "True"}
    changed = {name: value for name, value in run.data.tags.items() if name.startswith("param_changed.")}
    assert changed == {"param_changed.lr": "0.2", "param_changed.end": "None", "param_changed.new": "True"}
    assert run.info.status == "FINISHED"


def test_parameters_that_arrive_late_have_not_changed(remote, client, tmp_path, monkeypatch):
    """The connection breaks after the first of two requests with parameters."""
    log_batch, parts = mlflow.MlflowClient.log_batch, list[Any]()

    def broken_once(self: Any, *where: Any, **what: Any) -> Any:
        parts.extend(what.keys() & {"params"})
        if len(parts) == 2:
            parts.append("broken")
            raise ConnectionError
        return log_batch(self, *where, **what)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", broken_once)
    with _open(tmp_path, {f"option_{number}": number for number in range(150)}, close_timeout=60) as tracker:
        tracker.log(1, {"loss": 1.0})
    run = client.get_run(tracker.run_id)
    assert len(run.data.params) == 150 and "broken" in parts
    assert not [name for name in run.data.tags if name.startswith("param_changed.")]


TRAIN = {"name": "train", "digest": "a" * 32, "source": "/data/train.jsonl", "context": "training", "groups": 48}


def inputs_of(client: Any, run_id: str | None) -> list[tuple[str, str, str]]:
    """(name, first letter of the digest, context), in the order of the names and digests."""
    found = client.get_run(run_id).inputs.dataset_inputs
    return sorted((each.dataset.name, each.dataset.digest[0], each.tags[0].value) for each in found)


def test_a_resume_does_not_log_data_sets_twice(remote, client, tmp_path):
    """The same in both starts; another evaluation set, and changed training data, are inputs besides."""
    test = {**TRAIN, "name": "test", "context": "evaluation", "groups": 3}
    changed = {**TRAIN, "digest": "b" * 32}
    with _open(tmp_path, inputs=[TRAIN, test]) as first:
        first.log(2, {"loss": 1.0})
    for inputs in ([TRAIN, test], [TRAIN, test, {**test, "name": "other"}], [changed]):
        with _open(tmp_path, run_id=first.run_id, resume_step=2, inputs=inputs):
            pass
    expected = [("other", "a", "evaluation"), ("test", "a", "evaluation"), ("train", "a", "training"), ("train", "b", "training")]
    assert inputs_of(client, first.run_id) == expected


def test_data_sets_reach_a_server_that_was_down_and_one_that_has_lost_the_run(tmp_path, server, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    inputs = [{**TRAIN, "source": "https://me:hunter2@host/train.jsonl", "name": "x" * 600}]
    with open_tracker(True, tmp_path, "tests", "down", {}, {}, close_timeout=0.5, inputs=inputs) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert "hunter2" not in (tmp_path / ".mlflow_delivery.json").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    assert deliver(tmp_path)
    run_id = _delivered(tmp_path)
    (found,) = client.get_run(run_id).inputs.dataset_inputs
    assert (found.dataset.name, json.loads(found.dataset.source)) == ("x" * 500, {"uri": "https://***@host/train.jsonl"})
    client.delete_run(run_id)
    assert deliver(tmp_path) and _delivered(tmp_path) != run_id
    assert len(client.get_run(_delivered(tmp_path)).inputs.dataset_inputs) == 1


def test_a_new_run_in_a_used_folder_starts_over(remote, client, tmp_path):
    with _open(tmp_path) as first:
        first.log(1, {"loss": 1.0})
    with _open(tmp_path) as second:
        second.log(1, {"loss": 2.0})
    assert first.run_id != second.run_id
    assert _history(client, second.run_id, "loss") == [(1, 2.0)]
    assert len(_lines(tmp_path)) == 1


def test_close_is_bounded_and_the_rest_is_delivered_later(remote, client, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as away, socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        away.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = _open(tmp_path, close_timeout=1.0)
        tracker.log(1, {"a": 1.0, "b": 2.0})
        tracker.log(2, {"a": 3.0})
        start = time.monotonic()
        tracker.close("FAILED")
        assert time.monotonic() - start < 2.5
    message = capsys.readouterr().err
    assert "did not receive 3 points" in message and f"cfvlm-ds track {tmp_path}" in message
    for _ in range(2):  # the second time there is nothing left to do
        cfvlm_ds_main(["track", str(tmp_path)])
    assert _history(client, _delivered(tmp_path), "a") == [(1, 1.0), (2, 3.0)]
    assert client.get_run(_delivered(tmp_path)).info.status == "FAILED"


@pytest.mark.parametrize("ui", [False, pytest.param(True, marks=pytest.mark.long)])
def test_local_store_is_what_mlflow_ui_shows(ui, tmp_path, remote, monkeypatch):
    """Also where its making was cut off: killed between two of its migrations, MLflow's own file is refused by every later start."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (run_dir := tmp_path / "run folder").mkdir()
    (run_dir / "mlflow.db.tmp").write_bytes(b"half of a store")
    with _open(run_dir) as tracker:
        tracker.log(1, {"loss/lm": 0.5})
    assert not (run_dir / "mlflow.db.tmp").exists()
    with Server(run_dir, ["ui"]).running() if ui else contextlib.nullcontext() as shown:
        client = mlflow.MlflowClient(tracking_uri=shown.url if shown else f"sqlite:///{run_dir}/mlflow.db")
        experiment = client.get_experiment_by_name("tests")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_id, run.data.metrics["detail/loss/lm"], run.data.params["lr"]) == (tracker.run_id, 0.5, "0.1")
    # A run recorded without a server can be copied to one.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", remote.url)
    assert deliver(run_dir, timeout=30)
    copy = mlflow.MlflowClient(tracking_uri=remote.url).get_run(_delivered(run_dir))
    assert (copy.data.metrics["detail/loss/lm"], copy.data.tags["continues_run"], copy.info.status) == (0.5, tracker.run_id, "FINISHED")


@pytest.mark.parametrize("name", ["a%41b", "a?b"])
def test_a_folder_that_no_address_of_a_database_can_name_keeps_its_metrics(name, tmp_path, server, client, monkeypatch, capsys):
    """Nothing is written beside it, and a server gets them later."""
    with _open(run_dir := tmp_path / "runs" / name) as tracker:
        tracker.log(1, {"loss": 1.0})
    said = capsys.readouterr().err
    assert "set MLFLOW_TRACKING_URI, or rename the folder" in said and "To deliver them later" in said
    assert os.listdir(tmp_path / "runs") == [name] and not list(tmp_path.rglob("*.db*"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    assert deliver(run_dir, 60) and client.get_run(_delivered(run_dir)).data.metrics["Main/loss"] == 1.0


def test_the_callers_own_mlflow_state_is_untouched(remote, tmp_path):
    before = (mlflow.get_tracking_uri(), mlflow.active_run())
    with _open(tmp_path):
        pass
    assert (mlflow.get_tracking_uri(), mlflow.active_run()) == before


@pytest.mark.parametrize("left", [b"", b"\xff", b"[]", b'{"nothing": 1}'])
def test_a_damaged_record_is_left_aside(tmp_path, left, capsys):
    """A power loss may leave a file without its contents; damaged lines of metrics are dropped, since they stop the others."""
    with open_tracker(True, tmp_path, "tests", "a run", {}, {}, mlflow=False) as tracker:
        tracker.log(1, {"loss": 1.0})
    (tmp_path / ".mlflow_delivery.json").write_bytes(left)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "ti\n\0\0\0\n\xff\n')
    with open_tracker(True, tmp_path, "tests", "a run", {}, {}, run_id="known", resume_step=4, mlflow=False) as tracker:
        tracker.log(5, {"loss": 0.5})
    assert tracker.run_id == "known" and [line["step"] for line in _lines(tmp_path)] == [1, 5]
    assert "is damaged and ignored" in capsys.readouterr().err


def test_a_moved_run_knows_its_files(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with open_tracker(True, tmp_path / "run", "tests", "a run", {}, {}, mlflow=False) as tracker:
        (tmp_path / "run" / "results.md").write_text("good")
        tracker.artifact(tmp_path / "run" / "results.md")
    (tmp_path / "run").rename(tmp_path / "moved")
    with _open(tmp_path / "moved", resume_step=0) as again:
        wait_for(lambda: again.run_id)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/moved/mlflow.db")
    assert "results.md" in {item.path for item in client.list_artifacts(again.run_id)}


def test_disabled_does_nothing(tmp_path):
    with open_tracker(False, tmp_path / "run", "tests", "a run", {}, {}) as tracker:
        assert isinstance(tracker, NullTracker)
        tracker.log(1, {"loss": 1.0})
        tracker.artifact(tmp_path / "nothing")
        tracker.close("FAILED")
    assert tracker.run_id is None and not (tmp_path / "run").exists()


class Diary:
    """A tracker of a user's: it keeps what it gets, and fails at step 2 if it is told to."""

    entries: ClassVar[list[Any]] = []

    def __init__(self, run_dir, params, step):
        self.fails = params["fails"]
        self.entries.append((run_dir.name, params, step))

    def log(self, step, metrics):
        if self.fails and step == 2:
            raise RuntimeError("the diary is full")
        self.entries.append((step, metrics))

    def close(self, status):
        self.entries.append(status)


ALSO = ["test_tracking:Diary", "tensorboard", "test_tracking:Diary"]
"""Trackers, one of them twice by mistake."""


@pytest.mark.parametrize("fails", [False, True])
def test_other_trackers_get_the_metrics(fails, tmp_path, capsys):
    """TensorBoard, and a class by its name; one that fails is reported once and stops nothing."""
    Diary.entries.clear()
    params = {"fails": fails, "api_key": "hunter2"}
    with open_tracker(True, tmp_path, "tests", "a", params, {}, mlflow=False, also=ALSO) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1 / step, "rate": math.inf})
    written = [{"loss": 1 / step, "rate": math.inf} for step in (1, 2, 3)]
    begun = (tmp_path.name, {"fails": fails, "api_key": "***"}, 0)
    assert Diary.entries == [begun, *enumerate(written[: 1 if fails else 3], 1), *([] if fails else ["FINISHED"])]
    assert capsys.readouterr().err.count("RuntimeError: the diary is full") == fails
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]


def test_a_tracker_that_is_not_there_is_refused(tmp_path, monkeypatch):
    """Absent, or of a module that cannot be imported, or no tracker; the sentence is one line whatever the module raises."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raising_tracker.py").write_text("raise RuntimeError('no\\nkey')")
    (tmp_path / "broken_tracker.py").write_text("def (")
    names = ["nothing:Diary", "test_tracking:Dairy", "Diary", "raising_tracker:A", "broken_tracker:A", "test_tracking:ALSO"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in [*names, "tensorboard"]:
        with pytest.raises(ConfigError, match="tracking") as raised:
            hook_class(name)
        assert "\n" not in str(raised.value)
