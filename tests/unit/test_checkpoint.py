"""Which checkpoint is continued from, which are kept, and what a half-written one is worth; folders made by hand, no engine."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ONE, read_json, write_json

from cfvlm_ds import checkpoint
from cfvlm_ds.checkpoint import TrainState, saving
from cfvlm_ds.checkpoint.saving import flushed
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import crc32_of


@pytest.fixture(scope="module", autouse=True)
def _process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """Writes and reads files where DeepSpeed would, through a writer like DeepSpeed's, with a script that only rank 0 copies."""

    weights: Any = None

    def __init__(self) -> None:
        self.checkpoint_engine = SimpleNamespace(save=None, load=self.read, makedirs=os.makedirs)

    def _copy_recovery_script(self, folder: str) -> None:
        (Path(folder) / "script.py").write_text("pass")

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert not save_latest, "a `latest` file would point at folders that are not finished"
        self.checkpoint_engine.makedirs(os.path.join(folder, tag, "shards"))
        self.checkpoint_engine.save(
            state_dict={"weights": self.weights, **client_state}, path=os.path.join(folder, tag, "shards", "rank0.pt")
        )
        self._copy_recovery_script(os.path.join(folder, tag))
        dist.barrier()  # the other ranks would wait here for one that had left

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return folder, self.checkpoint_engine.load(str(Path(folder) / tag / "shards" / "rank0.pt"), map_location="cpu")

    def read(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location, weights_only=False)


class Full:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


class FullDisk(Engine):
    weights = Full()


def make(output_dir: Path, step: int, ranks: int = 1, complete: bool = True) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "shard.pt").write_bytes(b"x" * 10)
    write_json(path / "complete.json", {"step": step, "world_size": ranks, "files": {"shard.pt": (10, zlib.crc32(b"x" * 10))}})
    rewritten(path)
    if not complete:
        (path / "complete.json").unlink()
    return path


def rewritten(path: Path, **changed: Any) -> None:
    """Other entries in a checkpoint's list, as another revision would have written them."""
    listed = {**read_json(path / "complete.json"), **changed}
    listed = {name: value for name, value in listed.items() if name != "crc32" and value is not None}
    listed["crc32"] = zlib.crc32(json.dumps(listed, sort_keys=True).encode())
    write_json(path / "complete.json", listed)


def save(output_dir: Path, step: int, engine: Any = None, **kept: Any) -> Path:
    return checkpoint.save(engine or Engine(), TrainState(step=step), output_dir, ONE, **{"keep": 1} | kept)


def continued(output_dir: Path) -> Path | None:
    return checkpoint.find(output_dir, "auto", ONE)


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


