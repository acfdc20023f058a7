"""What the truth table alone decides: which texts and images an objective or a metric compares, for every shape of group."""

from __future__ import annotations

import html
import itertools
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import markdown_it
import pytest
import torch
from conftest import (
    PROMPT,
    read_json,
    read_rows,
    run_ranks,
    run_train,
    train_arguments,
    write_json,
    write_rows,
)
from PIL import Image
from test_evaluation import scores
from transformers import AutoProcessor, LlavaForConditionalGeneration

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.checkpoint import TrainState
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import SHAM, Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.layout import GroupLayout
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.formats.pairs import Pairs
from cfvlm_ds.evaluation import accuracies, flat_metrics, metric_names, table
from cfvlm_ds.evaluation.metrics import METRICS
from cfvlm_ds.objectives import OBJECTIVES, Csd, Dpo, Fcd, SymMPO
from cfvlm_ds.training import results, trainer
from cfvlm_ds.training.evaluator import check_best
from cfvlm_ds.training.samples import Samples, _preferred

Truth = list[list[int | None]]


# Objectives: texts are compared within one prompt ---------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A group in plain Python: a full truth table whose texts answer several prompts, and the log-likelihood of every cell."""

    truth: Truth
    prompts: list[int]
    logp: list[list[float]]
    reference: list[list[float]]

    @property
    def star(self) -> Iterator[tuple[int, int]]:
        for i, row in enumerate(self.truth):
            for c, truth in enumerate(row):
                if truth == 1 or (truth == 0 and 0 in (i, c)):
                    yield i, c


def asked(seed: int, num_images: int, num_texts: int, num_prompts: int) -> Asked:
    rng = random.Random(seed)
    truth = [[rng.choice((0, 0, 1, None)) for _ in range(num_texts)] for _ in range(num_images)]
    truth[0][0] = 1
    prompts = [0, *(rng.randrange(num_prompts) for _ in range(num_texts - 1))]
    values = [[[rng.uniform(-4, 0) for _ in range(num_texts)] for _ in range(num_images)] for _ in range(2)]
    return Asked(truth, prompts, *values)


def collated(groups: list[Asked], prompt: bool = True) -> Scores:
    shape = (len(groups), max(len(g.truth) for g in groups) + 1, max(len(g.prompts) for g in groups))  # the last is the blank picture
    match, valid = torch.full(shape, -1, dtype=torch.int8), torch.zeros(shape, dtype=torch.bool)
    logp, reference = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    prompts = torch.full(shape[::2], -1)
    for x, g in enumerate(groups):
        prompts[x, : len(g.prompts)] = torch.tensor(g.prompts)
        for i, c in itertools.product(range(len(g.truth)), range(len(g.prompts))):
            truth = g.truth[i][c]
            match[x, i, c] = -1 if truth is None else truth
            logp[x, i, c], reference[x, i, c] = g.logp[i][c], g.reference[i][c]
        for i, c in g.star:
            valid[x, i, c] = valid[x, -1, c] = True
            logp[x, -1, c] = -1.0 - c / 2
    ones = valid.long()
    weight = torch.ones(len(groups), dtype=torch.float64)
    layout = GroupLayout(valid, match, ones, torch.zeros_like(ones), weight, prompt=prompts if prompt else None, blank=True)
    prior = torch.zeros(shape[::2], dtype=torch.float64)
    return Scores(layout, torch.where(valid, logp, 0).requires_grad_(), torch.zeros_like(logp), torch.where(valid, reference, 0), prior)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def link(violation: float) -> float:
    """With a margin of 5 and a beta of 0.3."""
    return softplus(0.3 * (5 + violation)) / 0.3


def mean(values: list[float]) -> list[float]:
    return [sum(values) / len(values)] if values else []


def naive_csd(g: Asked, mode: str) -> list[float]:
    star, s, found = set(g.star), g.logp, []
    for i, c in star:
        for d in range(len(g.prompts)):
            if mode == "cross" and (i, d) in star and g.prompts[c] == g.prompts[d] and (g.truth[i][c], g.truth[i][d]) == (1, 0):
                found.append(link(s[i][d] - s[i][c]))
        if mode == "matched" and g.truth[i][c] == 1 and i > 0 and c > 0 and g.prompts[c] == g.prompts[0]:
            found.append(link(s[i][c] - s[0][0]))
    return mean(found)


