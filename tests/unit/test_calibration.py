"""What `cfvlm-ds calibrate` measures and recommends: gaps are those that the objective sees, and each choice has a case that turns it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_json, write_manifest

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.cli.main import main
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.evaluation.calibration import Gap, advice, gaps, quantile, table, warning
from cfvlm_ds.evaluation.scoring import GroupScores, score_groups
from cfvlm_ds.objectives import Csd


def scored(groups: Sequence[CounterfactualGroup], seed: int = 0) -> list[GroupScores]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(len(group.images), len(group.candidates)) for group in groups]
    return [GroupScores(-30 * torch.rand(shape, generator=rng), -30 * torch.rand(shape[1], generator=rng)) for shape in shapes]


def of(side: str, values: Sequence[float], tokens: int = 10, label: str = "colour") -> list[Gap]:
    return [Gap(side, (label,), value, tokens, 0.0 if side == "text" else None) for value in values]  # type: ignore[arg-type]


def normal(mean: float, spread: float, number: int = 400, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, spread) for _ in range(number)]


def test_gaps_are_those_that_training_compares(model_dir, tmp_path):
    """Text gaps are csd's own violations, but for shams, whose comparisons are others' again."""
    groups = read_manifest(write_manifest(tmp_path / "m.jsonl", 12))
    place, asked = next((place, group) for place, group in enumerate(groups) if len(group.images) > 1)
    texts = (*asked.candidates, Candidate("Is it red?", "yes"), Candidate("Is it red?", "no"))
    truth = tuple((*row, int(i > 0), 0) for i, row in enumerate(asked.match))  # of image 0 neither answer is true
    groups[place] = replace(asked, candidates=texts, match=truth)
    layout: GroupLayout = load_collator(ModelConfig(str(model_dir))).building("star", None)._layout(groups)
    scores = scored(groups)
    logp = torch.zeros(layout.valid.shape)
    for g, each in enumerate(scores):
        logp[g, : each.logp.shape[0], : each.logp.shape[1]] = each.logp
    shams = torch.zeros_like(layout.valid)
    for g, group in enumerate(groups):
        for edit in group.edits:
            if edit.type == "sham":
                shams[g, edit.image] = True
    seen = replace(layout, valid=layout.valid & ~shams)
    violation, mask = Csd().violations(Scores(seen, logp, logp).logp, seen)
    found = list(gaps(groups, scores, lambda group: 7))
    assert sorted(gap.nats for gap in found if gap.side == "text") == pytest.approx(sorted((-violation[mask]).tolist()))
    assert {gap.tokens for gap in found} == {7} and {label for gap in found for label in gap.labels} >= {"colour"}


def test_by_hand():
    """S = [[-1, -4], [-3, -1]], blank [-2, -5]: on image 0 the text wins by 3 and by its prior, on image 1 by 2 and against it."""
    pictures = ((Path("a.png"),), (Path("b.png"),))
    group = CounterfactualGroup("g", pictures, (Candidate("", "a b"), Candidate("", "a c")), ((1, 0), (0, 1)))
    score = GroupScores(torch.tensor([[-1.0, -4.0], [-3.0, -1.0]]), torch.tensor([-2.0, -5.0]))
    found = list(gaps([group], [score], lambda group: 2))
    assert sorted((gap.side, gap.nats, gap.prior) for gap in found if gap.side == "text") == [("text", 2.0, -3.0), ("text", 3.0, 3.0)]
    assert sorted(gap.nats for gap in found if gap.side == "image") == [2.0, 3.0]
    lines = table(found).splitlines()
    rates, quantiles = ("2", "100.0", "50.0", "100.0"), "2.05 | 2.25 | 2.50 | 2.75 | 2.95 | 1.025 | 1.125 | 1.250 | 1.375 | 1.475"
    assert lines[2] == f"| text | unlabelled | {' | '.join(rates)} | {quantiles} |"
    won = [Gap("text", ("colour",), nats, 2, prior) for nats, prior in ((3.0, 1.0), (1.0, -1.0), (-1.0, -2.0), (-2.0, -1.0), (2.0, 0.0))]
    assert "| 5 | 60.0 | 30.0 | 33.3 | -1.80" in table(won), "of three texts that the blank image disfavours, one wins"
    assert "33.3 %" in advice(won) and advice(won[:1]) == ""
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0, 25, 50, 100)] == [1.0, 1.5, 2.0, 3.0]


def test_images_that_contradict_their_labels_are_reported():
    """Between images, neither prior nor length explains a clear loss: one in five edits that the model sees the other way round."""
    good, lost = normal(3.0, 1.0), normal(-30.0, 1.0, 100)
    assert warning(of("image", good)) == "" == warning(of("text", [*good, *lost])), "texts have a prior"
    assert warning(of("image", [*good, *lost])).startswith("warning: 100 of 500 comparisons of images are lost")


def test_the_command(model_dir, tmp_path, capsys):
    manifest = write_manifest(tmp_path / "m.jsonl", 10)
    main(["calibrate", str(model_dir), str(manifest), "--limit", "8"])
    said = capsys.readouterr().out
    assert "| text | colour |" in said and "| image | all |" in said and "warning: only" in said
    plain = [group.id for group in read_manifest(manifest)[:8] if len(group.candidates) == 1]
    assert f"{len(plain)} of 8 groups have nothing to compare, for example {plain[0]!r}" in said
    rows: list[dict[str, Any]] = [to_row(group, tmp_path) for group in read_manifest(manifest)]
    plain = [row | {"images": row["images"][:1], "texts": row["texts"][:1], "match": [["i0", "t0", 1]], "edits": []} for row in rows]
    write_json(tmp_path / "plain.json", plain)
    with pytest.raises(SystemExit):
        main(["calibrate", str(model_dir), str(tmp_path / "plain.json")])
    assert "no group has both a true and a false text or image" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_refused(model_dir, tmp_path, capsys, monkeypatch):
    """Of one group: what the others would recommend is not what the data are."""
    manifest = write_manifest(tmp_path / "m.jsonl", 4)

    def scores(*arguments: Any, **options: Any) -> list[GroupScores]:
        found = list(score_groups(*arguments, **options))
        return [replace(found[0], logp=found[0].logp * math.nan), *found[1:]]

    monkeypatch.setattr("cfvlm_ds.evaluation.score_groups", scores)
    with pytest.raises(SystemExit):
        main(["calibrate", str(model_dir), str(manifest)])
    assert "scores of 1 of 4 groups are not finite, for example those of 'm-0'" in capsys.readouterr().err
