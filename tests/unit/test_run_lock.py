"""One run per folder: real processes that hold the lock, die with it, or start at the same moment."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import resource
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil
import pytest
from conftest import read_json

from cfvlm_ds.cluster import run_lock
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.errors import ConfigError, StorageError

FORK = multiprocessing.get_context("fork")  # real processes without their own start-up


def _hold(folder: Path, variables: dict[str, str], worker: bool, ready: Event, leave: Event) -> None:
    os.environ.update(variables)
    with RunLock(folder):
        if worker and not os.fork():
            time.sleep(5)
            os._exit(0)
        ready.set()
        leave.wait(60)


class Holder:
    """Another process that holds the folder's lock until it is let go, perhaps with a data worker."""

    def __init__(self, folder: Path, worker: bool = False, **variables: str) -> None:
        self.ready, self.leave = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=_hold, args=(folder, variables, worker, self.ready, self.leave))
        self.process.start()
        assert self.ready.wait(60)

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def let_go(self) -> None:
        self.leave.set()
        self.process.join(60)

    def kill(self) -> None:
        """SIGKILL, and its parent has not looked at it yet: dead, and not gone."""
        self.process.kill()
        while psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_the_second_run_is_refused_with_the_name_of_the_first(tmp_path):
    first = Holder(tmp_path / "run", SLURM_JOB_ID="4711")
    with pytest.raises(ConfigError) as raised:
        RunLock(tmp_path / "run")
    said = str(raised.value)
    assert f"is in use by process {first.pid} on {os.uname().nodename}, Slurm job 4711, started 20" in said and "choose another" in said
    first.let_go()
    with RunLock(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [run_lock.NAME]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": []}'])
def test_the_lock_of_a_killed_process_is_free_at_once(left, tmp_path):
    """Whatever it has written, and although a data worker of it lives on."""
    first = Holder(tmp_path, worker=True)
    first.kill()
    if left:
        (tmp_path / run_lock.NAME).write_text(left)
    with RunLock(tmp_path):
        assert read_json(tmp_path / run_lock.NAME)["pid"] == os.getpid()


def test_a_requeued_job_takes_its_own_lock_over_at_once(tmp_path, monkeypatch):
    """A file server may keep the lock of a node that is down for long."""
    first = Holder(tmp_path, SLURM_JOB_ID="12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ConfigError, match=f"process {first.pid}"):  # a second step of one job is another run
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path):
        first.let_go()
        assert read_json(tmp_path / run_lock.NAME)["pid"] == os.getpid(), "it is not the other's to remove"


def test_of_many_that_find_the_lock_of_a_dead_run_at_once_one_gets_it(tmp_path):
    """Rivals that all meet the same dead holder, again and again: whoever has the lock is alone with it for as long as he has it."""
    rounds, rivals = 40, 8
    together, holders, most, won = FORK.Barrier(rivals), FORK.Value("i", 0), FORK.Value("i", 0), FORK.Value("i", 0)

    def rival() -> None:
        for _ in range(rounds):
            if together.wait(60) == 0:
                (tmp_path / run_lock.NAME).write_text("{}")
            together.wait(60)
            lock = None
            with contextlib.suppress(ConfigError):
                lock = RunLock(tmp_path)
                with holders.get_lock():
                    holders.value += 1
                    won.value += 1
                    most.value = max(most.value, holders.value)
            together.wait(60)  # nobody lets go before all have tried
            if lock is not None:
                with holders.get_lock():
                    holders.value -= 1
                lock.release()
            together.wait(60)

    processes = [FORK.Process(target=rival) for _ in range(rivals)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * rivals
    assert (won.value, most.value) == (rounds, 1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_refuses_no_later_start(tmp_path):
    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(
            StorageError, match=r"run\.lock cannot be written \(.*\); free some space, or choose another, writable train\.output_dir"
        ):
            RunLock(tmp_path / "run")

    process = FORK.Process(target=refused)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with RunLock(tmp_path / "run"):
        pass


def test_a_lock_of_nobody_we_know_is_named_as_such(tmp_path):
    with (tmp_path / run_lock.NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by an unidentified run"):
            RunLock(tmp_path)
