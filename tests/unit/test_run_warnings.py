"""What a run says of itself: what a training has cost, since when, and options that do nothing in its data."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ONE

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.objectives import OBJECTIVES, Align, BatchAlign, ContrastDistill, Misp, Retain, Sham, SymMPO
from cfvlm_ds.training.results import summary_of
from cfvlm_ds.training.run_warnings import Displacement, Idle
from cfvlm_ds.training.skipped import NonfiniteSteps


def config(terms: dict[str, Any], **train: Any) -> Any:
    options = {"displacement_warning": 0.1, "hard_negatives": None, **train}
    return SimpleNamespace(objective=terms, train=SimpleNamespace(**options))


def test_a_fall_stands_in_the_results_with_its_last_value(tmp_path):
    """The console repeats the warning only when the fall has doubled; results.md has that of the last record, or none after a recovery,
    also if another process trained.
    """
    said: list[str] = []
    state, records = TrainState(), [{"logp/lp_00": value} for value in (-1.0, -1.2, -1.3, -1.05, -1.35)]
    displacement = Displacement(config({"align": Align()}), state, said.append)
    for record in records:
        displacement.recorded(record)
    resumed = Displacement(config({"align": Align()}), state, said.append)
    warnings = list(map(resumed.warning, records))
    fallen = [re.findall(r"fell (\d\.\d\d) nats", warning) for warning in warnings]
    assert fallen == [[], ["0.20"], ["0.30"], [], ["0.35"]] and [line for line in said if "fell 0.20" in line] == said
    run = parse_config([f"--train.output_dir={tmp_path}", "--data.train=t.jsonl"], OBJECTIVES)
    assert f".\n\n{warnings[-1]}\n\n" in summary_of(run, "5 steps", {}, [], warnings[-1])
    assert "resume_changes.jsonl" not in summary_of(run, "5 steps", {}, [], "")
    (tmp_path / "resume_changes.jsonl").touch()
    assert "see resume_changes.jsonl.\n" in summary_of(run, "5 steps", {}, [], "")


def test_options_that_do_nothing_are_named_once():
    said: list[str] = []
    terms = {"retain": Retain(), "symmpo": SymMPO(), "misp": Misp(), "batchalign": BatchAlign(texts=8)}
    terms |= {"sham": Sham(), "contrast_distill": ContrastDistill()}
    idle = Idle(config(terms, hard_negatives=2), said.append)
    busy = {"retain/ratio": 0.0, "symmpo/accuracy": 1.0, "misp/accuracy": 1.0, "loss/sham": 0.0, "loss/contrast_distill": 0.1}
    idle.recorded(busy | {"batchalign/texts": 4.0, "hard_negatives/proposed": 3.0, "hard_negatives/entered": 1.5})
    assert not said
    for _ in range(2):
        idle.recorded({"batchalign/texts": 3.9, "hard_negatives/proposed": 1.5, "hard_negatives/entered": 1.5})
    assert [line.split()[1] for line in said] == [
        "objective.retain", "objective.symmpo", "objective.misp", "objective.contrast_distill", "objective.sham",
        "objective.batchalign.texts", "train.hard_negatives",
    ]  # fmt: skip
    assert "requests 8 texts per image, but a step has only 3.9" in said[5] and "train.hard_negatives 2 left nothing out" in said[6]


def test_ten_steps_in_a_row_may_be_skipped(tmp_path):
    train: Any = SimpleNamespace(on_nonfinite="skip")
    nonfinite = NonfiniteSteps(train, tmp_path, ONE)
    for step in (*range(1, 11), *range(12, 22)):
        if step == 12:
            nonfinite.finite()
        nonfinite.note(step, [], "loss", applied=False)
    with pytest.raises(FloatingPointError, match=r"at step 22; .* the 11th such step in a row"):
        nonfinite.note(22, [], "loss", applied=False)
