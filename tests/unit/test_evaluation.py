"""Winoground accuracies on hand-worked score matrices, and scores of groups against one plain forward per cell."""

from __future__ import annotations

import copy
import html
import random
import re
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import markdown
import markdown_it
import numpy as np
import pytest
import torch
from conftest import COLOURS, PROMPT, plain_logp
from conftest import ONE as ALONE
from PIL import Image

from cfvlm_ds.batching.batch import explain_out_of_memory
from cfvlm_ds.batching.batch_layout import group_layout
from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.batching.image_source import ImageFiles
from cfvlm_ds.batching.prompts import Encoded
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import DataError, OutOfMemory
from cfvlm_ds.core.groups import SHAM, Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.core.text import in_cell
from cfvlm_ds.counterfactuals.audit.report import Audit
from cfvlm_ds.data import read_manifest
from cfvlm_ds.demo.family_checkpoints import write_small
from cfvlm_ds.evaluation import (
    Batching,
    GroupScores,
    accuracies,
    evaluate,
    flat_metrics,
    guarded,
    headline,
    rehearse,
    score_groups,
    scoring,
    table,
)
from cfvlm_ds.evaluation import loss as losses
from cfvlm_ds.evaluation.before_after import Change, changes_table, compare_accuracies, of_types
from cfvlm_ds.evaluation.comparisons import comparisons, factual_texts
from cfvlm_ds.evaluation.loss import EvaluationLoss
from cfvlm_ds.evaluation.metrics import MEAN, RANDOM
from cfvlm_ds.models import Scorer, load_processor
from cfvlm_ds.objectives import Align, Csd, Dpo, Fcd, Objective, denominators, required_cells, weighted_loss
from cfvlm_ds.objectives.objective import comparisons as compared

GREY = Image.new("RGB", (336, 336), (128, 128, 128))


def group(*edits: Edit, num_images: int = 2, num_texts: int = 2) -> CounterfactualGroup:
    """The pair of each edit is true, the factual text is true of shams; the rest of row and column 0 is false, all else unknown."""
    edits = edits or (Edit("colour", 1, 1),)
    images, texts = tuple((Path(f"{i}.png"),) for i in range(num_images)), tuple(Candidate("", f"text {c}") for c in range(num_texts))
    true = {(0, 0), *((edit.image, 0 if edit.type == SHAM else edit.text) for edit in edits)}
    match = tuple(tuple(1 if (i, c) in true else 0 if 0 in (i, c) else None for c in range(num_texts)) for i in range(num_images))
    return CounterfactualGroup("g", images, texts, match, edits)


def scores(logp: list[list[float]], blank: list[float] | None = None) -> GroupScores:
    matrix = torch.tensor(logp)
    return GroupScores(matrix, torch.zeros(matrix.shape[1]) if blank is None else torch.tensor(blank))


# Metrics ------------------------------------------------------------------------------------------------------------------------------


def test_training_evaluation_and_audit_compare_the_same_texts_and_images():
    """The comparisons of an evaluation are those of csd and fcd, whose tensors come from the layout, but for shams."""
    draw = random.Random(7)
    for _ in range(60):
        images, texts = draw.randint(1, 4), draw.randint(1, 6)
        match = [[draw.choice((0, 1, None)) for _ in range(texts)] for _ in range(images)]
        match[0][0] = 1
        candidates = tuple(Candidate(f"question {draw.randrange(3)}", f"text {c}") for c in range(texts))
        one = CounterfactualGroup("g", tuple((Path(f"{i}.png"),) for i in range(images)), candidates, tuple(map(tuple, match)))
        found = [(each.kind, *each.at) for each in comparisons(one)]
        encoded = [Encoded("", (1,), (2,), (3,))] * texts
        layout = group_layout([one], [encoded], "full")
        none = torch.zeros(1, images, texts)
        by_text = compared(none, layout.positive, layout.negative, layout.same_prompt)[1][0]
        by_image = compared(*(each.transpose(1, 2) for each in (none, layout.positive, layout.negative)))[1][0]
        assert {each[1:] for each in found if each[0] == "text"} == set(map(tuple, by_text.nonzero().tolist()))
        assert {each[1:] for each in found if each[0] == "image"} == set(map(tuple, by_image.nonzero().tolist()))
        assert set(factual_texts(one)) == set(map(tuple, by_text[0].nonzero().tolist()))


@pytest.mark.parametrize(
    ("logp", "text", "image", "whole", "pair"),
    [
        ([[1, 1], [1, 2]], 0, 0, 0, 50),  # S_00 = S_01 = S_10
        ([[2, 3], [1, 3]], 0, 0, 0, 50),  # tie of the second text's images
        ([[3, 1], [2, 2]], 0, 100, 0, 50),  # tie of the second image's texts
    ],
)
def test_18_a_tie_is_wrong(logp, text, image, whole, pair):
    row, _ = accuracies([group()], [scores(logp)])
    assert [row.metrics[name] for name in ("text", "image", "group", "pair")] == [text, image, whole, pair]