LIST, SUM = "complete.json", zlib.crc32(b"x" * 10)
INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file cut short": (lambda path: (path / "shard.pt").write_bytes(b"x" * 9), "shard.pt has 9 bytes instead of 10"),
    "a file lost": (lambda path: (path / "shard.pt").unlink(), "shard.pt is missing"),
    "no list": (lambda path: (path / LIST).unlink(), LIST),
    **{
        f"{text} for a list": (lambda path, text=text: (path / LIST).write_text(text), LIST)
        for text in ("", "[]", '{"step": 3}', '{"files": {"a": [1, 2]}', '{"files": {"a": 1}}', '{"files": [1]}')
    },
    **{
        f"{change} changed": (
            lambda path, change=change: write_json(path / LIST, read_json(path / LIST) | change),
            f"{LIST} is damaged",
        )
        for change in ({"step": 4}, {"world_size": 2}, {"run_id": "b"}, {"files": {}})
    },
    "a file elsewhere": (lambda path: rewritten(path, files={"../outside.pt": (10, SUM)}), "plain name of a file"),
    "a file by its path": (lambda path: rewritten(path, files={str(path.parent / "outside.pt"): (10, SUM)}), "plain name of a file"),
    "a link out": (lambda path: [(path / "link.pt").symlink_to("../outside.pt"), rewritten(path, files={"link.pt": (10, SUM)})], "link.pt"),
    "another step than its name": (lambda path: path.rename(path.with_name("checkpoint-30")), "its name is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_checkpoint_that_is_not_whole_is_told(case, tmp_path):
    """A resume takes its step, ranks and MLflow run from the list; a file elsewhere has the right size and sum."""
    (tmp_path / "outside.pt").write_bytes(b"x" * 10)
    change, named = INCOMPLETE[case]
    path = make(tmp_path, 3)
    assert checkpoint.incomplete(path) is None
    change(path)
    (path,) = tmp_path.glob("checkpoint-*")
    assert named in str(checkpoint.incomplete(path))
    assert checkpoint.incomplete(make(tmp_path, 5).rename(tmp_path / "mine")) is None


def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    (mine := tmp_path / "mine").mkdir()
    (run := tmp_path / "run").mkdir()
    (mine / "thesis.tex").write_text("mine")
    (run / "checkpoint-3.partial").symlink_to(mine)
    (run / "checkpoint-2.partial").symlink_to(mine)
    saved = save(run, 3)
    assert not saved.is_symlink() and checkpoint.incomplete(saved) is None and names(run) == {"checkpoint-3"}
    assert names(mine) == {"thesis.tex"}


def test_auto_takes_the_newest_complete_one_by_number(tmp_path, capsys):
    make(tmp_path, 9), make(tmp_path, 10), make(tmp_path, 100, complete=False)
    make(tmp_path, 200).rename(tmp_path / "checkpoint-200.partial")
    make(tmp_path, 300).rename(tmp_path / "best"), make(tmp_path, 8).rename(tmp_path / "older")
    assert continued(tmp_path) == tmp_path / "checkpoint-10" == checkpoint.newest(tmp_path)
    said = capsys.readouterr().out
    assert "checkpoint-100: " in said and f"{tmp_path / 'best'} is a checkpoint of step 300" in said
    assert not any(name in said for name in ("checkpoint-9:", "200", "older"))
    assert checkpoint.find(tmp_path, str(tmp_path / "older"), ONE) == tmp_path / "older"
    for wanted, named in ((str(tmp_path / "checkpoint-100"), "checkpoint-100"), ("never", "holds checkpoint-")):
        with pytest.raises(ConfigError, match=named):
            checkpoint.find(tmp_path, wanted, ONE)
    assert checkpoint.find(tmp_path / "absent", "never", ONE) is None


def test_nothing_starts_over_beside_checkpoints_that_cannot_be_used(tmp_path):
    """Damaged, foreign or under another name: refused, unless told. What a killed save has left is no checkpoint."""
    assert continued(tmp_path) is None
    assert checkpoint.find(tmp_path / "absent", "auto", ONE) is None
    make(tmp_path, 4).rename(tmp_path / "checkpoint-4.partial"), make(tmp_path, 3).rename(tmp_path / "checkpoint-3.old.partial")
    assert continued(tmp_path) is None
    for name in ("kept", "checkpoint-50"):
        moved = make(tmp_path, 5).rename(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{name}: .* step 5"):
            continued(tmp_path)
        assert checkpoint.find(tmp_path, "restart", ONE) is None
        shutil.rmtree(moved)
    make(tmp_path, 5, complete=False), make(tmp_path, 6).rename(tmp_path / "best")
    with pytest.raises(ConfigError, match=r"checkpoint-5: .* \(1 more\)"):
        continued(tmp_path)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        checkpoint.newest(tmp_path)
    make(tmp_path, 2)
    assert checkpoint.find(tmp_path, "restart", ONE) == tmp_path / "checkpoint-2", "a restarted run goes on like any other"


def test_a_save_keeps_the_newest_by_number_multiples_and_the_best(tmp_path):
    """It replaces what a killed save has left, an unfinished folder of its step, and a file of its name; one that was passed over counts
    for nothing."""

    def after(step: int, **kept: Any) -> set[str]:
        saved = checkpoint.save(Engine(), TrainState(step=step, best=kept.pop("best", None)), tmp_path, ONE, **kept)
        assert saved == tmp_path / f"checkpoint-{step}" and checkpoint.incomplete(saved) is None
        return names(tmp_path)

    make(tmp_path, 7).rename(tmp_path / "checkpoint-7.partial")
    make(tmp_path, 8, complete=False).rename(tmp_path / "checkpoint-8.old.partial")
    make(tmp_path, 9, complete=False)
    (tmp_path / "checkpoint-10").write_text("x")
    assert after(9, keep=1) == {"checkpoint-9", "checkpoint-10"} and not (tmp_path / "checkpoint-9" / "shard.pt").exists()
    assert after(10, keep=2) == {"checkpoint-9", "checkpoint-10"} and after(100, keep=2) == {"checkpoint-10", "checkpoint-100"}
    assert after(101, keep=0) == {"checkpoint-10", "checkpoint-100", "checkpoint-101"}, "0 keeps all"
    kept = {"checkpoint-10", "checkpoint-100", "checkpoint-101", "checkpoint-105"}
    assert after(105, best={"step": 101, "value": 61.0}, keep=1, keep_every=10) == kept
    assert after(110, best={"step": 110, "value": 62.0}, keep=1) == {"checkpoint-110"}
    make(tmp_path, 130, complete=False)
    after(120, keep=1)
    assert continued(tmp_path) == tmp_path / "checkpoint-120"


def test_a_full_disk_leaves_the_older_checkpoint_to_resume_from(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(checkpoint.SaveError, match=r"checkpoint-2 .*rank 0: .*No space left"):
        save(tmp_path, 2, FullDisk())
    assert names(tmp_path) == {"checkpoint-1"}, "what was written of it takes no room"
    assert continued(tmp_path) == tmp_path / "checkpoint-1"
    save(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-2"}


@pytest.mark.parametrize("part", ["_copy_recovery_script", "_publish"])
def test_what_rank_0_alone_cannot_write_is_an_error_too(part, tmp_path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    save(tmp_path, 1)
    monkeypatch.setattr(Engine if part.startswith("_copy") else saving, part, full)
    with pytest.raises(checkpoint.SaveError, match="Disk quota exceeded"):
        save(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-1"}


def test_a_write_that_torch_cannot_end_is_named_and_gives_its_room_back(tmp_path):
    """The system refuses the file; one that is removed and still open would keep the disk full."""

    class Large(Engine):
        weights = torch.zeros(100_000)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(checkpoint.SaveError, match=r"rank 0: \[Errno 27\] File too large"):
            save(tmp_path, 2, Large())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists() or entry.is_symlink()]
    assert not [link for link in links if str(tmp_path) in link] and not names(tmp_path)


def test_a_damaged_file_is_named_and_the_next_older_checkpoint_taken(tmp_path, capsys):
    """One bit of a newest checkpoint's shard, which sizes do not show."""
    for step in (1, 2):
        saved = save(tmp_path, step, keep=2)
    shard = saved / "shards" / "rank0.pt"
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 4
    shard.write_bytes(contents)
    assert checkpoint.incomplete(saved) is None
    assert continued(tmp_path) == tmp_path / "checkpoint-1"
    said = capsys.readouterr().out
    assert f"skipped {saved}: shards/rank0.pt is damaged: its CRC-32 is {zlib.crc32(contents):08x} instead of" in said
    with pytest.raises(ConfigError, match=r"checkpoint-2: shards/rank0\.pt"):
        checkpoint.find(tmp_path, str(saved), ONE)
    (saved / "script.py").write_text("fail")
    assert checkpoint.damaged(saved, ["script.py"]), "files that no rank has noted are summed too"


def test_a_sum_is_taken_while_a_file_is_written(tmp_path, monkeypatch):
    """Of weights as zlib finds it in the file: a checkpoint of a large model is not read again."""

    class Large(Engine):
        weights = torch.arange(100_000)

    read = list[str]()
    monkeypatch.setattr(saving, "crc32_of", lambda file: read.append(file.name) or crc32_of(file))
    saved = save(tmp_path, 1, Large())
    files = read_json(saved / "complete.json")["files"]
    assert set(read) == {"script.py", "complete.json"} and {"shards/rank0.pt", "random-state-0.pt"} < set(files)
    for name, (size, crc32) in files.items():
        content = (saved / name).read_bytes()
        assert (size, crc32) == (len(content), zlib.crc32(content))
    assert torch.equal(torch.load(saved / "shards" / "rank0.pt", mmap=True)["weights"], Large.weights)


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """A power loss must not leave a visible checkpoint with empty files: contents, then entries of folders, then the rename."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), replace(source, target)))
    save(tmp_path, 4)
    partial = str(tmp_path / "checkpoint-4.partial")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    expected = {f"{partial}{name}" for name in ("", "/shards", "/shards/rank0.pt", "/random-state-0.pt", "/script.py", "/complete.json")}
    assert set(before) == expected and before.index(f"{partial}/complete.json") < before.index(partial)
    assert after == [str(tmp_path)]


def test_state_and_random_numbers_come_back(tmp_path):
    state = TrainState(3, {"epoch": 1, "position": 16}, run_id="r1", baseline_lp=-2.5, best={"step": 2, "value": 50.0})
    torch.manual_seed(7), random.seed(7)
    saved = checkpoint.save(Engine(), state, tmp_path, ONE, keep=1)
    expected = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(8), random.seed(8)
    back = TrainState()
    checkpoint.load(Engine(), saved, back, ONE, tmp_path)
    assert back == state
    assert (torch.rand(3).tolist(), random.random()) == expected


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    saved = checkpoint.save(Engine(), TrainState(3, {"samples_seen": 6}), tmp_path, ONE, keep=1)
    for schema in (None, 1):
        rewritten(saved, schema=schema)
        for read in (lambda: checkpoint.kept_state(saved), lambda: checkpoint.load(Engine(), saved, TrainState(), ONE, tmp_path)):
            with pytest.raises(ConfigError, match=f"^{saved} was written by another version"):
                read()


class Payload:
    """What a pickle can do to whoever loads it: here, make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["random-state-0.pt", "shards/rank0.pt"])
def test_what_a_checkpoint_pickles_is_not_run(where, tmp_path):
    """A whole checkpoint by its list, made by somebody else; DeepSpeed's reader is that of the engine."""
    saved = save(tmp_path, 3, engine := Engine())
    torch.save({"python": Payload(tmp_path / "taken over")}, saved / where)
    rewritten(saved, files={str(file.relative_to(saved)): list(flushed(file)) for file in saved.rglob("*.pt")})
    assert checkpoint.incomplete(saved) is None
    with pytest.raises(ConfigError, match=where):
        checkpoint.load(engine, saved, TrainState(), ONE, tmp_path)
    assert not (tmp_path / "taken over").exists()


def test_what_the_library_cannot_load_is_one_sentence(tmp_path):
    class Stumbling(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> Any:
            return folder, {"copied": torch.zeros(3).copy_(torch.zeros(2))}

    class Refusing(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> Any:
            return None, None

    saved = save(tmp_path, 3)
    for engine, reason in ((Stumbling(), "RuntimeError"), (Refusing(), "DeepSpeed")):
        with pytest.raises(ConfigError, match=f"checkpoint-3.*{reason}"):
            checkpoint.load(engine, saved, TrainState(), ONE, tmp_path)


def test_the_best_value_is_the_first_of_the_highest():
    state = TrainState(1)
    assert [state.evaluated(value) for value in (50.0, 50.0, math.nan, 49.0)] == [True, False, False, False]
    assert (state.best, state.worse) == ({"step": 1, "value": 50.0}, 3)
    state.step_done({})
    assert state.step == 2 and state.evaluated(50.5) and (state.best, state.worse) == ({"step": 2, "value": 50.5}, 0)
