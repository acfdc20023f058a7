"""Real trainings whose MLflow server is slow, or dies and comes back: they do not wait for it, and it gets everything once and in order."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forkserver_ranks
import pytest
from conftest import run_ranks
from test_tracked_run import on_disk, on_server, the_run, tracked, wait_for
from test_tracking import Server

from cfvlm_ds.tracking import deliver

mlflow = pytest.importorskip("mlflow")

DELAY_S = 5.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path).running() as server:
        yield server


class SlowProxy:
    """A TCP proxy that holds back each answer of a server for ``DELAY_S``; ``answers`` are those it has passed on."""

    def __init__(self, port: int) -> None:
        self.to, self.answers = port, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.to)) as server:
            asked = False
            while True:
                for source in select.select([client, server], [], [])[0]:
                    if not (data := source.recv(1 << 16)):
                        return
                    if source is server and asked:
                        time.sleep(DELAY_S)
                        self.answers += 1
                    asked = source is client
                    (server if source is client else client).sendall(data)


def steps(folder: Path) -> int:
    """Steps in a run's metrics."""
    return (folder / "metrics.jsonl").read_text().count('"loss"') if (folder / "metrics.jsonl").exists() else 0


def is_all_there(server: Server, folder: Path) -> None:
    """Every point of metrics.jsonl is on the server once, in order, in one finished run."""
    client = mlflow.MlflowClient(tracking_uri=server.url)
    run = the_run(client, folder.name)
    assert run.info.status == "FINISHED" and on_server(client, run) == on_disk(folder)


@pytest.mark.long
def test_a_server_that_takes_5_s_a_call_costs_no_step_anything(
    server: Server, model_dir: Path, manifests: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, folder = SlowProxy(server.port), tmp_path / "slow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    arguments = tracked(model_dir, manifests, folder, "--train.max_steps", "60")
    ((code, output),) = run_ranks(1, "forkserver_ranks:train_script", arguments, said=tmp_path / "said")
    ended = time.time()
    assert code == 0, output[-3000:]
    assert proxy.answers >= 3, "it did talk to the slow server"
    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(times) == 60 and times[-1] - times[0] < 60 * DELAY_S / 4, "steps waited for calls"
    assert ended - times[-1] < 30 + 60, "the end waits for MLflow 30 s at most; the rest is the last checkpoint and the evaluation"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    assert deliver(folder, timeout=60)
    is_all_there(server, folder)


@pytest.mark.long  # test_tracking has a server that starts late and is killed
def test_a_server_that_dies_in_mid_run_and_comes_back_gets_everything_once(
    server: Server, model_dir: Path, manifests: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it has some of the steps, and started again at the same address before the run ends."""
    folder = tmp_path / "dying"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    size = ["--train.max_steps", "60", "--train.per_device_train_batch_size", "2"]
    (process,) = forkserver_ranks.start(
        1, "forkserver_ranks:train_script", tracked(model_dir, manifests, folder, *size), said=tmp_path / "said"
    )
    client = mlflow.MlflowClient(tracking_uri=server.url)

    def delivered() -> int:
        experiment = client.get_experiment_by_name("dying")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return max((len(client.get_metric_history(found.info.run_id, "loss")) for found in runs), default=0)

    wait_for(lambda: delivered() > 3, 400)
    server.kill()
    before = steps(folder)
    wait_for(lambda: steps(folder) > before + 10, 200)
    assert process.is_alive(), "it trains on without the server"
    server.start()
    process.join(900)
    output = (tmp_path / "said" / "rank-0.log").read_text()
    assert process.exitcode == 0 and "does not answer, will try again" in output, output[-3000:]
    server.wait()
    assert deliver(folder, timeout=60)
    assert steps(folder) == 60
    is_all_there(server, folder)