def test_accuracies_on_random_scores():
    """4000 pairs: each accuracy within 4 standard errors of its value for random scores."""
    torch.manual_seed(1)
    with_sham = group(Edit("colour", 1, 1), Edit(SHAM, 2), num_images=3)
    num = 4000
    row, _ = accuracies(
        [with_sham] * num, [GroupScores(torch.randn(3, 2, dtype=torch.float64), torch.zeros(2).double()) for _ in range(num)]
    )
    assert row.metrics.keys() == RANDOM.keys() and row.num == num
    for name, expected in RANDOM.items():
        p = expected / 100
        assert abs(row.metrics[name] - expected) < 4 * 100 * (p * (1 - p) / num) ** 0.5, name
    assert RANDOM["group"] == pytest.approx(100 * 4 / 24), "of the 24 orders of four scores 4 have both own pairs on top"


def test_20_sham():
    """Share of sham images that beat the counterfactual on the factual text; a tie is wrong, other texts do not count."""
    edits = (Edit("colour", 1, 1), Edit("count", 2, 1), Edit(SHAM, 3), Edit(SHAM, 4))
    logp = [[0.0, 0.0], [-3.0, -9.0], [-2.0, -9.0], [-2.5, 9.0], [-2.0, 9.0]]
    colour, count, everything = accuracies([group(*edits, num_images=5)], [scores(logp)])
    assert (colour.metrics["sham"], count.metrics["sham"]) == (100, 0)
    assert everything.metrics["sham"] == 50
    half, *_ = accuracies([group(*edits[:1], *edits[2:], num_images=5)], [scores([*logp[:3], [-3.5, 9.0], [-2.0, 9.0]])])
    assert half.metrics["sham"] == 50


def test_rows_by_edit_type_and_the_mean_over_types():
    """Four colour pairs (three right), one action pair (wrong): ``all`` is the mean of 75 and 0, not 60. Half an edit adds no pair."""
    right, wrong = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    three = group(Edit("colour", 2, 1), Edit("action", 1, 2), Edit("colour", 1), Edit("colour", None, 2), num_images=3, num_texts=3)
    # pair (image 2, text 1): S_00 = 3, S_01 = 1, S_20 = 2, S_21 = 4, right; pair (image 1, text 2): S_02 = 5, wrong
    matrix = [[3.0, 1.0, 5.0], [9.0, 9.0, 0.0], [2.0, 4.0, 0.0]]
    rows = accuracies([group(), three, group(), group()], [scores(right), scores(matrix), scores(right), scores(wrong)])
    assert [(row.name, row.num, row.comparisons["group"]) for row in rows] == [("action", 1, 1), ("colour", 4, 4), ("all", 4, 5)]
    assert [row.metrics["group"] for row in rows] == [0, 75, 37.5]
    assert accuracies([], []) == [] and "group" not in accuracies([group(Edit("colour", 1))], [scores(right)])[-1].metrics


def test_every_edit_type_of_a_set_with_mixed_shapes_is_compared_once():
    """By hand: a group with an edited image and a false text, and three groups with one image. Only `factual` changes.

    The group of two images: the false text (colour) is preferred both times. On image 0, the true text is preferred to that of image 1
    (relation) only before; on image 1, only after. Of the two texts, only text 0 prefers its own image, both times. On a blank image, text
    0 is preferred to that of image 1. Every other group prefers its false text always, except `count` on the blank image before.
    """
    one = CounterfactualGroup(
        "cat", ((Path("0.png"),), (Path("1.png"),)), tuple(Candidate("", text) for text in "abc"), ((1, 0, 0), (0, None, 1)),
        (Edit("colour", None, 1), Edit("relation", 1, 2)),
    )  # fmt: skip
    plain = [
        CounterfactualGroup(kind, one.images[:1], one.candidates[:2], ((1, 0),), (Edit(kind, None, 1),)) for kind in ("colour", "count")
    ]
    plain.append(replace(plain[0], id="object", edits=(Edit("object", None, 1),)))
    lost, blank = scores([[-2.0, -1.0]], [-2.0, -1.0]), [-5.0, -4.0, -6.0]
    before, after = (
        accuracies([one, *plain], [scores(matrix, blank), lost, count, lost])
        for matrix, count in (
            ([[-5.0, -4.0, -6.0], [-7.0, -9.0, -8.0]], scores([[-2.0, -1.0]], [-1.0, -2.0])),
            ([[-5.0, -4.0, -4.5], [-9.0, -9.0, -8.0]], lost),
        )
    )
    caption = replace(plain[0], id="caption", candidates=one.candidates[:1], match=((1,),), edits=())
    after[-1].by_group.extend(accuracies([caption], [scores([[-1.0]])])[-1].by_group)  # it has no comparison, but counts as a group
    changes = compare_accuracies("test", before, after)
    found = [(each.edit, each.metric, each.groups, each.of, each.before, each.after, each.blank_before, each.blank) for each in changes]
    assert found == [
        (MEAN, "pair", 4, 5, 12.5, 12.5, 37.5, 12.5),
        (MEAN, "group", 1, 5, 0, 0, None, None),
        (MEAN, "image_pair", 1, 5, 50, 50, None, None),
        (MEAN, "factual", 4, 5, 25, 0, 50, 25),
        ("colour", "pair", 2, 2, 0, 0, 0, 0),
        ("count", "pair", 1, 1, 0, 0, 100, 0),
        ("object", "pair", 1, 1, 0, 0, 0, 0),
        ("relation", "group", 1, 1, 0, 0, None, None),
        ("relation", "factual", 1, 1, 100, 0, 100, 100),
    ]
    overall = changes_table(changes).splitlines()
    assert "| 37.5 -> 12.5 |" in overall[6]
    assert overall[2] == "| test | 4 of 5 | 4 with too few groups to tell | factual 25.0 -> 0.0 |  |  |"
    assert "| +0.0, too few groups to tell | +0 -0 |" in overall[8], "no change of one group"
    assert "- text, image, group_pmi: not compared" in "\n".join(overall) and "All metrics" not in "\n".join(overall)
    assert headline(after) == "pair accuracy colour 0.0, count 0.0, object 0.0, relation 50.0, mean of edit types 12.5 % (4 groups)"
    for few, of_set in ((19, "1 with too few groups to tell, 1 unchanged"), (20, "1 not resolved, 1 unchanged")):
        many = [replace(plain[k >= 25], id=f"g{k}") for k in range(25 + few)]
        won = scores([[-1.0, -2.0]], [-2.0, -1.0])
        before, after = (accuracies(many, [lost] * 25 + [one] + [lost] * (few - 1)) for one in (lost, won))
        assert changes_table(compare_accuracies("s", before, after)).splitlines()[2] == f"| s | {25 + few} | {of_set} | none |  |  |"


