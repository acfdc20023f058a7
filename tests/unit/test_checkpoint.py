"""Which checkpoint is continued from, which are kept, and what a half-written one is worth; folders made by hand, no engine."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ONE

from cfvlm_ds import checkpoint
from cfvlm_ds.checkpoint import TrainState, saving
from cfvlm_ds.checkpoint.saving import flushed
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import crc32_of


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
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
    if complete:
        files = {"shard.pt": (10, zlib.crc32(b"x" * 10))}
        listed = {"step": step, "world_size": ranks, "files": files}
        listed["crc32"] = zlib.crc32(json.dumps(listed, sort_keys=True).encode())
        (path / "complete.json").write_text(json.dumps(listed))
    return path


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


def test_incomplete_says_what_is_wrong(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    assert checkpoint.incomplete(path) is None
    (path / "shard.pt").write_bytes(b"x" * 9)
    assert checkpoint.incomplete(path) == "shard.pt has 9 bytes instead of 10"
    (path / "shard.pt").unlink()
    assert checkpoint.incomplete(path) == "shard.pt is missing"
    for broken in ("", "[]", '{"step": 3}', '{"files": {"a": [1, 2]}', '{"files": {"a": 1}}', '{"files": [1]}'):
        (path / "complete.json").write_text(broken)
        assert "complete.json is missing or broken" in str(checkpoint.incomplete(path))
    (path / "complete.json").unlink()
    assert "never finished" in str(checkpoint.incomplete(path))
    assert "never finished" in str(checkpoint.incomplete(tmp_path / "absent"))


def test_a_list_that_names_files_elsewhere(tmp_path: Path) -> None:
    """Of the right size and sum, so that nothing but its place is wrong with them."""
    outside = tmp_path / "outside.pt"
    outside.write_bytes(b"x" * 10)
    cases = {"../outside.pt": "is no bare file name", str(outside): "is no bare file name", "link.pt": "leads out of its folder"}
    for step, (name, said) in enumerate(cases.items()):
        path = make(tmp_path, step)
        (path / "link.pt").symlink_to(outside)
        listed = {"step": step, "world_size": 1, "files": {name: (10, zlib.crc32(b"x" * 10))}}
        listed["crc32"] = zlib.crc32(json.dumps(listed, sort_keys=True).encode())
        (path / "complete.json").write_text(json.dumps(listed))
        assert said in str(checkpoint.incomplete(path)), name


def test_a_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    (run := tmp_path / "run").mkdir()
    (mine / "thesis.tex").write_text("mine")
    (run / "checkpoint-3.partial").symlink_to(mine)
    (run / "checkpoint-2.partial").symlink_to(mine)
    saved = checkpoint.save(Engine(), TrainState(step=3), run, ONE, keep=1)
    assert not saved.is_symlink() and checkpoint.incomplete(saved) is None and names(run) == {"checkpoint-3"}
    assert names(mine) == {"thesis.tex"}


@pytest.mark.parametrize("change", [{"step": 4}, {"world_size": 2}, {"run_id": "b"}, {"files": {}}])
def test_a_list_of_files_that_was_changed_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    """A resume takes its step, its ranks and its MLflow run from there."""
    saved = checkpoint.save(Engine(), TrainState(step=5, run_id="a"), tmp_path, ONE, keep=0)
    listed = json.loads((saved / "complete.json").read_text())
    (saved / "complete.json").write_text(json.dumps({**listed, **change}))
    assert checkpoint.incomplete(saved) == "complete.json is damaged"


def test_a_number_that_is_not_the_step_is_no_name(tmp_path: Path) -> None:
    moved = make(tmp_path, 3).rename(tmp_path / "checkpoint-30")
    assert checkpoint.incomplete(moved) == "it was written at step 3, so its name is wrong"
    assert checkpoint.incomplete(moved.rename(tmp_path / "mine")) is None


def test_auto_takes_the_newest_complete_one_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 9), make(tmp_path, 10), make(tmp_path, 100, complete=False)
    make(tmp_path, 200).rename(tmp_path / "checkpoint-200.partial")
    make(tmp_path, 300).rename(tmp_path / "checkpoint-best")
    assert checkpoint.find(tmp_path, "auto", ONE) == tmp_path / "checkpoint-10"
    said = capsys.readouterr().out
    assert "passed over" in said and "checkpoint-100: " in said and "checkpoint-9:" not in said and "200" not in said
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-10"


def test_nothing_starts_over_beside_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    """Damaged, foreign or under another name: refused, unless told. What a killed save has left is no checkpoint."""
    assert checkpoint.find(tmp_path, "auto", ONE) is None
    assert checkpoint.find(tmp_path / "absent", "auto", ONE) is None
    make(tmp_path, 4).rename(tmp_path / "checkpoint-4.partial"), make(tmp_path, 3).rename(tmp_path / "checkpoint-3.old.partial")
    assert checkpoint.find(tmp_path, "auto", ONE) is None
    remedy = (
        "restore one or give train.resume the path of another, choose another train.output_dir, or set train.resume to restart to start"
    )
    for name, defect in (
        ("kept", "kept: it is a checkpoint of step 5 under another name than checkpoint-5"),
        ("checkpoint-50", "checkpoint-50: it was written at step 5, so its name is wrong"),
    ):
        moved = make(tmp_path, 5).rename(tmp_path / name)
        with pytest.raises(ConfigError, match=re.escape(f"holds checkpoints of which none can be continued from: {defect}; {remedy}")):
            checkpoint.find(tmp_path, "auto", ONE)
        assert checkpoint.find(tmp_path, "restart", ONE) is None
        shutil.rmtree(moved)
    make(tmp_path, 5, complete=False), make(tmp_path, 6).rename(tmp_path / "best")
    with pytest.raises(ConfigError, match=r"checkpoint-5: complete\.json is missing.* \(1 more\); restore"):
        checkpoint.find(tmp_path, "auto", ONE)
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        checkpoint.newest(tmp_path)
    make(tmp_path, 2)
    assert checkpoint.find(tmp_path, "restart", ONE) == tmp_path / "checkpoint-2", "a restarted run goes on like any other"


def test_a_newer_one_under_another_name_is_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 9).rename(tmp_path / "older"), make(tmp_path, 300).rename(tmp_path / "best"), make(tmp_path, 10)
    assert checkpoint.find(tmp_path, "auto", ONE) == tmp_path / "checkpoint-10"
    said = capsys.readouterr().out
    assert f"{tmp_path / 'best'} is a checkpoint of step 300 and not continued from" in said and "older" not in said


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "never", ONE) is None
    make(tmp_path, 5, complete=False)
    with pytest.raises(ConfigError, match=r"already holds checkpoint-5; use train\.resume=auto or another output_dir"):
        checkpoint.find(tmp_path, "never", ONE)


def test_named_one_is_taken_or_refused(tmp_path: Path) -> None:
    older, newer = make(tmp_path / "other", 4), make(tmp_path, 8, complete=False)
    make(tmp_path, 7)
    assert checkpoint.find(tmp_path, str(older), ONE) == older
    with pytest.raises(ConfigError, match=r"checkpoint-8.*never finished.*name a complete checkpoint or use auto"):
        checkpoint.find(tmp_path, str(newer), ONE)


def test_saving_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        saved = checkpoint.save(Engine(), TrainState(step=step), tmp_path, ONE, keep=2)
        assert saved == tmp_path / f"checkpoint-{step}" and checkpoint.incomplete(saved) is None
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-100"}
    checkpoint.save(Engine(), TrainState(step=101), tmp_path, ONE, keep=0)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-100", "checkpoint-101"}, "0 keeps all"


def test_the_list_covers_files_in_subfolders(tmp_path: Path) -> None:
    saved = checkpoint.save(Engine(), TrainState(step=1), tmp_path, ONE, keep=1)
    with (saved / "shards" / "rank0.pt").open("ab") as handle:
        handle.write(b"!")
    assert "rank0.pt has" in str(checkpoint.incomplete(saved))


def test_a_full_disk_leaves_the_older_checkpoint_to_resume_from(tmp_path: Path) -> None:
    checkpoint.save(Engine(), TrainState(step=1), tmp_path, ONE, keep=1)
    with pytest.raises(checkpoint.SaveError, match=r"checkpoint-2 cannot be written \(rank 0: .*No space left.*\); make room or"):
        checkpoint.save(FullDisk(), TrainState(step=2), tmp_path, ONE, keep=1)
    assert names(tmp_path) == {"checkpoint-1"}, "what was written of it takes no room"
    assert checkpoint.find(tmp_path, "auto", ONE) == tmp_path / "checkpoint-1"
    checkpoint.save(Engine(), TrainState(step=2), tmp_path, ONE, keep=1)
    assert names(tmp_path) == {"checkpoint-2"}


@pytest.mark.parametrize("part", ["_copy_recovery_script", "_publish"])
def test_what_rank_0_alone_cannot_write_is_an_error_too(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    checkpoint.save(Engine(), TrainState(step=1), tmp_path, ONE, keep=1)
    monkeypatch.setattr(Engine if part.startswith("_copy") else saving, part, full)
    with pytest.raises(checkpoint.SaveError, match="Disk quota exceeded"):
        checkpoint.save(Engine(), TrainState(step=2), tmp_path, ONE, keep=1)
    assert names(tmp_path) == {"checkpoint-1"}


def test_a_write_that_torch_cannot_end_is_named_and_gives_its_room_back(tmp_path: Path) -> None:
    """The system refuses the file; one that is removed and still open would keep the disk full."""

    class Large(Engine):
        weights = torch.zeros(100_000)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(checkpoint.SaveError, match=r"rank 0: \[Errno 27\] File too large"):
            checkpoint.save(Large(), TrainState(step=2), tmp_path, ONE, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists() or entry.is_symlink()]
    assert not [link for link in links if str(tmp_path) in link] and not names(tmp_path)


def test_remains_of_a_killed_save_are_removed_at_the_next(tmp_path: Path) -> None:
    make(tmp_path, 7).rename(tmp_path / "checkpoint-7.partial")
    make(tmp_path, 8, complete=False).rename(tmp_path / "checkpoint-8.old.partial")
    checkpoint.save(Engine(), TrainState(step=9), tmp_path, ONE, keep=1)
    assert names(tmp_path) == {"checkpoint-9"}


def test_a_damaged_file_is_named_and_the_next_older_checkpoint_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of a newest checkpoint's shard, which sizes do not show."""
    for step in (1, 2):
        saved = checkpoint.save(Engine(), TrainState(step=step), tmp_path, ONE, keep=2)
    shard = saved / "shards" / "rank0.pt"
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 4
    shard.write_bytes(contents)
    assert checkpoint.incomplete(saved) is None
    assert checkpoint.find(tmp_path, "auto", ONE) == tmp_path / "checkpoint-1"
    said = capsys.readouterr().out
    assert f"passed over {saved}: shards/rank0.pt is damaged: its CRC-32 is {zlib.crc32(contents):08x} instead of" in said
    with pytest.raises(ConfigError, match=r"checkpoint-2: shards/rank0\.pt is damaged.*name a complete checkpoint"):
        checkpoint.find(tmp_path, str(saved), ONE)
    (saved / "script.py").write_text("fail")
    assert checkpoint.damaged(saved, ["script.py"]), "files that no rank has noted are summed too"