def naive_fcd(g: Asked) -> list[float]:
    star, halves = set(g.star), {0: [], 1: []}
    for c in range(len(g.prompts)):
        own = next((i for i in range(len(g.truth)) if g.truth[i][c] == 1), None)
        for i in range(len(g.truth)):
            if own is not None and g.truth[i][c] == 0 and (i, c) in star:
                halves[min(c, 1)].append(g.logp[i][c] - g.logp[own][c])
    return mean([link(max(values)) for values in halves.values() if values])


def naive_dpo(g: Asked) -> list[float]:
    r, star, found = lambda i, c: g.logp[i][c] - g.reference[i][c], set(g.star), []
    for i, c in star:
        for d in range(len(g.prompts)):
            if (i, d) in star and g.prompts[c] == g.prompts[d] and (g.truth[i][c], g.truth[i][d]) == (1, 0):
                found.append(softplus(r(i, d) - r(i, c)))
    return mean(found)


def naive_symmpo(g: Asked) -> list[float]:
    r, star = lambda i, c: g.logp[i][c] - g.reference[i][c], set(g.star)
    found = []
    for i, c in star:
        known = g.truth[i][c] == 1 and g.truth[i][0] == 0 == g.truth[0][c] and {(i, 0), (0, c)} <= star
        if known and g.prompts[c] == g.prompts[0]:
            here, there = r(0, 0) - r(0, c), r(i, c) - r(i, 0)
            found.append(softplus(-here) + softplus(-there) + 2 * (here - there) ** 2)
    return mean(found)


NAIVE = {
    "csd": (Csd(margin=5, beta=0.3), 0, lambda g: naive_csd(g, "cross")),
    "csd matched": (Csd(mode="matched", margin=5, beta=0.3), 0, lambda g: naive_csd(g, "matched")),
    "fcd": (Fcd(margin=5, beta=0.3), 0, naive_fcd),
    "dpo": (Dpo(beta=1.0), 0, naive_dpo),
    "symmpo": (SymMPO(beta=1.0, symmetric=1.0, consistency=2.0), 1, naive_symmpo),
}
GROUPS = [asked(seed, 1 + seed % 4, 2 + seed % 5, 1 + seed % 3) for seed in range(60)]


@pytest.mark.parametrize("name", NAIVE)
def test_objectives_compare_answers_to_one_prompt(name):
    """Loss and units of 60 groups of 1 to 4 images, 2 to 6 texts and 1 to 3 prompts, against loops over cells."""
    objective, part, naive = NAIVE[name]
    per_group = [naive(g) for g in GROUPS]
    scores = collated(GROUPS)
    assert torch.atleast_1d(objective.denominator(scores.layout))[part].item() == sum(map(len, per_group)) > 5
    total = torch.atleast_1d(objective.numerator(scores))[part].item()
    assert total == pytest.approx(sum(map(sum, per_group)), rel=1e-9)
    for kept in GROUPS:  # each alone as well: sums could hide what one group has too much and another too little
        alone = torch.atleast_1d(objective.numerator(collated([kept])))[part].item()
        assert alone == pytest.approx(sum(naive(kept)), rel=1e-9, abs=1e-12)


def test_a_second_question_is_trained_on_every_image(model_dir):
    """Two images, two questions, yes and no: star has each question's own false answer on either image, and each answer's false image."""
    one, _ = SHAPES["NaturalBench: two images, two questions"]
    layout = load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa")).building("star", None)._layout([one])
    assert layout.valid.all()
    ones = torch.ones(layout.valid.shape)
    compared = Csd().violations(ones, layout)[1].nonzero()[:, 1:].tolist()
    assert sorted(compared) == [[0, 0, 1], [0, 3, 2], [1, 1, 0], [1, 2, 3]], "image, true text, false text"
    (own,) = (replace(one, match=((1, 0, None, None), (0, 1, 1, 0))),)  # of the second question nothing is known on the factual image
    star = load_collator(ModelConfig(str(model_dir), attn_implementation="sdpa")).building("star", None)._layout([own]).valid[0]
    assert star.tolist() == [[True, True, False, False], [True] * 4]


# Metrics: every comparison of the truth table, and no other -----------------------------------------------------------------------------