def half_width(row: Change) -> float:
    assert row.low is not None and row.high is not None
    return (row.high - row.low) / 2


def test_differences_are_paired_and_their_intervals_are_those_of_a_bootstrap():
    """Accuracies by hand; the interval against means of whole groups drawn with replacement, by edit type and for their mean."""
    wins, loses = scores([[-1.0, -2.0], [-2.0, -1.0]]), scores([[-2.0, -1.0], [-1.0, -2.0]])
    four = [replace(group(), id=f"g{n}") for n in range(4)]
    after = accuracies([*four, replace(group(), id="later")], [wins, wins, wins, loses, wins])
    colour, *_ = compare_accuracies("iid", accuracies(four, [wins, loses, loses, loses]), after)
    assert (colour.edit, colour.metric, colour.groups, colour.of, colour.better, colour.worse) == ("colour", "group", 4, 5, 2, 0)
    assert (colour.before, colour.after, colour.difference, colour.low, colour.high) == (25.0, 75.0, 50.0, None, None)
    half = scores([[-1.0, -2.0], [-1.0, -2.0]])  # image 0 prefers its own text, image 1 does not; no text prefers an image
    fallen = compare_accuracies("iid", accuracies(four, [half, half, half, loses]), accuracies(four, [wins, loses, loses, loses]))
    assert [each.difference for each in fallen] == [25.0, -12.5, 25.0, -50.0], "a pair that falls is seen beside a group that rises"
    others = [replace(each, candidates=(Candidate("", "another text"), each.candidates[1])) for each in four]
    assert compare_accuracies("iid", accuracies(others, [wins] * 4), after) == [], "groups of one id with other texts"

    draw = random.Random(3)
    kinds = [group(), group(Edit("shape", 1, 1)), group(Edit("colour", 1, 1), Edit("shape", 2, 2), num_images=3, num_texts=3)]
    groups = [replace(draw.choice(kinds), id=f"g{n}") for n in range(300)]
    size = [(len(each.images), len(each.candidates)) for each in groups]
    before, after = (
        [scores([[draw.gauss(tilt * (i == c), 1) for c in range(cs)] for i in range(n)]) for n, cs in size] for tilt in (0.3, 1)
    )
    compared = compare_accuracies("iid", accuracies(groups, before), accuracies(groups, after))
    assert [(row.edit, row.metric) for row in compared] == [
        *((MEAN, metric) for metric in ("group", "pair", "image_pair", "factual")),
        ("colour", "group"),
        ("shape", "group"),
    ]
    rows = {row.edit: row for row in compared if row.metric == "group"}
    gained = {edit: np.zeros((300, 2)) for edit in rows}  # by group: comparisons won more, and comparisons
    for place, (one, old, new) in enumerate(zip(groups, before, after, strict=True)):
        for was, now in zip(accuracies([one], [old]), accuracies([one], [new]), strict=True):
            made = now.comparisons["group"]
            gained[MEAN if now.mean else now.name][place] = (now.metrics["group"] - was.metrics["group"]) * made, made
    drawn: dict[str, list[float]] = {edit: [] for edit in rows}
    for _ in range(1000):
        places = draw.choices(range(300), k=300)
        means = {edit: part[places, 0].sum() / part[places, 1].sum() for edit, part in gained.items() if edit != MEAN}
        for edit, value in (*means.items(), (MEAN, statistics.mean(means.values()))):
            drawn[edit].append(value)
    for edit, values in drawn.items():
        assert half_width(rows[edit]) == pytest.approx(1.96 * statistics.stdev(values), rel=0.06), edit
        assert rows[edit].low + rows[edit].high == pytest.approx(2 * (rows[edit].after - rows[edit].before)), edit
    assert half_width(rows[MEAN]) < half_width(rows["colour"]) and {row.groups for row in rows.values()} != {300}
    lone = [replace(group(Edit(f"edit {n}", 1, 1)), id=f"g{n}") for n in range(36)]
    before, after = ([wins if draw.random() < 0.5 else loses for _ in lone] for _ in range(2))
    assert compare_accuracies("iid", accuracies(lone, before), accuracies(lone, after))[0].low is None, "no spread within a type"


