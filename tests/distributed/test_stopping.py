"""Runs that are asked to stop, and ranks that hang: real ranks of train.py, real signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import forkserver_ranks
import psutil
import pytest
import torch
from conftest import REPO, environment, losses, many_rows, read_json, train_arguments, wait_for
from torch.utils.data import DataLoader

from cfvlm_ds.checkpoint import incomplete
from cfvlm_ds.cluster import signals as stopping
from cfvlm_ds.cluster.heartbeat import Peer, verdict
from cfvlm_ds.cluster.signals import EXIT_HANG, EXIT_INTERRUPTED, EXIT_STOPPED, Stop, WorkerLost, reason, shield_worker, worker_deaths


def start(arguments: Sequence[str], output: Path, size: int = 2) -> list[ForkServerProcess]:
    """train.py without a launcher, so that exit codes and signals are exact."""
    return forkserver_ranks.start(size, "forkserver_ranks:train_script", list(arguments), said=output)


def signal_all(process: ForkServerProcess, number: int) -> int:
    """Signal a rank and all its descendants, as srun does; how many there were."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(number)
    return len(family)


def end(processes: Sequence[ForkServerProcess], seconds: float = 600) -> list[int | None]:
    """Exit codes; whatever still runs after ``seconds`` is killed."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, limit - time.monotonic()))
    kill(processes)
    return [process.exitcode for process in processes]


def kill(processes: Sequence[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def recorded(folder: Path) -> list[float]:
    return losses(folder) if (folder / "metrics.jsonl").exists() else []


def begun(arguments: Sequence[str], folder: Path, output: Path) -> list[ForkServerProcess]:
    """Two ranks that have taken two steps."""
    ranks = start(arguments, output)
    wait_for(lambda: len(recorded(folder)) >= 2 or not ranks[0].is_alive())
    return ranks


def the_run(folder: Path) -> tuple[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(client.get_metric_history(found.info.run_id, "Main/loss")) == len(losses(folder)), "everything is delivered"
    return found.info.run_id, found.info.status


@pytest.mark.usefixtures("_no_server")
def test_a_run_that_is_asked_to_stop_saves_once_and_goes_on(model_dir, manifests, tmp_path):
    """Ctrl-C at one of two ranks, passed on twice as by a terminal and a launcher: both stop after one step, and MLflow knows that the run
    is not over."""
    folder = tmp_path / "run"
    extra = [
        "--train.max_steps=16",
        "--train.per_device_train_batch_size=4",
        "--data.num_workers=1",
        "--tracking.enabled=true",
        "--train.hang_timeout_s=300",
    ]
    arguments = train_arguments(model_dir, manifests, folder, *extra)
    ranks = begun(arguments, folder, tmp_path)
    for _ in range(2):
        assert signal_all(ranks[1], signal.SIGINT) == 2, "a rank and its data worker"
    assert end(ranks) == [EXIT_STOPPED, EXIT_STOPPED], (tmp_path / "rank-1.log").read_text()
    stopped = len(losses(folder))
    assert 2 <= stopped < 16, "stopped too late to prove anything"
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    assert not (folder / "results.json").exists() and not (folder / "finished.json").exists()
    said = (tmp_path / "rank-0.log").read_text()
    assert f"stopped after step {stopped} of 16: a signal was received" in said
    first, status = the_run(folder)
    assert status == "SCHEDULED"

    assert end(start(arguments, tmp_path)) == [0, 0], (tmp_path / "rank-0.log").read_text()
    assert len(losses(folder)) == 16 and (folder / "results.json").exists()
    assert the_run(folder) == (first, "FINISHED")

    as_many = ["--train.per_device_train_batch_size=8"]  # groups a step as on two ranks: others would be another run
    assert end(start([*arguments, *as_many], tmp_path, size=1)) == [0]
    assert f"{folder} has finished at step 16 of 16: nothing to do" in (tmp_path / "rank-0.log").read_text()
    assert len(losses(folder)) == 16 and the_run(folder) == (first, "FINISHED")


@pytest.fixture
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_stopped_process_is_named_and_ends_the_run(model_dir, manifests, tmp_path):
    """SIGSTOP of rank 0: the other one waits in a collective, and says who hangs."""
    folder = tmp_path / "run"
    ranks = begun(train_arguments(model_dir, manifests, folder, "--train.max_steps=10000", "--train.hang_timeout_s=10"), folder, tmp_path)
    os.kill(ranks[0].pid or 0, signal.SIGSTOP)
    try:
        before = time.monotonic()
        ranks[1].join(60)
        assert ranks[1].exitcode == EXIT_HANG, (tmp_path / "rank-1.log").read_text()
        assert time.monotonic() - before > 9
    finally:
        kill(ranks)
    step = len(losses(folder))
    pattern = r"error: rank 0 on (\S+) \(pid (\d+)\) has given no sign of life for \d+ s; it was at step (\d+), phase \w+\n"
    named = re.search(pattern, (tmp_path / "rank-1.log").read_text())
    assert named is not None, (tmp_path / "rank-1.log").read_text()
    assert (named[1], int(named[2])) == (socket.gethostname(), ranks[0].pid) and int(named[3]) <= step + 1
    assert named[0] == f"error: {(folder / 'heartbeat' / 'hang.txt').read_text()}"


def held(where: str, tmp_path: Path, arguments: Sequence[str], size: int = 1) -> list[ForkServerProcess]:
    """train.py in a phase that goes on (tests/support/held_phases.py), once it is in it."""
    (mark := tmp_path / "marks" / where).parent.mkdir(exist_ok=True)
    mark.unlink(missing_ok=True)
    (mark.parent / "begun").unlink(missing_ok=True)
    ranks = forkserver_ranks.start(size, "held_phases:train", where, str(mark), list(arguments), said=tmp_path)
    wait_for(lambda: mark.exists() or not ranks[0].is_alive())
    assert ranks[0].is_alive(), (tmp_path / "rank-0.log").read_text()
    return ranks


@pytest.mark.usefixtures("_no_server")
def test_signals_are_obeyed_at_once_where_nothing_is_to_be_saved(model_dir, manifests, tmp_path):
    """In the data check and in the export, within a call that lets no handler of Python's run; the run goes on from its last checkpoint."""
    folder = tmp_path / "run"
    extra = ["--train.max_steps=2", "--tracking.enabled=true", "--train.export=true"]
    arguments = train_arguments(model_dir, manifests, folder, *extra)
    for where, number in (("read_data", signal.SIGTERM), ("export_checkpoint", signal.SIGINT)):
        (rank,) = held(where, tmp_path, arguments)
        before = time.monotonic()
        os.kill(rank.pid or 0, number)
        assert end([rank], 60) == [EXIT_STOPPED] and time.monotonic() - before < 12, (tmp_path / "rank-0.log").read_text()
        assert not (folder / "run.lock").exists() and (folder / "checkpoint-2").exists() == (where == "export_checkpoint")
    said = (tmp_path / "rank-0.log").read_text()
    assert said.count("stopped by a signal; the same command continues\n") == 2 and "Traceback" not in said
    assert read_json(folder / ".mlflow_delivery.json")["status"] == "SCHEDULED"
    assert end(start(arguments, tmp_path, size=1)) == [0]
    assert the_run(folder)[1] == "FINISHED" and (folder / "export").is_dir() and len(losses(folder)) == 2


