"""Small files of a run folder on a disk that is really full: /dev/full, and a process that may not make files larger."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import multiprocessing
import os
import platform
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE, draw, read_json, read_rows, write_rows

from cfvlm_ds.cluster import heartbeat
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import replace, whole_file, whole_folder, write_if_possible
from cfvlm_ds.core.journal import Journal, Waiting, append, as_line
from cfvlm_ds.core.run_folder import refuse_foreign_entries
from cfvlm_ds.data import open_groups
from cfvlm_ds.tracking import open_tracker
from cfvlm_ds.training.run import locked

FORK = multiprocessing.get_context("fork")


def forked(function: Callable[..., None], *arguments: object) -> None:
    """The function in a process of its own, which may limit itself."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def largest_file(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full(handle: int) -> int:
    """Have writes to a handle find no room; the handle to ``os.dup2`` back."""
    kept = os.dup(handle)
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, handle)
    os.close(device)
    return kept


def handle_of(path: Path) -> int:
    """This process's open handle of a file."""
    (found,) = [int(name) for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == os.path.realpath(path)]
    return found


def test_lines_wait_for_room_and_keep_their_order(tmp_path):
    said: list[str] = []
    lines = Waiting(path := tmp_path / "a.jsonl", said.append)
    lines.write("one")
    kept = full(handle_of(path))
    lines.write("two")
    lines.write("three")
    assert path.read_text() == "one\n" and len(said) == 1
    assert said[0].startswith(f"{path} cannot be written (No space left on device); its new lines are kept in memory")
    os.dup2(kept, handle_of(Path("/dev/full")))
    lines.write("four")
    assert path.read_text() == "one\ntwo\nthree\nfour\n" and len(said) == 2 and "can be written again" in said[1]
    assert lines.close() == [] and lines.close() == []


def test_a_line_that_the_disk_took_in_part_is_taken_back_and_written_whole_later(tmp_path):
    def written(path: Path) -> None:
        said: list[str] = []
        lines = Waiting(path, said.append)
        largest_file(25)
        for number in range(5):
            lines.write(f"{number} {'x' * 8}")
        assert path.stat().st_size == 22 and len(said) == 1 and "File too large" in said[0]
        largest_file(52)
        lines.write("5")
        assert path.stat().st_size == 44 and len(said) == 1
        largest_file(1000)
        assert lines.close() == []

    forked(written, path := tmp_path / "a.jsonl")
    assert path.read_text().splitlines() == [*(f"{number} {'x' * 8}" for number in range(5)), "5"]


def test_a_journal_goes_on_after_a_kill_at_any_byte(tmp_path, capsys):
    """What is whole stays, what is torn is named and dropped, and a second writer is refused meanwhile."""

    def second(path: Path) -> None:
        with pytest.raises(ConfigError, match=r"j\.jsonl is being written by another process; wait for it, or stop it"):
            Journal(path)

    path, entries = tmp_path / "j.jsonl", [as_line({"a": "x" * length}) for length in (1, 3_000_000, 2)]
    whole = b"".join(entries)
    ends = [0, len(entries[0]), len(whole) - len(entries[2]), len(whole)]
    for cut in (*range(30), ends[2] - 1, *range(ends[2], len(whole) + 1)):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        kept = [end for end in ends if end <= cut][-1]
        assert path.read_bytes() == whole[:kept] and journal.size == kept
        assert (f"{path}: its incomplete last line" in capsys.readouterr().err) == (cut != kept)
        for number in range(ends.index(kept), 3):
            assert journal.append(entries[number]) == ends[number]
        assert path.read_bytes() == whole
        journal.close()
    journal = Journal(path)
    forked(second, path)
    journal.close()


def test_metrics_that_never_find_room_are_named_and_hide_no_error(tmp_path, capsys):
    """The error of the training is the one that is raised, and the run's record says FAILED."""
    with pytest.raises(RuntimeError, match="the first"), open_tracker(True, tmp_path, "tests", "a", {}, {}, mlflow=False) as tracker:
        tracker.log(1, {"loss": 1.0})
        os.close(full(handle_of(path := tmp_path / "metrics.jsonl")))
        for step in (2, 3, 4):
            tracker.log(step, {"loss": float(step)})
        raise RuntimeError("the first")
    said = capsys.readouterr().err
    assert [row["step"] for row in read_rows(path)] == [1]
    assert (
        said.count("No space left on device") == 1 and f"3 records of metrics (steps 2 to 4) are lost, because {path} could not be" in said
    )
    assert read_json(tmp_path / ".mlflow_delivery.json")["status"] == "FAILED"