@pytest.mark.parametrize(
    ("num", "kept", "better", "worse", "ends"),
    [
        (25, 7, 0, 10, (-59.6, -20.4)),  # the standard error of the mean of 10 times -1 and 15 times 0 is sqrt((0.4 - 0.4^2) / 24) = 0.1
        (50, 30, 5, 0, None),
        (50, 30, 6, 0, (12 - 9.099, 12 + 9.099)),  # sqrt((0.12 - 0.12^2) / 49) = 0.04642
        (50, 30, 5, 1, (8 - 9.437, 8 + 9.437)),  # sqrt((0.12 - 0.08^2) / 49) = 0.04815 (6 changed; the mean is 0.08)
        (6, 0, 6, 0, None),  # all alike
        # 1.96 * sqrt((6/7 - 36/49) / 6) = 0.28; cut at 100 %
    ],
)
def test_an_interval_needs_six_changed_groups_and_counts_stand_beside_it(num, kept, better, worse, ends):
    wins, loses = scores([[-1.0, -2.0], [-2.0, -1.0]]), scores([[-2.0, -1.0], [-1.0, -2.0]])
    groups = [replace(group(), id=f"g{n}") for n in range(num)]
    rest = num - kept - better - worse
    before = [wins] * kept + [loses] * better + [wins] * worse + [loses] * rest
    after = [wins] * kept + [wins] * better + [loses] * worse + [loses] * rest
    row = compare_accuracies("iid", accuracies(groups, before), accuracies(groups, after))[0]
    assert (row.better, row.worse) == (better, worse)
    assert (None if row.low is None else (row.low, row.high)) == (None if ends is None else pytest.approx(ends, abs=0.01))
    unknown = "too few groups to tell" if num < 20 else "not resolved"
    assert row.verdict == (unknown if ends is None or ends[0] <= 0 <= ends[1] else "better" if better > worse else "worse")


def test_opposite_changes_of_edit_types_are_seen_behind_a_mean_of_zero():
    """One type rises by 40 points, another falls by 40, and a third does not change. A blank image is right on the first pictures."""
    wins, loses = (scores(matrix, [-1.0, -2.0]) for matrix in ([[-1.0, -2.0], [-2.0, -1.0]], [[-2.0, -1.0], [-1.0, -2.0]]))
    groups = [replace(group(Edit(name, 1, 1)), id=f"{name} {n}") for name in ("a", "b", "c") for n in range(25)]
    before = accuracies(groups, [loses] * 25 + [wins] * 25 + [loses] * 25)
    after = accuracies(groups, [wins] * 10 + [loses] * 15 + [loses] * 10 + [wins] * 15 + [loses] * 25)
    changes = compare_accuracies("s", before, after)
    assert (changes[0].difference, changes[0].better, changes[0].worse) == (0.0, 10, 10)
    assert [(each.edit, each.verdict) for each in of_types(changes)] == [("a", "better"), ("b", "worse"), ("c", "unchanged")]
    assert "| s | 75 | 1 worse, 1 better, 1 unchanged | none |" in changes_table(changes)
    changes[1:] = [
        Change("s", "a", 19, 19, "group", 0, 0, 0, None, None, 0, 0),
        Change("s", "a", 19, 19, "pair", 80, 40, -40, -60, -20, 0, 8),
    ]
    assert "| s | 75 | 1 worse | none |" in changes_table(changes), "few groups, but a second metric has clearly fallen"
    changes[1] = Change("s", "a", 25, 25, "group", 0, 20, 20, 10, 30, 8, 0)
    assert "| s | 75 | 1 worse | none |" in changes_table(changes), "a metric that rose does not hide one that fell"


def test_a_type_has_a_row_for_the_metric_that_fell_most():
    """``pair``, which has the most groups, fell; ``group``, of the one group with an edited picture, fell further."""
    full = group(Edit("a", 1, 1))
    texts = CounterfactualGroup("", full.images[:1], full.candidates, ((1, 0),), (Edit("a", None, 1),))
    groups = [full, *(replace(texts, id=f"{n}") for n in range(9)), replace(texts, id="b", edits=(Edit("b", None, 1),))]
    wins, loses = ((scores([[a, b], [b, a]]), scores([[a, b]])) for a, b in ((-1.0, -2.0), (-2.0, -1.0)))
    before = accuracies(groups, [wins[0], *[wins[1]] * 10])
    after = accuracies(groups, [loses[0], loses[1], *[wins[1]] * 9])
    found = [(each.edit, each.metric, round(each.difference)) for each in of_types(compare_accuracies("s", before, after))]
    assert found == [("a", "pair", -27), ("a", "group", -100), ("b", "pair", 0)]


