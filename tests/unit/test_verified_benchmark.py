"""The benchmark of verification on a small world: its counts against a count of the journal, the choice of a verdict, its tables."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import verified
from conftest import REPO


def test_verdicts_of_a_small_world(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(verified.EDITORS, "scenes", verified.editor.SceneEditor)  # as main does, and gone afterwards
    given = "--parts verdicts --questions VQAScore --sources 12 --num_test 18 --num_questions 9"
    monkeypatch.setattr(
        sys, "argv", ["verified.py", *given.split(), "--out", str(tmp_path / "out"), "--records", str(tmp_path / "records")]
    )
    verified.main()
    said = capsys.readouterr().out
    truth = verified.truth_of(verified.WorkFolder.open(tmp_path / "out" / "W").path, tmp_path / "out" / "scenes", 0.5)
    faults = Counter(fault for _, fault in truth.values())
    assert faults.keys() >= {"none", "nothing", "wrong"} and all(right for right, fault in truth.values() if fault == "none")
    assert not any(right for right, fault in truth.values() if fault in ("nothing", "wrong"))
    for name in ("pixels", "base-vqascore"):
        found = verified.read_records(tmp_path / "records" / verified.RUNS)[f"verdicts-{name}"]
        assert found["candidates"] == len(truth) and found["faults"] == faults
        assert found["right"] == sum(right for right, _ in truth.values())
        for rule, each in found["rules"].items():
            kept = each["plain"]
            assert kept["precision"] == pytest.approx(kept["right_kept"] / kept["kept"], abs=1e-4), rule
            assert kept["recall"] == pytest.approx(kept["right_kept"] / found["right"], abs=1e-4), rule
            assert each["kept_of_fault"]["nothing"] == 0.0, "a picture in which nothing changed is kept by no verdict"
            own = sum(share * faults[fault] for fault, share in each["kept_of_fault"].items() if share is not None)
            assert own == pytest.approx(kept["kept"], abs=0.2), rule
    assert "| pixels |  | checks |" in said and "| base VQAScore likelihood |" in said


def test_the_verdict_that_is_trained_on(tmp_path):
    """The one that keeps most good labels at the precision; where none reaches it, the most precise without a margin."""

    def written(name: str, rules: dict[str, Any]) -> None:
        verified.add_record(tmp_path / verified.RUNS, f"verdicts-{name}", {"question": "q", "work": name, "rules": rules})

    plain = {"precision": 0.8}, {"precision": 0.9}
    written("a", {"match": {"plain": plain[1], "calibrated": None}, "both": {"plain": plain[0], "calibrated": None}})
    best = verified.best_verdict(tmp_path)
    assert (best["work"], best["rule"], best["margin"], best["drop"]) == ("a", "match", 0.0, None)
    for name, kept in (("b", 40), ("c", 70)):
        fitted = {"margin": 1.0, "drop": kept / 10, "good_kept_of_labels": kept}
        written(name, {"likelihood": {"plain": plain[0], "calibrated": fitted}})
    best = verified.best_verdict(tmp_path)
    assert (best["work"], best["rule"], best["margin"], best["drop"]) == ("c", "likelihood", 1.0, 7.0)


def test_the_tables_of_what_the_repository_holds(capsys):
    verified.report(verified.RECORDS)
    verified.report(verified.RECORDS / "trained")
    said = capsys.readouterr().out
    told = (REPO / "docs" / "campaign.md").read_text()
    for number in ("96.5", "62.7", "81.5", "78.7", "82.5"):
        assert number in said and number in told
