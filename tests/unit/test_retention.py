"""What a run says of itself: what a training has cost, since when, and options that do nothing in its data."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ONE

from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.evaluation import Accuracy
from cfvlm_ds.objectives import OBJECTIVES, Align, BatchAlign, Misp, Retain, SymMPO
from cfvlm_ds.training.idle import Idle
from cfvlm_ds.training.results import summary_of
from cfvlm_ds.training.retention import Retention
from cfvlm_ds.training.skipped import NonfiniteSteps


def config(*terms: Any, **train: Any) -> Any:
    options = {"displacement_warning": 0.1, "retention": None, "hard_negatives": None, **train}
    return SimpleNamespace(objective={type(term).__name__.lower(): term for term in terms}, train=SimpleNamespace(**options))


def found(nll: float, group: float | None = None) -> dict[str, list[Accuracy]]:
    return {"kept": [Accuracy("all", 4, {} if group is None else {"group": group}, mean=True, nll=nll)]}


def identity(rows: int, pictures: str | None = "p") -> dict[str, Any]:
    return {**dict.fromkeys(("order", "ids", "texts", "labels", "weights", "paths"), "x"), "rows": rows, "pictures": pictures}


def test_a_set_is_compared_with_its_first_evaluation():
    said: list[str] = []
    state = TrainState()
    run = config(Align(), retention=["kept", "absent"])
    retention = Retention(run, state, {"kept": identity(4), "absent": identity(1)}, said.append)
    assert retention.evaluated(found(1.0, 50.0)) == {"retention/kept/nll": 0.0, "retention/kept/accuracy": 0.0} and not said
    state.step = 7
    assert retention.evaluated(found(1.25, 40.0)) == {"retention/kept/nll": 0.25, "retention/kept/accuracy": -10.0}
    (line,) = said
    assert "data.evaluation.kept lost 0.25 nats per token since the start; add objective.retain" in line


def test_a_fall_stands_in_the_results_with_its_last_value():
    """The console repeats the warning only when the fall has doubled; results.md has that of the last record, or none after a recovery,
    also if another process trained.
    """
    said: list[str] = []
    state, records = TrainState(), [{"logp/lp_00": value} for value in (-1.0, -1.2, -1.3, -1.05, -1.35)]
    retention = Retention(config(Align()), state, {}, said.append)
    for record in records:
        retention.trained(record)
    resumed = Retention(config(Align()), state, {}, said.append)
    warnings = list(map(resumed.displacement, records))
    fallen = [re.findall(r"fell (\d\.\d\d) nats", warning) for warning in warnings]
    assert fallen == [[], ["0.20"], ["0.30"], [], ["0.35"]] and [line for line in said if "fell 0.20" in line] == said
    run = parse_config(["--train.output_dir=runs/mine", "--data.train=t.jsonl"], OBJECTIVES)
    assert f"\n\n{warnings[-1]}\n\n" in summary_of(run, 5, {}, [], warnings[-1])


def test_a_set_that_is_new_in_a_continued_run_is_compared_from_there_on():
    """One that is named only now, and one whose data have changed: neither is measured against what was never measured, or was another."""
    said: list[str] = []
    state = TrainState(step=30)
    run = config(Align(), Retain(), retention=["kept"])
    first = Retention(run, state, {"kept": identity(4)}, said.append)
    assert first.evaluated(found(1.0)) == {"retention/kept/nll": 0.0}
    (line,) = said
    assert "data.evaluation.kept " in line and "compared with step 30 " in line
    continued = TrainState(**{**vars(state), "step": 40})
    said.clear()
    same = Retention(run, continued, {"kept": identity(4, None)}, said.append)  # whose pictures are not looked at this time
    assert same.evaluated(found(1.3)) == {"retention/kept/nll": 1.3 - 1.0} and "lost 0.30 nats per token since step 30" in said[0]
    assert "raise objective.retain.weight" in said[0] and "add objective.retain" not in said[0]
    said.clear()
    other = Retention(run, continued, {"kept": identity(5)}, said.append)
    assert other.evaluated(found(9.0)) == {"retention/kept/nll": 0.0}
    (line,) = said
    assert "data.evaluation.kept " in line and "compared with step 40 " in line


def test_options_that_do_nothing_are_named_once():
    said: list[str] = []
    idle = Idle(config(Retain(), SymMPO(), Misp(), BatchAlign(texts=8), hard_negatives=2), said.append)
    busy = {"retain/ratio": 0.0, "symmpo/accuracy": 1.0, "misp/accuracy": 1.0, "batchalign/texts": 4.0}
    idle.recorded({"loss/retain": 0.0, "loss/symmpo": 1.0, "loss/misp": 1.0, "loss/sham": 0.1, "loss/contrast_distill": 0.1, **busy})
    idle.recorded({"hard_negatives/proposed": 3.0, "hard_negatives/entered": 1.5})
    assert not said
    for _ in range(2):
        idle.recorded({"loss/retain": 0.0, "loss/symmpo": 1.0, "loss/misp": 1.0, "batchalign/texts": 3.9})
        idle.recorded({"loss/sham": 0.0, "loss/contrast_distill": 0.0})
        idle.recorded({"hard_negatives/proposed": 1.5, "hard_negatives/entered": 1.5})
    assert [line.split()[1] for line in said] == [
        "objective.retain", "objective.symmpo", "objective.misp", "objective.batchalign.texts",
        "objective.contrast_distill", "objective.sham", "train.hard_negatives",
    ]  # fmt: skip
    assert "requests 8 texts per image, but a step has only 3.9" in said[3] and "train.hard_negatives 2 left nothing out" in said[6]


def test_ten_steps_in_a_row_may_be_skipped(tmp_path):
    train: Any = SimpleNamespace(on_nonfinite="skip")
    nonfinite = NonfiniteSteps(train, tmp_path, ONE)
    for step in (*range(1, 11), *range(12, 22)):
        if step == 12:
            nonfinite.finite()
        nonfinite.note(step, [], "loss", applied=False)
    with pytest.raises(FloatingPointError, match=r"at step 22; .* the 11th such step in a row"):
        nonfinite.note(22, [], "loss", applied=False)