def test_table_is_valid_markdown_and_metrics_are_named():
    shammed = group(Edit("count", 1, 1), Edit(SHAM, 2), num_images=3)
    splits = {
        "iid": accuracies([group(), shammed], [scores([[1, 0], [0, 1]]), scores([[1, 2], [0, 3], [0.5, 0]], [-1, -2])]),
        "ood": accuracies([group()], [scores([[0, 1], [1, 0]])]),
        "none": [],
    }
    printed, coverage, notes = table(splits).split("\n\n")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert " ".join(found[3]) == "iid count 1 0.0 100.0 0.0 0.0 50.0 100.0 0.0 100.0"
    assert " ".join(found[5]) == "iid mean of edit types, blank image 2     50.0  75.0 ", "a tie, and the factual text"
    counted = {name for line in coverage.splitlines()[2:] for name in line.split("|")[2].strip().split(", ")}
    shown = {cell.removesuffix(", %") for cell in found[0][3:]}
    assert {line[2:].split(":")[0] for line in notes.splitlines()} == counted == shown
    assert len(shown) == 8 and "- sham: " in table({"ood": splits["ood"]}), "a metric that no group allows is counted, so explained"
    assert "| iid | sham | 1 | 1 | 1: 0.png (g) |" in coverage and "| iid | pair, image_pair | 2 | 4 |  |" in coverage
    flat = flat_metrics(splits)
    metrics = ("text", "image", "group", "pair", "image_pair", "factual", "text_pmi", "group_pmi")
    names = {f"{row}/{metric}" for row in ("iid", "iid/colour", "iid/count", "ood", "ood/colour") for metric in metrics}
    names |= {"iid/sham", "iid/count/sham"} | {f"{split}/blind_{metric}" for split in ("iid", "ood") for metric in ("pair", "factual")}
    assert flat.keys() == {f"eval/{name}" for name in names}
    assert (flat["eval/iid/group"], flat["eval/iid/colour/group"], flat["eval/iid/blind_pair"], flat["eval/ood/pair"]) == (50, 100, 50, 0)


# Scoring ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(manifests):
    found = read_manifest(manifests["test"])[:7]
    assert len({(len(g.images), len(g.candidates)) for g in found}) > 2, "ragged"
    return found


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa")).building("anchor", None)


@pytest.fixture(scope="module")
def plain(scorer, model_dir, groups):
    processor, found = load_processor(ModelConfig(str(model_dir))), []
    with torch.no_grad():
        for g in groups:
            parts = [[plain_logp(scorer.model, processor, image, c.prompt, c.text)[0] for c in g.candidates] for image in (*g.images, GREY)]
            sums = torch.tensor([[tokens.sum() for tokens in line] for line in parts])
            found.append(GroupScores(sums[:-1], sums[-1]))
    return found


def assert_equal(found: list[GroupScores], expected: list[GroupScores]) -> None:
    assert len(found) == len(expected)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have.logp, want.logp, rtol=1e-5, atol=0)
        torch.testing.assert_close(have.blank, want.blank, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (16, 0), (4, 1)])
def test_score_groups_equals_one_plain_forward_per_cell(batch_size, num_workers, collator, scorer, groups, plain):
    """In order, every cell and the blank image, whatever the collator was built for; 7 groups in batches of 1, 3, 16 and 4."""
    shapes: list[tuple[int, bool]] = []

    def forward(**inputs: Any) -> torch.Tensor:
        logp = scorer(**inputs)
        shapes.append((len(inputs["image_inputs"]["pixel_values"]), logp.requires_grad))
        return logp

    assert_equal(score_groups(forward, collator, groups, ALONE, Batching(batch_size, num_workers=num_workers)), plain)
    assert len(shapes) == 2 * -(-7 // batch_size) and [n for n, _ in shapes[1::2]] == [1] * (len(shapes) // 2)
    assert not any(grad for _, grad in shapes), "no graph is kept"
    assert collator.cells == "anchor"


def on_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[World], Any]) -> tuple[list[Any], list[int]]:
    """What each rank finds, or the DataError that ends it, and the size of the shares that the ranks exchanged. Ranks are threads."""
    barrier, box, shares = threading.Barrier(ranks, timeout=60), dict[int, Any](), set[int]()
    found: list[Any] = [None] * ranks

    def gather(item: Any, world: World) -> list[Any]:
        box[world.rank] = item
        shares.update([len(item)] if isinstance(item, dict) else [])
        barrier.wait()
        gathered = [box[rank] for rank in range(ranks)]
        barrier.wait()  # or a rank would put its next item where another has yet to read this one
        return gathered

    def run(rank: int) -> None:
        try:
            found[rank] = work(World(rank, ranks, torch.device("cpu")))
        except DataError as error:
            found[rank] = error

    with monkeypatch.context() as patch:
        for module in (scoring, losses):
            patch.setattr(module, "gather_objects", gather)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found, sorted(shares)