def test_a_full_disk_stops_no_tracker(tmp_path):
    """Not even at its start, which takes the steps after the checkpoint out of metrics.jsonl without room for a copy."""

    def tracked(run_dir: Path) -> None:
        largest_file(40)  # between a line of metrics and the record
        with open_tracker(True, run_dir, "tests", "a", {"x": 1}, {}, resume_step=2, mlflow=False) as tracker:
            tracker.artifact(run_dir / "metrics.jsonl")
            tracker.log(3, {"loss": 3.0})

    rows = [{"step": step, "time": 1.0, "loss": float(step)} for step in range(1, 5)]
    write_rows((path := tmp_path / "metrics.jsonl"), rows)
    forked(tracked, tmp_path)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing half-written is left"


@pytest.mark.parametrize(
    "write", [lambda path, say: write_if_possible(path, "new" * 100, say), lambda path, say: append(path, "new" * 100, say)]
)
def test_other_files_are_whole_or_as_before(tmp_path, write):
    def limited(path: Path) -> None:
        said: list[str] = []
        largest_file(50)
        assert not write(path, said.append)
        assert len(said) == 1 and said[0].startswith(f"warning: {path} cannot be written (File too large)")
        largest_file(5000)
        assert write(path, said.append) and len(said) == 1

    (path := tmp_path / "a.json").write_text("old\n")
    forked(limited, path)
    assert path.read_text().removeprefix("old\n").strip() == "new" * 100 and [file.name for file in tmp_path.iterdir()] == ["a.json"]


# Folders that somebody else has prepared ------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[str, Callable[[Path, Any], object]]] = {
    "replace": ("a.json.tmp", lambda path, say: replace(path, b"new")),
    "keep": ("a.json.tmp", lambda path, say: write_if_possible(path, "new", say)),
    "append": ("a.json", lambda path, say: append(path, "new", say)),
    "lines": ("a.json", lambda path, say: Waiting(path, say).write("new")),
}


@pytest.mark.parametrize("how", WRITERS)
def test_nothing_is_written_through_a_link(how, tmp_path):
    linked, write = WRITERS[how]
    (victim := tmp_path / "victim").write_text("mine")
    (folder := tmp_path / "run").mkdir()
    (folder / linked).symlink_to(victim)
    write(folder / "a.json", lambda said: None)
    assert victim.read_text() == "mine"


ENTRIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (lambda run: (run / "results.md").symlink_to("../victim"), r"run/results\.md is a link to \.\./victim, and links"),
    "a dangling link": (lambda run: (run / "mlflow.db").symlink_to("nothing"), r"run/mlflow\.db is a link to nothing"),
    "a linked folder": (lambda run: (run / "export").symlink_to(".."), r"run/export is a link to \.\."),
    "a pipe": (lambda run: os.mkfifo(run / "run.lock"), r"run/run\.lock"),
    "a folder for a file": (lambda run: (run / "metrics.jsonl").mkdir(), r"run/metrics\.jsonl"),
    "options of somebody's own": (
        lambda run: (run / "config.yaml").write_text("model: {}\ndata: {}\ntrain: {}\nobjective: {}\n"),
        r"run/config\.yaml",
    ),
    "a file for a folder": (lambda run: (run / "scores").touch(), r"run/scores"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_a_run_folder_that_would_send_files_elsewhere_is_refused_untouched(case, tmp_path):
    make, said = ENTRIES[case]
    (run := tmp_path / "run").mkdir()
    (run / "config.yaml").write_text(OPTIONS)
    for own in ("data", "latest", "notes.md"):  # a user's links of other names beside a run
        (run / own).symlink_to("..")
    refuse_foreign_entries(run)
    make(run)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigError, match=rf"{said}.*; (remove it|move it away), or choose another train\.output_dir$"), locked(run, ONE):
        raise AssertionError
    assert sorted(path.name for path in run.iterdir()) == before
    refuse_foreign_entries(tmp_path / "new")