@pytest.mark.parametrize("signalled", [*(pytest.param(ranks, marks=pytest.mark.long) for ranks in ((0, 1), (0,))), (1,)])
def test_a_signal_to_a_data_check_in_several_processes_ends_all_ranks(signalled, model_dir, manifests, tmp_path):
    """Two ranks look at the rows in processes of their own. All processes of both get a signal, as from srun, or those of one rank."""
    arguments = train_arguments(model_dir, {"train": many_rows(manifests["train"], 1 << 15)}, tmp_path / "run")
    ranks = forkserver_ranks.start(2, "forkserver_ranks:train_script", arguments, {"LOCAL_WORLD_SIZE": "1"}, said=tmp_path)
    wait_for(lambda: len(psutil.Process(ranks[0].pid).children()) >= 2 or not ranks[0].is_alive())
    for rank in signalled:
        signal_all(ranks[rank], (signal.SIGTERM, signal.SIGUSR1)[rank])
    codes, said = end(ranks, 60), [(tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [EXIT_STOPPED] * 2, said
    assert "stopped by a signal; the same command continues\n" in said[0] and "error" not in said[0] + said[1]


def test_signals_are_obeyed_within_an_evaluation(model_dir, manifests, tmp_path):
    """One of two ranks gets one: both leave in mid-evaluation, during training and at its end, and the run is finished by a later start."""
    folder = tmp_path / "run"
    extra = ["--train.max_steps=2", "--train.eval_steps=1", "--train.per_device_eval_batch_size=1"]
    arguments = train_arguments(model_dir, manifests, folder, *extra, f"--data.evaluation.test={manifests['test']}")
    for step in (1, 2):
        ranks = held("evaluation", tmp_path, arguments, size=2)
        before = time.monotonic()
        os.kill(ranks[step - 1].pid or 0, signal.SIGTERM)
        assert end(ranks, 60) == [EXIT_STOPPED] * 2, (tmp_path / "rank-0.log").read_text()
        assert time.monotonic() - before < 5 + 3, "ten forwards take ten times half a second, twice"
        assert (folder / f"checkpoint-{step}").exists() and len(losses(folder)) == step
        assert not (folder / "results.json").exists()
    said = (tmp_path / "rank-0.log").read_text()
    assert "stopped after step 1 of 2: a signal was received; the same command" in said
    assert "stopped after step 2 of 2: a signal was received, before the evaluation finished; the same command" in said
    assert end(start(arguments, tmp_path)) == [0, 0] and (folder / "results.json").exists() and len(losses(folder)) == 2


@pytest.mark.usefixtures("_no_server")
def test_a_second_ctrl_c_ends_a_run_at_once(model_dir, manifests, tmp_path):
    """Of a rank that waits in a collective for one that never comes: its MLflow run is KILLED and its folder free."""
    folder = tmp_path / "run"
    ranks = start(train_arguments(model_dir, manifests, folder, "--train.max_steps=9999", "--tracking.enabled=true"), tmp_path)
    wait_for(lambda: (len(recorded(folder)) >= 2 and (folder / "mlflow.db").exists()) or not ranks[0].is_alive())
    os.kill(ranks[1].pid or 0, signal.SIGSTOP)
    try:
        time.sleep(1)
        os.kill(ranks[0].pid or 0, signal.SIGINT)
        ranks[0].join(1.5)
        assert ranks[0].is_alive(), "the first one asks"
        os.kill(ranks[0].pid or 0, signal.SIGINT)
        ranks[0].join(15)
        assert ranks[0].exitcode == EXIT_INTERRUPTED
    finally:
        kill(ranks)
    said = (tmp_path / "rank-0.log").read_text()
    assert "ended by a second Ctrl-C; the same command continues from the last checkpoint" in said and "Traceback" not in said
    assert the_run(folder)[1] == "KILLED" and not (folder / "run.lock").exists()


def test_a_killed_data_worker_costs_no_step(model_dir, manifests, tmp_path):
    """As the kernel kills where memory is short: one sentence, and the last whole step is saved, on both ranks."""
    folder = tmp_path / "run"
    ranks = begun(train_arguments(model_dir, manifests, folder, "--train.max_steps=9999", "--data.num_workers=1"), folder, tmp_path)
    (worker,) = psutil.Process(ranks[1].pid).children()
    worker.kill()
    assert end(ranks, 60) == [1, 1], (tmp_path / "rank-1.log").read_text()
    step = len(losses(folder))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"] and not incomplete(folder / f"checkpoint-{step}")
    said = [(tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    sentence = rf"error: at step {step + 1}, rank 1: DataLoader worker \(pid(\(s\))? {worker.pid}\) .*: lower data\.num_workers; "
    assert re.search(rf"{sentence}step {step} is the last complete one and is saved", said[0])
    assert "Traceback" not in said[0] + said[1] and "error:" not in said[1]


@pytest.mark.parametrize("how", ["hangs", "ended"])
def test_a_rank_that_beats_but_does_not_move_is_named(tmp_path, how):
    """Rank 2 stays in its data while the others wait for it: all leave. Where it has ended, nobody accuses it, but the wait ends too."""
    ranks = forkserver_ranks.start(3, "rank_functions:stand_still", tmp_path, how == "ended", said=tmp_path)
    for rank in ranks:
        rank.join(120)
    outputs, codes = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(3)], [rank.exitcode for rank in ranks]
    said = "".join(outputs)
    if how == "ended":
        assert codes == [EXIT_HANG, EXIT_HANG, 0] and "rank 2" not in said and said.count("error: ") == 1
        return
    assert codes == [EXIT_HANG] * 3
    assert said.count("error: ") == 1, "one sentence"
    assert f"(pid {ranks[2].pid}) has made no progress for" in said and "it was at step 7, phase data; 2 of 3 ranks wait for it" in said
    assert "in stand_still" in outputs[2], "its own log shows where it was stuck"


def peer(phase: str, moves: int, silent_s: float = 0, still_s: float = 0) -> Peer:
    record = {"host": "h", "pid": 1, "beat": 1, "moves": moves, "step": 3, "phase": phase}
    return Peer(record, silent_s, still_s)


@pytest.mark.parametrize(
    ("peers", "named"),
    [
        ([peer("data", 5), peer("data", 4, still_s=99)], None),  # somebody moves
        ([peer("data", 5, still_s=99), peer("checkpoint", 4, still_s=99)], None),  # a checkpoint may take long
        ([peer("data", 5, still_s=99), peer("checkpoint", 4, 99, 99)], 1),  # but not without a beat
        ([peer("agreement", 5, still_s=99), peer("data", 4, still_s=99)], 1),
        ([peer("computation", 5, still_s=99), peer("computation", 5, still_s=99)], 0),
        ([peer("ended", 9, 99, 99), peer("start-up", 0, 0, 0)], None),
        ([peer("start-up", 0), Peer(None, 99)], 1),
        ([peer("start-up", 0), Peer(None, 5)], None),
    ],
)
def test_verdict(peers, named):
    found = verdict(peers, 10)
    assert (found and found[0]) == named


def test_time_runs_out_when_a_step_and_the_margin_no_longer_fit(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(stopping.time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    stop = Stop(margin_s=60)
    for now, late in ((1005.0, 0), (1010.0, 0), (1025.0, 0), (1026.0, 1)):  # the longest interval was 15 s
        assert stop.votes().tolist() == [0, late], now
    assert reason([0, 1]) == "the job's time limit is near" and reason([2, 1]) == "a signal was received" and reason([0, 0]) is None
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Stop(margin_s=60).votes().tolist() == [0, 0], "no Slurm, no end"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert reason(Stop(1e9).votes().tolist()) is None


EARLY = """
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
from cfvlm_ds.cluster import signals as stopping
assert stopping.Stop(0).votes().tolist() == [0, 0]
with stopping.together():
    stopping.install()
    assert stopping.Stop(0).votes().tolist() == [1, 0]
    time.sleep(0.5)  # the thread that listens leaves it to the ranks
    print("here", flush=True)
time.sleep(60)
"""


def test_a_signal_during_the_imports_is_not_lost():
    """Nor obeyed while ranks have to agree; it is as soon as they have not."""
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("here\n", EXIT_STOPPED)
    held_back, imports = (REPO / "train.py").read_text().split("from cfvlm_ds.cli.train import")
    assert (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})" in held_back and "leave_at_once(train_main)" in imports
    )


class Slow(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        time.sleep(0.2)
        return os.getpid()

    def __len__(self) -> int:
        return 8


def test_data_workers_survive_what_srun_sends_and_end_with_their_rank():
    batches = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=shield_worker))
    worker = int(next(batches))
    subprocess.run(["sh", "-c", f"kill -USR1 {worker}; kill -TERM {worker}"], check=True)
    assert len(list(batches)) == 7
    batches = iter(DataLoader(Slow(), num_workers=1, worker_init_fn=shield_worker))
    worker = int(next(batches))
    os.kill(worker, signal.SIGTERM)  # from its own rank
    wait_for(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, 10)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_the_end_of_a_workers_connection_is_its_death(error):
    """Tensors come over a socket, which the kernel closes before it reports the death."""
    batches = iter(DataLoader(Slow(), num_workers=1))
    worker = int(next(batches))
    with pytest.raises(WorkerLost, match=f"worker .pid {worker}. is killed"), worker_deaths():
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        raise error
    with pytest.raises(error), worker_deaths():  # of somebody else: nobody has died
        del batches
        raise error


COMPILES = """
import os, subprocess, sys, threading
from cfvlm_ds.cluster import signals as stopping
stopping.install()
with stopping.last_word():
    try:
        print("here", flush=True)
        subprocess.run(["sleep", "60"], check=True)
    finally:
        os.unlink(sys.argv[1])
"""


def test_a_compiler_that_is_ended_gives_its_lock_back(tmp_path):
    """As torch locks the folder of an extension that it compiles: a lock that stays would hold up the next start for ever."""
    (lock := tmp_path / "lock").touch()
    command = [sys.executable, "-c", COMPILES, str(lock)]
    with subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        wait_for(lambda: psutil.Process(process.pid).children(), 20)
        process.terminate()
        assert process.wait(30) == EXIT_STOPPED and not lock.exists()