@pytest.mark.parametrize(("num", "batch_size", "ranks"), [(7, 2, 2), (5, 2, 3), (1, 1, 2)])
def test_ranks_share_the_groups_and_agree(
    num, batch_size, ranks, collator, scorer, groups, plain, monkeypatch
):  # fmt: skip
    """A model each; as many forwards on each, also where the groups run out; the same whole list on every rank."""
    calls: list[list[int]] = [[] for _ in range(ranks)]
    models = [copy.deepcopy(scorer) for _ in range(ranks)]  # a forward hooks into its model

    def work(world: World) -> Any:
        loss = EvaluationLoss(TERMS)
        found = score_groups(
            counting(models[world.rank], calls[world.rank]), collator, groups[:num], world, Batching(batch_size), loss=loss
        )
        return found, loss.reduce(world)

    results, shares = on_ranks(ranks, monkeypatch, work)
    assert [len(each) for each in calls] == [2 * -(-num // (batch_size * ranks))] * ranks
    assert num == 1 or max(shares) < num, "the work was shared"
    alone = EvaluationLoss(TERMS)
    score_groups(scorer, collator, groups[:num], ALONE, loss=alone)
    expected = alone.reduce(ALONE)
    for scored, found in results:
        assert_equal(scored, plain[:num])
        assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
        for name, term in expected["losses"].items():
            assert found["losses"][name] == {**term, "value": pytest.approx(term["value"], rel=1e-5)}, "every group counts once"


# Budget and memory ----------------------------------------------------------------------------------------------------------------------


def counting(scorer: Scorer, tokens: list[int]) -> Any:
    def forward(**inputs: Any) -> torch.Tensor:
        tokens.append(inputs["input_ids"].numel())
        return scorer(**inputs)

    return forward


@pytest.mark.parametrize("budget", [40, 60])
def test_a_budget_divides_batches_and_changes_no_score(budget, collator, scorer, groups, plain):
    """Also an image with more texts than one forward may hold; 7 groups in one batch take up to 45 times as many tokens."""
    whole: list[int] = []
    score_groups(counting(scorer, whole), collator, groups, ALONE, Batching(7))
    parts: list[int] = []
    assert_equal(score_groups(counting(scorer, parts), collator, groups, ALONE, Batching(7, budget)), plain)
    assert len(whole) == 2 and whole[0] > 5 * budget
    assert max(parts) <= budget < max(whole) and len(parts) >= sum(whole) / budget


def test_ranks_run_as_many_forwards_of_a_budget(collator, scorer, groups, plain, monkeypatch):
    """Two ranks whose batches divide into unequally many parts; a damaged picture on one ends both with its name."""
    scorers = [scorer, copy.deepcopy(scorer)]

    def scored(shown: list[CounterfactualGroup]) -> tuple[list[list[int]], list[Any]]:
        calls: list[list[int]] = [[], []]

        def work(world: World) -> Any:
            forward = counting(scorers[world.rank], calls[world.rank])
            return score_groups(forward, collator, shown, world, Batching(2, 45))

        return calls, on_ranks(2, monkeypatch, work)[0]

    calls, found = scored(groups)
    assert len(calls[0]) == len(calls[1]) and calls[0] != calls[1]
    for each in found:
        assert_equal(each, plain)
    _, found = scored([*groups[:3], replace(groups[3], images=((Path("gone.png"),),), match=(groups[3].match[0],), edits=())])
    assert [str(each) for each in found] == [str(found[0])] * 2 and isinstance(found[0], DataError) and "gone.png" in str(found[0])


def test_the_largest_batch_is_tried_before_training(collator, scorer, groups):
    """It has the most tokens of all that the evaluation will run, and its parts where there is a budget; a lost picture is known."""
    later: list[int] = []
    score_groups(counting(scorer, later), collator, groups, ALONE, Batching(2))
    most = later[::2].index(max(later))
    batch = groups[2 * most : 2 * most + 2]
    for budget in (None, 60):
        tried: list[int] = []
        rehearse(counting(scorer, tried), collator, {"a": groups[-1:], "b": groups}, ALONE, Batching(2, budget))
        expected: list[int] = []
        score_groups(counting(scorer, expected), collator, batch, ALONE, Batching(2, budget))
        assert tried == expected[: len(tried)] and (tried == [max(later)] if budget is None else len(tried) > 2)
    rehearse(counting(scorer, tried), collator, {}, ALONE, Batching(2))
    with pytest.raises(DataError, match=r"gone\.png"):
        rehearse(scorer, collator, {"a": [replace(groups[0], images=((Path("gone.png"),),) * len(groups[0].images))]}, ALONE, Batching(2))


def test_the_batch_that_is_tried_may_show_no_image_of_its_own(tmp_path):
    """Where images have as many tokens as they are large: a blank image is larger than small ones."""
    collator = load_collator(ModelConfig(str(write_small("qwen2_5_vl", tmp_path / "qwen")), max_pixels=448**2))
    sides = {"small": 28, "wide": 28, "large": 448}
    for name, side in sides.items():
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
    texts = [Candidate(PROMPT, f"a {colour} {shape}") for colour in COLOURS for shape in ("circle", "square")]
    groups = {name: CounterfactualGroup(name, ((tmp_path / f"{name}.png",),), (texts[0],), ((1,),)) for name in sides}
    groups["small"] = replace(groups["small"], candidates=tuple(texts), match=((1, *[0] * 7),))
    largest: list[int] = []

    def forward(into: list[int], **inputs: Any) -> torch.Tensor:
        into.append(inputs["input_ids"].numel())
        return torch.zeros(len(inputs["targets"]))

    for split in (["small", "wide"], ["small", "large"]):
        ran: list[int] = []
        tried: list[int] = []
        chosen = [groups[name] for name in split]
        score_groups(partial(forward, ran), collator, chosen, ALONE, Batching(1))
        rehearse(partial(forward, tried), collator, {"a": chosen}, ALONE, Batching(1))
        assert tried == [max(ran)]
        largest += tried
    assert largest[0] < largest[1]


def test_scores_that_are_not_finite_are_counted_and_named(collator, scorer, groups, capsys):
    def overflowing(**inputs: Any) -> torch.Tensor:
        logp = scorer(**inputs)
        return logp * float("nan") if len(inputs["forest"].roots) == 2 else logp

    score_groups(overflowing, collator, groups, ALONE, Batching(1), label="evaluating test")
    named = [group.id for group in groups]  # each has a blank image, which is a tree of its own
    said = capsys.readouterr().out
    assert f"evaluating test: scores of {len(named)} of {len(groups)} groups are not finite" in said and ", ".join(named[:5]) in said
    score_groups(scorer, collator, groups, ALONE, Batching(1))
    assert "not finite" not in capsys.readouterr().out
    for infinite in ([[-5.0, -torch.inf], [-torch.inf, -5.0]], [[torch.inf, -5.0], [-5.0, torch.inf]]):
        of = accuracies([group()], [scores(infinite)])[-1]
        assert set(of.metrics.values()) == {0.0}, "the warning says that they count as wrong"


def test_memory_that_runs_out_is_explained(collator, groups):
    def forward(**_: Any) -> torch.Tensor:
        return torch.empty(1 << 60)

    for work in (
        lambda: score_groups(forward, collator, groups, ALONE, Batching(4, remedy="lower this"), label="evaluating test"),
        lambda: rehearse(forward, collator, {"test": groups}, ALONE, Batching(4, remedy="lower this")),
    ):
        with pytest.raises(OutOfMemory, match=r"test.* on rank 0; .* [34] groups, \d+ tokens.*; lower this; "):
            work()
    parts = [collator(groups[:few]) for few in (1, 3, 2)]
    with pytest.raises(OutOfMemory, match="its largest forward pass has 3 groups"), explain_out_of_memory("here", parts, "lower this"):
        raise MemoryError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_data_is_one_sentence_also_from_a_worker(num_workers, collator, scorer, groups, tmp_path):
    bad = replace(groups[1], images=((tmp_path / "gone.png",), *groups[1].images[1:]))
    with pytest.raises(DataError, match=r"^\S*gone\.png: no such image file; [^\n]*$"):
        score_groups(scorer, collator, [groups[0], bad], ALONE, Batching(1, num_workers=num_workers))
    assert isinstance(guarded(collator)([bad]), DataError)
    assert [batch.layout.ids for batch in guarded(collator)(groups[:1])] == [(groups[0].id,)]  # type: ignore[union-attr]


def test_the_rehearsal_keeps_to_the_pixels_that_data_may_have(collator, scorer, tmp_path):
    """Sizes that the check knows are not read again, and a limit above the default holds for the others."""
    Image.new("1", (8000, 6500)).save(large := tmp_path / "large.png")
    group = CounterfactualGroup("g", ((large,),), (Candidate(PROMPT, "a red circle"),), ((1,),))
    generous = copy.copy(collator)
    generous.images = generous.files = ImageFiles(collator.processor, collator.family, collator.model_config, 60_000_000)
    rehearse(scorer, generous, {"a": [group]}, ALONE, Batching(1))
    with pytest.raises(DataError, match="over the limit of 50000000"):
        rehearse(scorer, collator, {"a": [group]}, ALONE, Batching(1))


def test_evaluate_scores_every_split(collator, scorer, groups, plain):
    rows, found = evaluate(scorer, collator, {"a": groups[:4], "b": groups[4:]}, ALONE, Batching(3))
    assert_equal([*found["a"], *found["b"]], plain)
    alone = {name: [replace(row, nll=None) for row in each] for name, each in rows.items()}
    assert alone == {"a": accuracies(groups[:4], plain[:4]), "b": accuracies(groups[4:], plain[4:])}


# The training's loss ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EveryScoredCell(Objective):
    """Somebody's own term: of all cells that are scored, and so of those alone that training would score for it."""

    weight: float = 0.25
    cells = "matched"

    def denominator(self, layout: GroupLayout) -> torch.Tensor:
        return layout.valid.sum().float()

    def numerator(self, scores: Scores) -> torch.Tensor:
        return scores.logp.sum()


TERMS: dict[str, Any] = {"align": Align(counterfactual=0.5), "csd": Csd(weight=0.5), "fcd": Fcd(warmup=0.9)}


@pytest.mark.parametrize(
    ("terms", "batch_size", "max_tokens"), [(TERMS, 1, None), (TERMS, 3, 60), (TERMS, 16, None), ({"own": EveryScoredCell()}, 3, None)]
)
def test_the_loss_is_that_of_a_training_step_over_the_whole_split(terms, batch_size, max_tokens, collator, scorer, groups):
    """At full weights: in one batch of the cells that training scores, by training's own function."""
    batch = collator.building(required_cells(terms), None)(groups)
    with torch.no_grad():
        whole, shares = weighted_loss(terms, batch.scores(scorer(**batch.model_inputs)), denominators(terms, batch.layout))
    rows, _ = evaluate(scorer, collator, {"s": groups}, ALONE, Batching(batch_size, max_tokens), objectives=terms)
    flat = flat_metrics(rows)
    assert flat["eval/s/loss"] == pytest.approx(float(whole), rel=1e-5)
    assert {name: flat[f"eval/s/loss_{name}"] for name in terms} == pytest.approx({k: float(v.sum()) for k, v in shares.items()}, rel=1e-5)


def test_the_nll_is_that_of_every_true_text_on_its_image(collator, scorer, model_dir, groups):
    """Whatever the objective is, group weights aside; and a line of a log says it."""
    some = [replace(group, weight=3.0) for group in groups[:4]]
    true = [(g, i, c) for g in some for i, row in enumerate(g.match) for c, truth in enumerate(row) if truth == 1]
    processor, nats, tokens = load_processor(ModelConfig(str(model_dir))), 0.0, 0
    for g, i, c in true:
        with torch.no_grad():
            text, end = plain_logp(scorer.model, processor, g.images[i], g.candidates[c].prompt, g.candidates[c].text)
        nats, tokens = nats - float(text.sum() + end), tokens + len(text) + 1
    assert len(true) > 4
    rows, _ = evaluate(scorer, collator, {"s": some}, ALONE, Batching(3), objectives={"csd": Csd()})
    assert flat_metrics(rows)["eval/s/nll"] == pytest.approx(expected := nats / tokens, rel=1e-5)
    assert headline(rows["s"]).endswith(f"; NLL {expected:.4f} nats per token")


def test_a_loss_that_cannot_be_computed_is_named_with_the_reason(collator, scorer, groups):
    class Broken(EveryScoredCell):
        def numerator(self, scores: Scores) -> torch.Tensor:
            raise KeyError("no such\ncolumn")

    bare = [g for g in groups if len(g.candidates) == 1]
    assert 0 < len(bare) < len(groups)
    terms: dict[str, Any] = {"align": Align(), "csd": Csd(), "dpo": Dpo(weight=1.0), "prior": Csd(pmi=0.5), "broken": Broken()}
    rows, _ = evaluate(scorer, collator, {"s": groups}, ALONE, Batching(3), objectives=terms)
    assert {name for name in flat_metrics(rows) if "loss" in name} == {"eval/s/loss_align", "eval/s/loss_csd"}, (
        "no sum of some of the terms"
    )
    said = table(rows)
    for name, reason in (("dpo", "reference scores"), ("prior", "prior"), ("broken", "KeyError: 'no such\\\\ncolumn'")):
        assert re.search(rf"- eval/s/loss_{name} is not computed: .*{re.escape(reason)}", said)
    assert said.count("not computed") == 3
    broken = evaluate(lambda **inputs: scorer(**inputs) * torch.nan, collator, {"s": groups}, ALONE, objectives={"align": Align()})[0]
    assert re.search(r"- eval/s/loss_align is not computed: .*not finite", table(broken))
    none = flat_metrics(evaluate(scorer, collator, {"s": bare}, ALONE, objectives={"csd": Csd()})[0])
    assert not any("loss" in name for name in none), "no group has anything for it"


def test_terms_and_parts_without_comparisons_are_named(collator, scorer, groups):
    """Without edited pictures, ``fcd`` and the second part of ``align`` have nothing to compare, so the sum is that of the others."""
    texts_only = [replace(each, images=each.images[:1], match=each.match[:1], edits=()) for each in groups if len(each.candidates) > 1]
    terms: dict[str, Any] = {"align": Align(), "csd": Csd(weight=2.0), "fcd": Fcd(weight=4.0)}
    for some, left_out in ((groups, []), (texts_only, ["1 of the 2 parts of align", "fcd"])):
        rows, _ = evaluate(scorer, collator, {"s": some}, ALONE, Batching(3), objectives=terms)
        assert re.findall(r"- eval/s/loss does not include (.*): the set has no comparisons for it", table(rows)) == left_out
        flat = flat_metrics(rows)
        fcd = 4 * flat.get("eval/s/loss_fcd", 0.0)
        assert flat["eval/s/loss"] == pytest.approx(flat["eval/s/loss_align"] + 2 * flat["eval/s/loss_csd"] + fcd)
        assert bool(fcd) == (not left_out)


def test_names_from_the_data_are_text_in_a_table_and_nothing_else():
    """By two readers of Markdown: no bar ends a cell, and there is neither HTML nor a link, nor a picture that a reader would fetch."""
    names = [
        "a|b",
        "a\\|b",
        "\\",
        "a\\\\|",
        "a||\\b",
        "<img src=//h/x>",
        "\\<script>x</script>",
        "![x](http://h/x.png)",
        "\\![x](//h)",
        "[x](//h)",
        "a](//h/x.png) ![b",
    ]
    readers = (markdown_it.MarkdownIt("commonmark").enable("table").render, partial(markdown.markdown, extensions=["tables"]))
    rows = accuracies([group(Edit(name, 1, 1)) for name in names], [scores([[1.0, 0.0], [0.0, 1.0]])] * len(names))
    audit = Audit([(name, name) for name in names], [(f"found {name}", [name]) for name in names], [], {name: name for name in names})
    for read in readers:
        shown = read("| name | again |\n|---|---|\n" + "".join(f"| {in_cell(name)} | {in_cell(name)} |\n" for name in names))
        cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", shown)]
        assert cells == [name for name in names for _ in range(2)]
        assert re.findall(r'src="(.*?)"', read("".join(f"![{in_cell(name)}](own.png)\n\n" for name in names))) == ["own.png"] * len(names)
        for text in (table({"s": rows}), audit.markdown()):
            assert not re.search(r"<(img|script|a)\b", read(text))