OPTIONS = "{model: {}, data: {}, train: {}, tracking: {}, build: {}, objective: {}, deepspeed: ds.json}"


def test_a_run_does_not_begin_among_somebodys_files(tmp_path):
    for name in ("slurm", "prepared", "heartbeat", "scenes"):
        (tmp_path / name).mkdir()
    for name in ("train-17.log", ".notes"):
        (tmp_path / name).touch()
    data = {"train": [{"path": str(tmp_path / "scenes" / "train.jsonl")}]}
    with locked(tmp_path, ONE, options={"data": data}):
        pass
    (tmp_path / "dog.jpg").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"'dog\.jpg'"), locked(tmp_path, ONE, options={"data": data}):
        raise AssertionError
    with pytest.raises(ConfigError, match=r"'dog\.jpg' and 1 more"), locked(tmp_path, ONE):
        raise AssertionError
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "config.yaml").write_text(OPTIONS)  # of a run, in whose folder people may leave what they like
    with locked(tmp_path, ONE):
        pass


def test_the_beats_of_a_new_start_are_a_folder_of_their_own(tmp_path):
    """A folder that cannot be made is one sentence with its path, and what a link leads to stays."""
    (kept := tmp_path / "mine").mkdir()
    (kept / "rank-0.json").write_text("mine")
    (tmp_path / "heartbeat").symlink_to(kept)
    assert heartbeat.prepare(tmp_path) == tmp_path / "heartbeat" and not (tmp_path / "heartbeat").is_symlink()
    assert (kept / "rank-0.json").read_text() == "mine"
    (tmp_path / "heartbeat" / "hang.txt").write_text("of an earlier start")
    assert not list(heartbeat.prepare(tmp_path).iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match=r"file/heartbeat cannot be written \(Not a directory\); free some space, or choose another, writable train\.out"
    ):
        heartbeat.prepare(tmp_path / "file")


def test_a_folder_that_two_write_at_the_same_time_is_whole_or_an_error(tmp_path):
    """The first finds that its folder is gone and touches nothing of the second's."""
    first, second = whole_folder(tmp_path / "made"), whole_folder(tmp_path / "made")
    (first.__enter__() / "one").write_text("first")
    (second.__enter__() / "two").write_text("second")
    with pytest.raises(FileExistsError, match="another process"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["two"] and [path.name for path in tmp_path.iterdir()] == ["made"]


def test_one_process_at_a_time_writes_a_file(tmp_path):
    """The second is told before it has anything to write, and the first keeps what it has; a killed one is in nobody's way."""

    def killed(path: Path) -> None:
        with whole_file(path) as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    path = tmp_path / "a.jsonl"
    with whole_file(path) as first:
        first.write(b"all of it")
        with pytest.raises(ConfigError, match=r"a\.jsonl is being written by another process"), whole_file(path):
            raise AssertionError("two writers")
    assert path.read_bytes() == b"all of it" and os.listdir(tmp_path) == ["a.jsonl"]
    process = FORK.Process(target=killed, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.tmp"]
    os.link(tmp_path / "a.jsonl.tmp", tmp_path / "mine")  # and what has this name beside it is not written
    replace(path, b"the next")
    assert path.read_bytes() == b"the next" and (tmp_path / "mine").read_bytes() == b"x" * 100_000


def without_flock(number: int) -> None:
    """Have the system refuse flock to this process for good, as file systems without locks do."""
    call = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    steps = ((0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | number), (0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))  # a struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_work_goes_on_where_a_file_system_has_no_locks(number, tmp_path, monkeypatch):
    """It is reported once."""

    def working(folder: Path, number: int) -> None:
        without_flock(number)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert [group.candidates[0].text for group in open_groups(folder / "c.csv", format="captions")] == ["a dog"]
            journal = Journal(folder / "j.jsonl")
            journal.append(b'{"a": 1}\n')
            journal.close()
        assert said.getvalue().count("has no file locks") == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw(tmp_path / "0.png", [("red", "circle"), ("blue", "square")])
    (tmp_path / "c.csv").write_text("image,caption\n0.png,a dog\n")
    forked(working, tmp_path, number)