def test_a_sum_is_taken_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights as zlib finds it in the file: a checkpoint of a large model is not read again."""

    class Large(Engine):
        weights = torch.arange(100_000)

    read = list[str]()
    monkeypatch.setattr(saving, "crc32_of", lambda file: read.append(file.name) or crc32_of(file))
    saved = checkpoint.save(Large(), TrainState(step=1), tmp_path, ONE, keep=1)
    files = json.loads((saved / "complete.json").read_text())["files"]
    assert set(read) == {"script.py", "complete.json"} and {"shards/rank0.pt", "random-state-0.pt"} < set(files)
    for name, (size, crc32) in files.items():
        content = (saved / name).read_bytes()
        assert (size, crc32) == (len(content), zlib.crc32(content))
    assert torch.equal(torch.load(saved / "shards" / "rank0.pt", mmap=True)["weights"], Large.weights)


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss must not leave a visible checkpoint with empty files: contents, then entries of folders, then the rename."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("rename"), replace(source, target)))
    checkpoint.save(Engine(), TrainState(step=4), tmp_path, ONE, keep=1)
    partial = str(tmp_path / "checkpoint-4.partial")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    expected = {f"{partial}{name}" for name in ("", "/shards", "/shards/rank0.pt", "/random-state-0.pt", "/script.py", "/complete.json")}
    assert set(before) == expected and before.index(f"{partial}/complete.json") < before.index(partial)
    assert after == [str(tmp_path)]


def test_multiples_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        checkpoint.save(Engine(), TrainState(step=step, best={"step": 15, "value": 61.0}), tmp_path, ONE, keep=1, keep_every=10)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-15", "checkpoint-20", "checkpoint-25"}
    checkpoint.save(Engine(), TrainState(step=30, best={"step": 30, "value": 62.0}), tmp_path, ONE, keep=1)
    assert names(tmp_path) == {"checkpoint-30"}


def test_a_newer_one_that_was_passed_over_does_not_count_as_kept(tmp_path: Path) -> None:
    make(tmp_path, 30, complete=False)
    checkpoint.save(Engine(), TrainState(step=25), tmp_path, ONE, keep=1)
    assert checkpoint.find(tmp_path, "auto", ONE) == tmp_path / "checkpoint-25"


def test_an_unfinished_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 3, complete=False)
    saved = checkpoint.save(Engine(), TrainState(step=3), tmp_path, ONE, keep=1)
    assert checkpoint.incomplete(saved) is None and not (saved / "shard.pt").exists()


def test_state_and_random_numbers_come_back(tmp_path: Path) -> None:
    state = TrainState(3, {"epoch": 1, "position": 16}, run_id="r1", baseline_lp=-2.5, best={"step": 2, "value": 50.0})
    torch.manual_seed(7), random.seed(7)
    saved = checkpoint.save(Engine(), state, tmp_path, ONE, keep=1)
    expected = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(8), random.seed(8)
    back = TrainState()
    checkpoint.load(Engine(), saved, back, ONE, tmp_path)
    assert back == state
    assert (torch.rand(3).tolist(), random.random()) == expected


def rewritten(path: Path, **changed: Any) -> None:
    """Other entries in a checkpoint's list, as another revision would have written them."""
    listed = {**json.loads((path / "complete.json").read_text()), **changed}
    listed = {name: value for name, value in listed.items() if name != "crc32" and value is not None}
    listed["crc32"] = zlib.crc32(json.dumps(listed, sort_keys=True).encode())
    (path / "complete.json").write_text(json.dumps(listed))


