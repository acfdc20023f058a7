"""What a run looks at before its first step: weights that are not numbers, and packed scores that no rounding explains."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ONE, run_train, train_arguments
from safetensors.torch import load_file, save_file

from cfvlm_ds.batching.collator import Collator, load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data import read_manifest
from cfvlm_ds.models import Scorer, family_of, load_model
from cfvlm_ds.models import forest_attention as attention
from cfvlm_ds.training import self_check
from cfvlm_ds.training.run import _checked
from cfvlm_ds.training.self_check import Cell, check_scores, refuse_nonfinite, rounded_otherwise


class Engine:
    """Calls its module, as DeepSpeed's does."""

    def __init__(self, scorer: Scorer) -> None:
        self.module = scorer

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def wide(model_dir: Path, dtype: torch.dtype, seed: int) -> Engine:
    """The test model with logits of about 30, as those of published models are: a unit of bfloat16's last place is 0.125 there."""
    model: Any = load_model(ModelConfig(str(model_dir), attn_implementation="sdpa"), torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 if "lm_head" in name else 0.15, generator=generator)
    return Engine(Scorer(model.to(dtype), family_of(model.config)))


@pytest.fixture(scope="module")
def collator(model_dir):
    return load_collator(ModelConfig(str(model_dir))).building("star", None)


@pytest.fixture(scope="module")
def answers(manifests):
    """Groups whose texts are one word each."""
    words = ("red", "green", "blue")
    return [
        dataclasses.replace(
            group, candidates=tuple(dataclasses.replace(c, text=word) for c, word in zip(group.candidates, words, strict=False))
        )
        for group in read_manifest(manifests["train"])
        if len(group.candidates) > 1
    ]


def outcome(engine: Engine, collator: Collator, groups: Sequence[CounterfactualGroup]) -> str | None:
    """None where the check is content, else its sentence."""
    config: Any = SimpleNamespace(model=SimpleNamespace(attn_implementation="sdpa"), data=SimpleNamespace(max_tokens_per_forward=None))
    try:
        with torch.no_grad():
            check_scores(config, engine, collator, groups, ONE)
    except ConfigError as error:
        return str(error)
    return None


def seeing_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._padded
    chained = lambda f: attention.Forest(f.lengths, tuple(node - 1 if parent >= 0 else -1 for node, parent in enumerate(f.parents)))  # noqa: E731
    monkeypatch.setattr(attention, "_padded", lambda f, *sight: right(chained(f), *sight))


def going_on_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of the row, not of each tree."""
    right = Scorer.forward

    def forward(self: Scorer, **inputs: Any) -> Any:
        return right(self, **inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]})

    monkeypatch.setattr(Scorer, "forward", forward)


def other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer.forward

    def forward(self: Scorer, **inputs: Any) -> Any:
        shown = inputs["images_of_tree"]
        return right(self, **inputs | {"images_of_tree": [*shown[1:], shown[0]]})

    monkeypatch.setattr(Scorer, "forward", forward)


SEEDS = range(4)


def test_good_runs_in_bfloat16_are_not_refused(model_dir, collator, answers, capsys):
    """One rounding of an answer of one token is more than the 0.05 nats that once were the bound; and it is said that it was."""
    for seed in SEEDS:
        engine = wide(model_dir, torch.bfloat16, seed)
        for start in (0, 8):
            assert outcome(engine, collator, answers[start : start + 4]) is None
    said = capsys.readouterr().out.splitlines()
    off = [float(line.split("at most ")[1].split()[0]) for line in said]
    assert max(off) > 0.05, "or the test shows nothing"
    assert all(("bfloat16 explains" in line) == (value > 0.05) for line, value in zip(said, off, strict=True))


def test_the_largest_logit_is_that_of_the_separate_row(model_dir, collator, answers):
    engine = wide(model_dir, torch.float32, 0)
    head = engine.module.model.get_output_embeddings()
    states: list[torch.Tensor] = []
    with torch.no_grad():
        row = collator.parts(answers[:2], None)[0]
        scores = row.scores(engine(**row.model_inputs))
        head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        cell = self_check._compared(engine, engine.module.model, collator, answers[:2], scores, [0, 0, 0])
        logits = [abs(float(state @ token)) for state in states[0].double() for token in head.weight.double()]
    assert len(states) == 1 and cell.largest_logit == pytest.approx(max(logits), rel=1e-5) and min(logits) < max(logits) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", [seeing_siblings, going_on_counting, other_images])
def test_wrong_masks_positions_and_images_are_refused(
    wrong, dtype, model_dir, collator, manifests,
    monkeypatch
):  # fmt: skip
    groups = [group for group in read_manifest(manifests["train"]) if len(group.candidates) > 1]
    engine = wide(model_dir, dtype, 0)
    wrong(monkeypatch)
    said = [outcome(engine, collator, groups[start : start + 4]) for start in (0, 4, 8)]
    assert all(said), said
    assert all("scores that differ by" in str(each) and "use sdpa" not in str(each) for each in said), "which is in use"


def test_ranks_name_what_is_not_finite_in_their_parts(model_dir, manifests, tmp_path):
    """Under ZeRO-3 the last rows of a weight are with rank 1; both end, and rank 0 says the one sentence; nothing is written."""
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["language_model.lm_head.weight"][-1, -1] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    arguments = train_arguments(broken, manifests, tmp_path / "run", "--train.self_check=error")
    first, second = run_train(2, arguments, code=2)
    said = f"{broken} has weights that are not finite: lm_head.weight"
    assert said in first.splitlines()[-1] and said not in second
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_bounds_of_clipping_may_be_infinite_and_not_nan():
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("input_max", torch.tensor(torch.inf))
    refuse_nonfinite(layer, "m", ONE)
    layer.input_max.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite: input_max;"):
        refuse_nonfinite(layer, "m", ONE)


def test_the_check_can_be_a_warning_or_left_out(capsys):
    def find(*arguments: Any) -> None:
        raise ConfigError("found")

    for wanted, said in {"warn": "warning: found\n", "off": ""}.items():
        config: Any = SimpleNamespace(train=SimpleNamespace(self_check=wanted))
        _checked(config, ONE, find)
        assert capsys.readouterr().out == said
    with pytest.raises(ConfigError, match="found"):
        _checked(SimpleNamespace(train=SimpleNamespace(self_check="error")), ONE, find)  # type: ignore[arg-type]


def test_rounding_is_shifted_up_and_down_alike():
    """Of 1.5, by at most one unit of the last place; a mean of 0."""
    layer = torch.nn.Identity()
    with rounded_otherwise(layer, torch.float32, 0, torch.device("cpu")):
        shifted = (layer(torch.full((100_000,), 1.5)).double() - 1.5) / torch.finfo(torch.float32).eps
    assert set(shifted.tolist()) == {-1.0, 0.0, 1.0} and abs(float(shifted.mean())) < 0.02
    assert bool((layer(torch.full((3,), 1.5)) == 1.5).all())


def test_differences_in_units_of_the_rounding_error(monkeypatch):
    """By hand: scores that rounding shifts by 0.1 per root of the tokens, and a difference of 0.2 at four tokens: one unit."""
    cells = [Cell(0.0 + off, 0.0, tokens, None, 0.0) for off, tokens in ((0.2, 4), (-0.3, 9))]
    monkeypatch.setattr(self_check, "_alone", lambda forward, model, single: 0.1 * next(turns) ** 0.5)
    turns = iter([4, 9] * 2)
    assert self_check._spreads(None, torch.nn.Identity(), cells, torch.float32, ONE) == pytest.approx(1.0)
