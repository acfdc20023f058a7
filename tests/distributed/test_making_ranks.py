"""The step verify under several ranks: the bytes are those of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import run_ranks

from cfvlm_ds.cli.main import main


@pytest.mark.long
def test_verdicts_of_two_ranks_are_those_of_one(model_dir: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    """Killed after its first records too: what is there is not done again, and the others wait for rank 0 alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["data", "propose", str(manifests["test"]), "--out", str(whole), "--format", "cfgroup"])
    main(["data", "edit", str(whole), "--with", "none"])
    shutil.copytree(whole, parts)
    options = ["--scorer", str(model_dir), "--batch_size", "3"]
    main(["data", "verify", str(whole), *options])
    ended = run_ranks(2, "cfvlm_ds.cli.main:main", ["data", "verify", str(parts), *options], said=tmp_path / "said")
    assert [code for code, _ in ended] == [0, 0], ended
    assert "scored" in ended[0][1] and "verify:" not in ended[1][1]
    expected = (whole / "verify" / "shard-00000.jsonl").read_bytes()
    assert expected.count(b'"scores"') > 4 and (parts / "verify" / "shard-00000.jsonl").read_bytes() == expected
    (parts / "verify" / "shard-00000.done.json").unlink()
    (parts / "verify" / "shard-00000.jsonl").write_bytes(expected[: len(expected) // 2])
    ended = run_ranks(2, "cfvlm_ds.cli.main:main", ["data", "verify", str(parts), *options], said=tmp_path / "again")
    assert [code for code, _ in ended] == [0, 0] and (parts / "verify" / "shard-00000.jsonl").read_bytes() == expected
    ended = run_ranks(2, "cfvlm_ds.cli.main:main", ["data", "edit", str(parts), "--with", "none"], said=tmp_path / "edit")
    assert [code for code, _ in ended] == [2, 2] and "data edit is for one process, and 2 were started" in ended[0][1]
