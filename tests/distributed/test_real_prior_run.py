"""The benchmark of real priors from a language model's folder to its tables, two steps each: every part through the public commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import real_prior as bench
from conftest import read_rows, run_ranks
from cut_outs import write_cut_outs, write_language_model

SIZES = {"natural": 32, "train": 8, "validation": 4, "test": 8, "yes_no": 4, "names": 2}


@pytest.mark.long
def test_every_part_and_the_tables(tmp_path, monkeypatch):
    started: list[str] = []

    def run_process(command: Sequence[str], folder: Path, variables: dict[str, str], leaves: str = "") -> float:
        """As forks of what has imported everything; a step of a fine-tuning with contrasts takes two seconds, of any other one."""
        if (folder / "done").exists():
            return float((folder / "done").read_text())
        started.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        file, rest = ("train.py", command[2:]) if command[1] == "train.py" else ("cfvlm_ds/__main__.py", command[3:])
        ((code, said),) = run_ranks(1, "forkserver_ranks:script", file, list(rest), said=folder.with_suffix(".said"))
        assert code == 0, said[-4000:]
        steps = next((int(part.split("=")[1]) for part in command if part.startswith("--train.max_steps=")), 0)
        spent = steps * (1.0 if any("csd.weight=0" in part for part in command) else 2.0)
        (folder / "done").write_text(str(spent))
        return spent

    monkeypatch.setattr(bench, "run_process", run_process)
    monkeypatch.setattr(bench, "LONG", 3)
    options = ["--font", str(write_cut_outs(tmp_path / "cut_outs")), "--language_model", str(write_language_model(tmp_path / "language"))]
    options += ["--out", str(tmp_path / "out"), "--records", str(tmp_path / "records"), "--sizes", json.dumps(SIZES)]
    options += ["--tower_steps", "2", "--base_steps", "2", "--steps", "2", "--seeds", "1", "--arms", "dpo", "default", "default-retain"]
    bench.main([*options, "--parts", "model", "pictures", "base"])
    assert started == ["evaluated-language_model", "tower", "base", "evaluated-base"]
    bench.main([*options, "--parts", "arms"])
    found: dict[str, Any] = bench.read_records(tmp_path / "records" / bench.RUNS)
    assert found.keys() == {"pictures", "language_model", "base", "dpo-5e-4-seed0", "default-5e-4-seed0", "default-retain-5e-4-seed0"}
    assert found["default-5e-4-seed0"]["steps"] == 2 and found["dpo-5e-4-seed0"]["steps"] == 4, "equal processor seconds"
    trained = read_rows(tmp_path / "out" / "arm-default-retain-5e-4-seed0" / "metrics.jsonl")
    assert any("loss/retain/natural" in row for row in trained) and not any("loss/retain/train" in row for row in trained)
    for name in ("base", "dpo-5e-4-seed0", "default-5e-4-seed0", "default-retain-5e-4-seed0"):
        assert set(found[name]["results"]) == set(bench.TESTS)
        assert set(found[name]["results"]["test"]) == {"colour", "count", "place", "side"}
    blind = found["language_model"]["results"]["test"]["colour"]
    assert blind["agree"] == blind["blind_agree"] and blind["pair"] == 50, "no picture reaches a language model that was taught none"
    text = (tmp_path / "out" / "real_prior.md").read_text()
    assert "| DPO, 5e-4 | 1 | 4 |" in text and "| SmolLM2, before any picture |" in text
    before = list(started)
    bench.main([*options, "--parts", "base", "arms"])
    assert started == before, "what is there is not run again"
    assert not list((tmp_path / "out").glob("arm-*/checkpoint-*/*.pt"))
