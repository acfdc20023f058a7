"""One run per folder: real processes that hold the lock, die with it, or start at the same moment."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil
import pytest

from cfvlm_ds.cluster import run_lock
from cfvlm_ds.cluster.run_lock import RunLock
from cfvlm_ds.core.errors import ConfigError, StorageError

FORK = multiprocessing.get_context("fork")  # real processes without their own start-up


def _hold(folder: Path, variables: dict[str, str], touch: float, ready: Event, leave: Event) -> None:
    os.environ.update(variables)
    run_lock._TOUCHED_EVERY_S = touch
    with RunLock(folder, lambda _: None):
        ready.set()
        leave.wait(60)


class Holder:
    """Another process that holds the folder's lock until it is let go."""

    def __init__(self, folder: Path, touch: float = 30, **variables: str) -> None:
        self.ready, self.leave = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=_hold, args=(folder, variables, touch, self.ready, self.leave))
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


@pytest.mark.parametrize("pid", ["x", -1, 10**20, []])
def test_a_damaged_lock_of_this_machine_is_taken_over(tmp_path: Path, pid: object) -> None:
    said: list[str] = []
    with RunLock(tmp_path):
        content = json.loads((tmp_path / run_lock.NAME).read_text())
    (tmp_path / run_lock.NAME).write_text(json.dumps(content | {"pid": pid}))
    with RunLock(tmp_path, said.append):
        assert "its process is gone" in said[0]


def rewritten(folder: Path, age: float = 0.0, **changes: object) -> None:
    """The lock as another machine would have written it so many seconds ago."""
    lock = folder / run_lock.NAME
    lock.write_text(json.dumps(json.loads(lock.read_text()) | changes))
    os.utime(lock, (time.time() - age, time.time() - age))


def test_the_second_run_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    first = Holder(tmp_path / "run", SLURM_JOB_ID="4711")
    with pytest.raises(ConfigError) as raised:
        RunLock(tmp_path / "run")
    said = str(raised.value)
    assert f"is in use by process {first.pid} on {os.uname().nodename}, Slurm job 4711, started 20" in said and "choose another" in said
    first.let_go()
    with RunLock(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [run_lock.NAME]
    assert not list((tmp_path / "run").iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    said: list[str] = []
    first = Holder(tmp_path)
    first.kill()
    with RunLock(tmp_path, said.append):
        assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == os.getpid()
    assert said == [s for s in said if f"from process {first.pid} on " in s and "its process is gone" in s] and len(said) == 1


def test_a_number_that_another_process_has_by_now_is_no_Holder(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    rewritten(tmp_path, born=1.0)
    with RunLock(tmp_path, lambda _: None):
        pass
    first.kill()


def test_another_machine_is_believed_for_as_long_as_it_touches_the_lock(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.kill()
    rewritten(tmp_path, processes="another machine", host="node7", age=290)
    with pytest.raises(ConfigError, match=r"in use by process .* on node7"):
        RunLock(tmp_path)
    rewritten(tmp_path, age=310)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert "has not touched the lock for 310 s" in said[0]


def test_a_requeued_job_takes_its_own_lock_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Holder(tmp_path, SLURM_JOB_ID="12")
    rewritten(tmp_path, processes="a node that is down", host="node7")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ConfigError, match="node7"):  # a second step of one job is another run
        RunLock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert "Slurm has started job 12 again" in said[0]
    first.let_go()


def test_of_many_that_find_a_stale_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    """Rivals that all meet the same dead holder, again and again: whoever has the lock is alone with it for as long as he has it."""
    first = Holder(tmp_path)
    first.kill()
    stale = (tmp_path / run_lock.NAME).read_text()
    rounds, rivals = 40, 8
    together, holders, most, won = FORK.Barrier(rivals), FORK.Value("i", 0), FORK.Value("i", 0), FORK.Value("i", 0)

    def seen_late(lock: Path, seen: Callable[[Path], str | None] = run_lock._content) -> str | None:
        content = seen(lock)
        time.sleep(random.random() * 0.01)  # others act between this run's look and its own act
        return content

    def rival() -> None:
        run_lock._content = seen_late
        random.seed(os.getpid())
        for _ in range(rounds):
            if together.wait(60) == 0:
                (tmp_path / run_lock.NAME).write_text(stale)
            together.wait(60)
            lock = None
            with contextlib.suppress(ConfigError):
                lock = RunLock(tmp_path, lambda _: None)
                with holders.get_lock():
                    holders.value += 1
                    won.value += 1
                    most.value = max(most.value, holders.value)
            together.wait(60)  # nobody lets go before all have tried
            if lock is not None:
                with holders.get_lock():
                    holders.value -= 1
                lock.__exit__(None, None, None)
            together.wait(60)

    processes = [FORK.Process(target=rival) for _ in range(rivals)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * rivals
    assert (won.value, most.value) == (rounds, 1)
    assert not list(tmp_path.iterdir())


def test_a_run_that_died_while_it_took_over_is_named(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.kill()
    (claim := tmp_path / f"{run_lock.NAME}.claim").touch()
    with pytest.raises(
        ConfigError, match=r"another run is starting in .*; choose another .* remove .*run\.lock\.claim if that run is gone"
    ):
        RunLock(tmp_path)
    claim.unlink()
    with RunLock(tmp_path, lambda _: None):
        pass


def test_the_holder_touches_it_and_ends_when_it_is_another_s(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = Holder(tmp_path, touch=0.1).process
    lock = tmp_path / run_lock.NAME
    before = lock.stat().st_mtime_ns
    deadline = time.monotonic() + 20
    while lock.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rewritten(tmp_path, pid=1)
    process.join(20)
    assert process.exitcode == 1
    assert "another run has taken" in capfd.readouterr().out
    assert lock.exists(), "it is not this one's to remove"


def test_a_full_disk_is_named_and_leaves_no_lock(tmp_path: Path) -> None:
    """An empty lock would refuse the next start."""

    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(StorageError, match=r"run\.lock cannot be written \(.*\); make room, or choose another train\.output_dir"):
            RunLock(tmp_path / "run")

    process = FORK.Process(target=refused)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with RunLock(tmp_path / "run"):
        pass


def test_an_empty_lock_is_one_of_a_run_that_died_at_once(tmp_path: Path) -> None:
    lock = tmp_path / run_lock.NAME
    lock.touch()
    with pytest.raises(ConfigError, match="in use by a run that has not said who it is"):
        RunLock(tmp_path)
    os.utime(lock, (time.time() - 40, time.time() - 40))
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert "a run that has not said who it is: it has not touched the lock for 40 s" in said[0]


@pytest.mark.parametrize("what", ["folder", "lock"])
def test_what_was_removed_is_not_called_taken_over(tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    process = Holder(tmp_path / "run", touch=0.1).process
    if what == "folder":
        shutil.rmtree(tmp_path / "run")
    else:
        (tmp_path / "run" / run_lock.NAME).unlink()
    process.join(20)
    removed = tmp_path / "run" if what == "folder" else tmp_path / "run" / run_lock.NAME
    assert process.exitcode == 1
    assert capfd.readouterr().out.startswith(f"error: {removed} has been removed while this run was")