def group(truth: Truth, *edits: Edit, texts: tuple[tuple[str, str], ...] = (), name: str = "g") -> CounterfactualGroup:
    images = tuple((Path(f"{name}-{i}.png"),) for i in range(len(truth)))
    candidates = tuple(Candidate(*pair) for pair in texts or [("", f"text {c}") for c in range(len(truth[0]))])
    return CounterfactualGroup(name, images, candidates, tuple(map(tuple, truth)), edits)


YES_NO = (("Is it red?", "yes"), ("Is it red?", "no"))
SHAPES = {
    "SugarCrepe++: a second true text": (group([[1, 1, 0]]), {"pair": 2, "factual": 2}),
    "NaturalBench: two images, two questions": (
        group([[1, 0, 0, 1], [0, 1, 1, 0]], texts=(*YES_NO, ("Is it big?", "yes"), ("Is it big?", "no"))),
        {"text": 2, "image": 2, "group": 2, "text_pmi": 2, "group_pmi": 2, "pair": 4, "factual": 2, "image_pair": 4},
    ),
    "Winoground without an edit": (
        Pairs()({"image_0": "a.png", "image_1": "b.png", "caption_0": "a", "caption_1": "b"}),
        {"text": 1, "image": 1, "group": 1, "text_pmi": 1, "group_pmi": 1, "pair": 2, "factual": 1, "image_pair": 2},
    ),
    "an edited image without a text": (group([[1], [0]], Edit("count", image=1)), {"image_pair": 1}),
    "nothing known beside the factual pair": (group([[1, None], [None, 1]], Edit("count", 1, 1)), {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_group_counts(shape):
    """Comparisons of each metric; all won, then all lost; a metric without one is absent and its count is 0, in row and table."""
    one, expected = SHAPES[shape]
    right = [[0.0 if truth == 1 else -1.0 for truth in row] for row in one.match]
    rows = accuracies([one], [scores(right)])
    mean_row = rows[-1]
    assert (mean_row.name, mean_row.mean, mean_row.num) == ("all", True, 1)
    assert mean_row.comparisons == {metric: expected.get(metric, 0) for metric in METRICS}
    assert mean_row.groups == {metric: int(metric in expected) for metric in METRICS}
    assert mean_row.metrics == dict.fromkeys(expected, 100)
    assert mean_row.unused == {metric: [f"{one.images[0][0].name} ({one.id})"] for metric in METRICS if metric not in expected}
    lost = accuracies([one], [scores([[-value for value in row] for row in right])])[-1].metrics
    assert lost == dict.fromkeys(expected, 0)
    kinds = {edit.type for edit in one.edits} or {"unlabelled"}
    assert {row.name for row in rows[:-1]} == (kinds if expected else set())
    flat = flat_metrics({"s": rows})
    assert metric_names({"s": [one]}) == flat.keys()
    assert flat.keys() >= {f"eval/s/{metric}" for metric in expected}
    printed = table({"s": rows})
    for metric in (each for each in METRICS if each != "text_pmi"):  # counted as group_pmi is
        (line,) = [line for line in printed.splitlines() if line.startswith("| s |") and metric in line.split(" | ")[1].split(", ")]
        assert line.endswith(f" | {int(metric in expected)} | {expected.get(metric, 0)} | {'' if metric in expected else 'all'} |")


def naive_metrics(g: CounterfactualGroup, s: list[list[float]], blank: list[float]) -> dict[str, list[float]]:
    """Every metric of a group without shams, by loops over all index tuples."""
    images, texts, m = range(len(g.images)), range(len(g.candidates)), g.match
    same = lambda c, d: g.candidates[c].prompt == g.candidates[d].prompt  # noqa: E731
    found = {metric: [] for metric in METRICS}
    for prompt in dict.fromkeys(candidate.prompt for candidate in g.candidates):
        anchors = [(i, c) for i in images for c in texts if m[i][c] == 1 and g.candidates[c].prompt == prompt]
        for (i, c), (j, d) in itertools.product(anchors[:1], itertools.product(images, texts)):
            if same(c, d) and m[j][d] == 1 and m[i][d] == 0 and m[j][c] == 0:
                for suffix, p in (("", [0.0] * len(texts)), ("_pmi", blank)):
                    t = s[i][c] - p[c] > s[i][d] - p[d] and s[j][d] - p[d] > s[j][c] - p[c]
                    v = s[i][c] > s[j][c] and s[j][d] > s[i][d]
                    found[f"text{suffix}"].append(t)
                    found[f"group{suffix}"].append(t and v)
                found["image"].append(v)
    for i, c, d in itertools.product(images, texts, texts):
        if m[i][c] == 1 and m[i][d] == 0 and same(c, d):
            found["pair"].append(s[i][c] > s[i][d])
            found["factual"] += [s[i][c] > s[i][d]] * (i == 0)
    for c, i, j in itertools.product(texts, images, images):
        if m[i][c] == 1 and m[j][c] == 0:
            found["image_pair"].append(s[i][c] > s[j][c])
    return found


def test_metrics_equal_the_naive_twin():
    """500 groups of any shape, truth unknown here and there, up to three prompts: pooled shares, counts, and the groups without one."""
    rng = random.Random(3)
    groups, values = [], []
    for seed in range(500):
        g = asked(seed, rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 3))
        texts = tuple((f"question {prompt}", f"text {c}") for c, prompt in enumerate(g.prompts))
        groups.append(group(g.truth, texts=texts, name=f"g{seed}"))
        values.append(scores(g.logp, [rng.uniform(-3, 0) for _ in g.prompts]))
    naive = [naive_metrics(g, v.logp.tolist(), v.blank.tolist()) for g, v in zip(groups, values, strict=True)]
    unlabelled, everything = accuracies(groups, values)
    assert unlabelled.name == "unlabelled" and unlabelled.metrics == everything.metrics
    for metric in METRICS:
        pooled = [outcome for found in naive for outcome in found[metric]]
        assert everything.comparisons[metric] == len(pooled) and (metric == "sham" or len(pooled) > 30), metric
        assert everything.groups[metric] == sum(bool(found[metric]) for found in naive)
        without = [f"{g.images[0][0].name} ({g.id})" for g, found in zip(groups, naive, strict=True) if not found[metric]]
        assert everything.unused[metric] == without[:5]
        if pooled:
            assert everything.metrics[metric] == pytest.approx(100 * sum(pooled) / len(pooled)), metric


# What is true, or unknown, is no error ----------------------------------------------------------------------------------------------------


def test_a_sham_edit_with_a_text_is_no_row():
    """It says that the factual text is true of its image: no comparison, and no part of the mean."""
    edits = (Edit("colour", 1, 1), Edit(SHAM, 2, 0))
    one = group([[1, 0], [0, 1], [1, 0]], *edits)
    logp = [[-1.0, -2.0], [-2.0, -1.0], [-1.5, -2.5]]
    rows = accuracies([one], [scores(logp)])
    assert [row.name for row in rows] == ["colour", "all"]
    assert rows[-1].metrics == dict.fromkeys(METRICS, 100)
    plain = accuracies([group([[1, 0], [0, 1]], edits[0])], [scores(logp[:2])])[-1].metrics
    assert {m: v for m, v in rows[-1].metrics.items() if m != "sham"} == plain, "a sham image repeats no comparison of the factual one"
    assert rows[-1].comparisons["pair"] == 2 and rows[-1].comparisons["sham"] == 1


def test_an_edit_type_named_like_the_mean_row_is_not_the_mean():
    wins, loses = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    identity = [[1, 0], [0, 1]]
    groups = [group(identity, Edit(name, 1, 1)) for name in ("all", "colour", "shape")]
    splits = {"s": accuracies(groups, [scores(wins), scores(loses), scores(loses)])}
    flat = flat_metrics(splits)
    assert (flat["eval/s/group"], flat["eval/s/all/group"], flat["eval/s/colour/group"]) == (100 / 3, 100, 0)
    assert [(row.name, row.mean) for row in splits["s"]] == [("all", False), ("colour", False), ("shape", False), ("all", True)]


# What language alone achieves ---------------------------------------------------------------------------------------------------------


def test_the_blind_row_says_what_language_alone_achieves():
    """Three groups of one image: language decides one rightly, one wrongly, and ties in one (1/2): 50 %, where the model has 100."""
    groups = [group([[1, 0]]) for _ in range(4)]
    right = [[1.0, 0.0]]
    values = [scores(right, [0.0, -1.0]), scores(right, [-1.0, 0.0]), scores(right, [-2.0, -2.0]), scores(right, [0.0, -3.0])]
    row = accuracies(groups, values)[-1]
    assert row.metrics == {"pair": 100, "factual": 100} and row.blind == {"pair": 62.5, "factual": 62.5}
    assert flat_metrics({"s": [row]})["eval/s/blind_pair"] == 62.5


def test_save_best_by_a_metric_that_the_data_cannot_have_is_refused():
    options = ["--train.eval_steps=1", "--data.evaluation.s=s.jsonl", "--data.train=t.jsonl", "--train.save_best"]
    splits = {"s": [group([[1, 0]])]}
    check_best(parse_config([*options, "eval/s/pair"], OBJECTIVES), splits, {})
    for name in ("eval/s/group", "eval/s/count/pair"):
        with pytest.raises(ConfigError, match=rf"^train.save_best '{name}' .* eval/s/blind_factual, [^\n]*eval/s/pair, "):
            check_best(parse_config([*options, name], OBJECTIVES), splits, {})
    with pytest.raises(ConfigError, match="comparison"):
        check_best(parse_config([*options, "eval/s/pair"], OBJECTIVES), {"s": [group([[1]])]}, {})


def test_save_best_is_refused_before_anything_is_trained(model_dir, manifests, tmp_path):
    options = [f"--data.evaluation.test={manifests['test']}", "--train.eval_steps=1", "--train.save_best=eval/test/size/pair"]
    (said,) = run_train(1, train_arguments(model_dir, manifests, tmp_path / "run", *options), code=2)
    assert "error: train.save_best 'eval/test/size/pair'" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "step 1" not in said


# The end of a training ------------------------------------------------------------------------------------------------------------------


def finishing(run_dir: Path) -> tuple[Any, list[str]]:
    """A trainer at its end, of which only what the end needs is there."""
    said = []
    ended = object.__new__(trainer.Trainer)
    ended.state, ended.evaluator = SimpleNamespace(step=3), lambda *_: ({}, {})
    ended.engine = SimpleNamespace(module=SimpleNamespace(model=SimpleNamespace(dtype=None)))
    ended.world, ended.pulse = SimpleNamespace(is_main=True, size=1, say=said.append), SimpleNamespace(mark=lambda *_: None)
    ended.config = parse_config([f"--train.output_dir={run_dir}", "--train.figures=false"], OBJECTIVES)
    ended._displacement = SimpleNamespace(warning=lambda _: "")
    ended.baseline, ended.sample = SimpleNamespace(compare=lambda _: []), SimpleNamespace(metrics=lambda _: {})
    ended.samples = SimpleNamespace(write=lambda _: None, report=lambda: ("", []))
    ended.data, ended._run_dir = SimpleNamespace(splits={}, identities={}, benchmarks={}, overlaps={}, groups=()), run_dir
    ended.sampler = SimpleNamespace(epoch=1.0)
    return ended, said


class Refusing:
    def log(self, *_: object) -> None:
        raise OSError("no tracker")


def test_a_trained_model_is_exported_whatever_follows(tmp_path, monkeypatch):
    """The tracker refuses, or the evaluation: the export is there. The export refuses: the evaluation is, and then the error."""
    ended, said = finishing(tmp_path)
    monkeypatch.setattr(trainer, "export_checkpoint", lambda *_: said.append("exported"))
    with pytest.raises(OSError, match="no tracker"):
        ended._finish(Refusing())
    assert said == ["exported"]

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(trainer, "export_checkpoint", full)
    tracker = SimpleNamespace(log=lambda *_: None, artifact=lambda _: None, describe=lambda _: None)
    with pytest.raises(OSError, match="disk full"):
        ended._finish(tracker)
    assert (tmp_path / "results.md").exists() and said[1].startswith(
        "warning: the export failed (disk full); the run will end with this error after the evaluation"
    )


def test_a_figure_that_fails_is_a_warning(tmp_path):
    said = list[str]()
    assert results.draw_curves(tmp_path, {}, {}, said.append) == [], "there are no metrics to draw"
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path}/learning_curves.png ") and "\n" not in said[0]


def test_training_ends_early_where_evaluations_do_not_improve(model_dir, manifests, tmp_path):
    """Evaluation 1 is the best, 2 and 3 repeat it. A training that goes on after step 2 has counted evaluation 2."""
    run_dir = tmp_path / "run"
    options = ["--train.eval_steps=1", "--train.max_steps=9", "--train.save_best=eval/test/pair", "--train.early_stopping=2"]
    options += [f"--data.evaluation.test={manifests['test']}", "--train.learning_rate=0", "--train.save_steps=1"]
    for more in ((), ("--train.resume", str(run_dir / "checkpoint-2"))):
        (said,) = run_train(1, train_arguments(model_dir, manifests, run_dir, *options, *more))
        assert "early stopping after step 3: the best eval/test/pair was " in said and "step 4/9" not in said
        assert read_json(run_dir / "finished.json")["step"] == 3 and (run_dir / "results.md").is_file()
    assert "3 of 9" in run_train(1, train_arguments(model_dir, manifests, run_dir, *options))[0]
    options[3] = "--train.early_stopping=3"
    (said,) = run_train(1, train_arguments(model_dir, manifests, run_dir, *options))
    assert "early stopping after step 4: " in said and "at step 1\n" in said


def test_an_evaluation_without_the_metric_or_with_nan_is_no_improvement(tmp_path):
    """One that follows is compared with the best before it."""
    ended, said = finishing(tmp_path)
    ended.state, ended.samples = TrainState(step=1), SimpleNamespace(write=lambda _: None)
    ended.config = parse_config(
        [f"--train.output_dir={tmp_path}", "--data.evaluation.vsr=a", "--train.eval_steps=1", "--train.save_best=eval/vsr/auc"], OBJECTIVES
    )
    found = iter([math.nan, 60.0, None, math.nan, 59.0, 61.0])
    ended._log_evaluation = lambda *_: {} if (value := next(found)) is None else {"eval/vsr/auc": value}
    assert [ended._evaluate(None) for _ in range(6)] == [False, True, False, False, False, True]
    assert ended.state.best == {"step": 1, "value": 61.0} and ended.state.worse == 0
    assert len(said) == 1 and said[0].startswith("warning: ")


def test_samples_are_what_transformers_writes_on_any_number_of_ranks(model_dir, manifests, tmp_path):
    """The model's generation_config ends its texts early, since each token of two ranks gathers every weight."""
    model_dir = shutil.copytree(model_dir, tmp_path / "model")
    file = model_dir / "generation_config.json"
    write_json(file, read_json(file) | {"exponential_decay_length_penalty": [4, 10.0]})
    options = ["--train.samples=3", "--train.eval_steps=1", "--train.max_steps=2", "--train.export=true"]
    options += [f"--data.evaluation.test={manifests['test']}", "--train.learning_rate=1e-3"]
    written = {}
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        run_train(ranks, train_arguments(model_dir, manifests, run_dir, *options))
        written[ranks] = read_rows(run_dir / "samples.jsonl")
        assert [row["step"] for row in written[ranks]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert all(len(row["text"]) > 4 for row in written[ranks])
    margins = [[row.pop("margin") for row in written[ranks]] for ranks in (1, 2)]
    assert written[1][:3] == written[2][:3] and margins[0][:3] == pytest.approx(margins[1][:3], abs=1e-4), "before the first step, the same"
    final = {row["id"]: row["logp"][0] for row in read_rows(tmp_path / "2" / "scores" / "test.jsonl")[1:]}
    for group, row, margin in zip(read_manifest(manifests["test"]), written[2][6:], margins[1][6:], strict=False):
        logp = {truth: [final[group.id][c] for c, each in enumerate(group.match[0]) if each == truth] for truth in (0, 1)}
        assert margin == pytest.approx(max(logp[1]) - max(logp[0]), abs=1e-4)
        assert row["preferred"] == group.candidates[final[group.id].index(max(final[group.id]))].text
    groups, processor = read_manifest(manifests["test"])[:3], AutoProcessor.from_pretrained(tmp_path / "2" / "export")
    for folder, rows in ((model_dir, written[2][:3]), (tmp_path / "2" / "export", written[2][6:])):
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        for group, row in zip(groups, rows, strict=True):
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": group.candidates[0].prompt}]}]
            prompt = processor.apply_chat_template(said, add_generation_prompt=True)
            inputs = processor(text=[prompt], images=[Image.open(group.images[0][0])], return_tensors="pt", add_special_tokens=False)
            tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert row["text"] == processor.tokenizer.decode(tokens, skip_special_tokens=True) and row["group"] == group.id
    run_dir = tmp_path / "2"
    (run_dir / "finished.json").unlink()
    with (run_dir / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "te')  # a kill while it was written
    run_train(2, train_arguments(model_dir, manifests, run_dir, *options))
    again = read_rows(run_dir / "samples.jsonl")
    assert [row.pop("margin") for row in again] == pytest.approx(margins[1], abs=1e-4) and again == written[2]
    assert "\n## Samples\n" in (tmp_path / "2" / "results.md").read_text()


def test_a_picture_that_one_rank_has_lost_is_a_sample_of_no_rank(model_dir, manifests, tmp_path):
    """Under ZeRO-3 the others would wait for its forwards for ever."""
    options = ["--train.samples=2", "--train.max_steps=1", f"--data.evaluation.test={manifests['test']}", "--train.export=false"]
    arguments = train_arguments(model_dir, manifests, tmp_path / "run", *options)
    ended = run_ranks(2, "rank_functions:losing_pictures", arguments, timeout=200)
    assert [code for code, _ in ended] == [0, 0]
    assert all(row["text"].endswith("lost on rank 1") for row in read_rows(tmp_path / "run" / "samples.jsonl"))


def test_the_table_of_samples_has_every_group_and_no_text_of_an_abandoned_step(tmp_path, capsys):
    """Groups without a picture, with two, with one that is lost; a run that goes on from step 5 forgets step 7; texts fetch nothing."""
    Image.new("RGBA", (400, 300), (0, 255, 0, 0)).save(tmp_path / "a.png")
    hostile = "![x](//h/a.png) <img src=//h/b> | ](//h/c.png)"
    shown = {
        "none": (),
        "two": (tmp_path / "a.png",) * 2,
        "lost": (tmp_path / "gone.png",),
        f"]( //h/d.png) {hostile}": (tmp_path / "a.png",),
    }
    groups = [replace(group([[1, 0]], texts=((PROMPT, hostile), (PROMPT, "b")), name=name), images=(each,)) for name, each in shown.items()]
    rows = [
        {"step": step, "set": "test", "group": name, "text": f"{step}{hostile}", "preferred": "b" if step else hostile}
        for step in (0, 5, 7)
        for name in shown
    ]
    write_rows(tmp_path / "samples.jsonl", rows)
    unused: Any = None
    samples = Samples(9, {"test": groups}, unused, unused, World(0, 1, torch.device("cpu")), tmp_path, 10**6, unused)
    samples.resume(5)
    section, files = samples.report()
    assert [file.name for file in files] == ["samples.jsonl", "1.png", "1-1.png", "3.png"]
    page = markdown_it.MarkdownIt("commonmark").enable("table").render(section)
    assert re.findall(r'(?:src|href)="(.*?)"', page) == ["samples/1.png", "samples/1-1.png", "samples/3.png"]
    assert [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page)] == [
        cell for _ in shown for step in (0, 5) for cell in (f"{step}{hostile}", "wrong: b" if step else f"right: {hostile}")
    ]
    assert page.count("gone.png: no such image file") == 1
    (tmp_path / "samples.jsonl").write_text("broken\n[]\n")
    samples.resume(5)
    assert capsys.readouterr().out.count("warning: ") == 1
    samples.splits = {"one": groups[:1], "test": groups}
    assert [name for name, _ in samples._groups()] == ["one", *["test"] * len(groups)], "in turn, and the longer set's rest"


def test_the_margin_of_a_sample_needs_a_true_and_a_false_answer():
    """To the first prompt; an unknown answer may be preferred and is in no margin."""
    answers = tuple((PROMPT, each) for each in "abc")

    def margin_of(match: list[int | None]) -> dict[str, Any]:
        return _preferred(group([[*match, 0]], texts=(*answers, ("Another?", "d"))), [-2.0, -3.5, -1.0, 0.0])

    assert margin_of([1, 0, None]) == {"preferred": "c", "margin": 1.5} and margin_of([1, None, 0])["margin"] == -1.0
    assert margin_of([1, 1, None]) == {"preferred": "c", "margin": None}