def test_a_checkpoint_of_another_version_is_named(tmp_path: Path) -> None:
    saved = checkpoint.save(Engine(), TrainState(3, {"samples_seen": 6}), tmp_path, ONE, keep=1)
    for schema in (None, 2):
        rewritten(saved, schema=schema)
        for read in (lambda: checkpoint.kept_state(saved), lambda: checkpoint.load(Engine(), saved, TrainState(), ONE, tmp_path)):
            with pytest.raises(ConfigError, match=f"^{saved} was written by another version of cfvlm-ds, .*; use that version"):
                read()


class Payload:
    """What a pickle can do to whoever loads it: here, make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["random-state-0.pt", "shards/rank0.pt"])
def test_what_a_checkpoint_pickles_is_not_run(where: str, tmp_path: Path) -> None:
    """A whole checkpoint by its list, made by somebody else; DeepSpeed's reader is that of the engine."""
    saved = checkpoint.save(engine := Engine(), TrainState(3, {}, "d"), tmp_path, ONE, keep=1)
    torch.save({"python": Payload(tmp_path / "taken over")}, saved / where)
    rewritten(saved, files={str(file.relative_to(saved)): list(flushed(file)) for file in saved.rglob("*.pt")})
    assert checkpoint.incomplete(saved) is None
    with pytest.raises(ConfigError, match=rf"{where} holds more than tensors, which would be run .*; name another checkpoint"):
        checkpoint.load(engine, saved, TrainState(), ONE, tmp_path)
    assert not (tmp_path / "taken over").exists()


def test_what_the_library_finds_in_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    class Stumbling(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
            return folder, {"copied": torch.zeros(3).copy_(torch.zeros(2))}

    saved = checkpoint.save(Engine(), TrainState(3, {}, "d"), tmp_path, ONE, keep=1)
    with pytest.raises(ConfigError, match=r"checkpoint-3 cannot be loaded \(RuntimeError: The size of tensor .*; name another checkpoint"):
        checkpoint.load(Stumbling(), saved, TrainState(), ONE, tmp_path)


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").write_text("x")
    checkpoint.save(Engine(), TrainState(3, {}, "d"), tmp_path, ONE, keep=0)
    assert names(tmp_path) == {"checkpoint-3"} and checkpoint.incomplete(tmp_path / "checkpoint-3") is None


def test_what_deepspeed_cannot_load_is_named(tmp_path: Path) -> None:
    class Refusing(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> tuple[None, None]:  # type: ignore[override]
            return None, None

    with pytest.raises(ConfigError, match="checkpoint-3: DeepSpeed could not load it"):
        checkpoint.load(Refusing(), make(tmp_path, 3), TrainState(), ONE, tmp_path)
