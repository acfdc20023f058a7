"""Model cards: what stands in them, also of hostile data, and that nobody's own README.md is replaced."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_json

from cfvlm_ds.checkpoint.finding import own_sum
from cfvlm_ds.cli import models
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.untrusted import replaced
from cfvlm_ds.evaluation.before_after import Change, to_table
from cfvlm_ds.export.folder import CARD, UNNAMED_BASE, is_own_card, place_card, sealed, stale_card, write_card
from cfvlm_ds.training.card import card_of, license_of, model_card

ROWS = [
    {"name": "colour", "num": 3, "metrics": {"group": 66.7, "pair": 75.0}, "blind": {"pair": 50.0}, "groups": {"group": 3, "pair": 3}}
    | {"comparisons": {"group": 3, "pair": 6}},
    {"name": "all", "num": 4, "metrics": {"group": 66.7, "pair": 75.0}, "blind": {"pair": 50.0}, "mean": True}
    | {"groups": {"group": 3, "pair": 3}, "comparisons": {"group": 3, "pair": 6}, "unused": {"group": ["g-4"], "pair": ["g-4"]}}
    | {"losses": {"align": {"weight": 1.0, "value": 2.5, "lacking": ""}}},
]
OPTIONS: dict[str, Any] = {
    "model": {"name_or_path": "org/base-7b", "projector": {"tuning": "full", "learning_rate": 2e-5}, "lora": {"rank": 8}},
    "train": {"learning_rate": 1e-4, "seed": 7, "max_steps": 300, "num_train_epochs": 1.0},
    "objective": {"align": {"weight": 1.0, "counterfactual": 0.5}, "csd": {"weight": 0.25, "margin": 1.0}, "dpo": {"weight": 0}},
}
DATA = [
    {"name": "train", "context": "training", "source": "/home/me/groups.jsonl", "format": "cfgroup", "groups": 48, "digest": "a" * 32},
    {"name": "test", "context": "evaluation", "source": "/home/me/test.jsonl", "format": "pairs", "groups": 4, "digest": "b" * 32}
    | {"overlaps": {"/home/me/groups.jsonl": "1 of its 6 pictures"}},
]
ENVIRONMENT = {"git_revision": "c" * 40, "world_size": 16, "device": "H100", "packages": {"torch": "2.13.0", "cfvlm-ds": "0.1.0"}}


def run_folder(folder: Path, step: int = 300, **files: Any) -> Path:
    """A run folder with as much as a card reads of it; the checkpoint."""
    (checkpoint := folder / f"checkpoint-{step}").mkdir(parents=True)
    write_json(checkpoint / "complete.json", {"step": step})
    given = {"config": OPTIONS, "data": DATA, "environment": ENVIRONMENT, "results": {"test": ROWS}, "finished": {"step": step}} | files
    for name, content in given.items():
        if content is not None:
            write_json(folder / f"{name}.{'yaml' if name == 'config' else 'json'}", content)
    return checkpoint


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, as readers of cards take them apart."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_says_base_data_objective_settings_and_results(tmp_path):
    checkpoint = run_folder(tmp_path / "my-run")
    sample = {"prompt": "Describe it.", "true": ["a dog", "a hound"]}
    lines = [
        json.dumps(sample | {"step": step, "text": f"{text} | cat"}) for step, text in ((150, "x"), (300, "a"), (300, "b"), (300, "c"))
    ]
    (tmp_path / "my-run" / "samples.jsonl").write_text("\n".join([*lines, ""]))
    front, body = parts(model_card(checkpoint, adapter=False, repo="me/tuned"))
    assert front == {
        "base_model": "org/base-7b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["cfvlm-ds", "counterfactual", "vision-language"],
    }
    for expected in (
        "Weights after 300 optimizer steps from `org/base-7b`",
        f"| `test` | `evaluation` | `4` | `pairs` | `test.jsonl` | `{'b' * 32}` |",
        "| `csd` | `0.25` | `margin 1.0` |",
        "| model.projector.learning_rate | `2e-05` |",
        f"| git revision (training) | `{'c' * 40}` |",
        "| deepspeed | not known |",
        "| test | `colour` | 3 | ",
        "| test | mean of edit types, blank image | 4 | ",
        "warning: data.evaluation.`test`: `1 of its 6 pictures` also occur in the training set `groups.jsonl`, so its",
        'name = "me/tuned"\n',
        "Limits: evaluated only on `test` (4 groups); ",
        "| `Describe it.` | `a dog / a hound` | `a ¦ cat` |\n| `Describe it.` | `a dog / a hound` | `b ¦ cat` |\n\n",
    ):
        assert expected in body, expected
    assert "train.num_train_epochs" not in body and "| train.max_steps | `300` |" in body, "which does not count beside it"
    compile(body.partition("```python\n")[2].partition("```")[0], "Use", "exec")
    assert "train.adam_epsilon" not in body and "data.stopping_strategy" not in body, "which have their defaults"
    assert body.index("## Results") < body.index("## Use") < body.index("## Training")
    assert "local folder" not in body
    named = [next(line for line in model_card(checkpoint, adapter=each).splitlines() if "precision of" in line) for each in (False, True)]
    assert ["the base model's" in line for line in named] == [True, False]
    assert "dpo" not in body and "lora" not in body and "/home/me" not in body


def test_a_card_lists_adapters_where_a_module_has_them_and_the_precision(tmp_path):
    def rows(name: str, tuning: str, **ds_config: Any) -> dict[str, str]:
        options = OPTIONS | {"model": OPTIONS["model"] | {"language_model": {"tuning": tuning}}}
        card = model_card(run_folder(tmp_path / name, config=options, ds_config=ds_config or None), adapter=True)
        return {cells[1]: cells[2] for line in card.splitlines() if len(cells := [cell.strip() for cell in line.split("|")]) == 4}

    adapted, whole = rows("adapted", "lora", bf16={"enabled": True}), rows("whole", "full", zero_optimization={"stage": 3})
    assert (adapted["model.lora.rank"], adapted["model.language_model.tuning"]) == ("`8`", "`lora`") and "model.lora.rank" not in whole
    precision = "precision of training and evaluation"
    assert (adapted[precision], whole[precision], rows("none", "full")[precision]) == ("`bf16`", "`fp32`", "not known")


def test_a_card_compares_the_nll_with_that_of_uniform_guessing(tmp_path):
    table = to_table([Change("test", "colour", 1, 1, "pair", 0.0, 0.0, 0.0, None, None, 0, 0, nll_before=2.5, nll_after=2.0)])
    checkpoint = run_folder(tmp_path / "run", environment=ENVIRONMENT | {"vocabulary": 50}, before_after=table)
    (line,) = (line for line in model_card(checkpoint, adapter=False).splitlines() if "uniform" in line)
    assert " 3.91 " in line, "e to this power is 50"
    earlier = run_folder(tmp_path / "earlier", before_after=table)
    assert "uniform" not in model_card(earlier, adapter=False), "an earlier run's record has no vocabulary"


def test_a_card_says_what_it_does_not_know(tmp_path):
    nothing = dict.fromkeys(("data", "environment", "results", "finished"))
    body = parts(model_card(run_folder(tmp_path / "bare", **nothing), adapter=False))[1]
    assert "the run folder has no readable data.json" in body and "Not known: these weights had not been evaluated" in body
    earlier = run_folder(tmp_path / "earlier", finished={"step": 900})
    assert "Not known: these weights had not been evaluated" in model_card(earlier, adapter=False), "the results are of step 900"
    assert "| test | `colour` |" in model_card(earlier, adapter=False, evaluated=True)
    assert "None: the run had no evaluation sets." in model_card(run_folder(tmp_path / "none", results={}), adapter=False)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*; restore it"):
        model_card(run_folder(tmp_path / "torn", config=[1]), adapter=False)
    said: list[str] = []
    assert card_of(tmp_path / "torn" / "checkpoint-300", said.append, adapter=False) is None
    assert said[0].startswith("warning: no README.md could be written for ")


# What somebody else has written ------------------------------------------------------------------------------------------------------

EVIL = "x` | <img src=//evil>\n---\nlicense: mit\n# [a](javascript:b)\\| \\\\| ![](//evil) \x1b[2J \ud800 <!-- cfvlm-ds"


def only_code(body: str) -> str:
    """The body without its code spans and its own markup: what could mean something to a renderer."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```python\n.*?\n```\n", "", body, flags=re.DOTALL | re.MULTILINE))


def test_what_a_card_quotes_means_nothing_to_yaml_markdown_or_html(tmp_path):
    """Names of edit types and groups, which rows of data say; of data sets, models and folders."""
    row = {**ROWS[0], "name": EVIL}
    mean = {**ROWS[1], "unused": {"group": [EVIL]}, "losses": {"align": {**ROWS[1]["losses"]["align"], "lacking": EVIL}}}
    options = OPTIONS | {"model": {"name_or_path": EVIL}}
    run = run_folder(
        tmp_path / "a `b` <i>|c",
        config=options,
        data=[DATA[0] | {"name": EVIL, "source": f"/x/{EVIL}", "overlaps": {EVIL: EVIL}}],
        results={"test": [row, mean]},
    )
    card = model_card(run, adapter=False)
    front, body = parts(card)
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}
    left = only_code(body)
    for sign in ("<img", "evil", "javascript", "license: mit", "<i>", "\x1b", "---\n\n---"):
        assert sign not in left, left
    assert all(letter.isprintable() or letter == "\n" for letter in card)
    tables = [line for line in body.splitlines() if line.startswith("|")]  # a bar ends a cell in a code span too
    widths = {line.count("|") for line in tables}
    assert widths <= {3, 4, 7, 6, 11, 12}, "no bar of a value makes a cell"
    assert [line for line in left.splitlines() if line.startswith("#")] == [
        "# ",
        *(f"## {n}" for n in ("Results", "Use", "Data", "Objective", "Training")),
    ]


def test_secrets_are_masked(tmp_path):
    options = {
        "model": {"name_or_path": "https://me:hunter2@host/x"},
        "train": {"lr_scheduler_type": "token=hunter2"},
        "objective": {"align": {"weight": 1, "api_key": "hunter2", "note": "https://host/?sig=hunter2"}},
    }
    sources = [{**DATA[0], "source": "https://me:hunter2@host/a?token=hunter2", "name": "password=hunter2"}]
    run = run_folder(tmp_path / "run", config=options, data=sources, environment={"device": "hf_token: hunter2"})
    assert "hunter2" not in model_card(run, adapter=False)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: 'a\n\n  b https://me:hunter2@x/'\n---\n", "a b https://***@x/"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("# A card without metadata\n", ""),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", ""),
        ("---\nx: " + "[" * 1000 + "\n---\n", ""),
    ],
    ids=range(6),
)
def test_a_license_is_named_as_that_of_the_base(card, expected, tmp_path, caplog):
    (tmp_path / CARD).write_bytes(card.encode())
    assert license_of(str(tmp_path)) == expected and "metadata" not in caplog.text
    front, body = parts(
        model_card(run_folder(tmp_path / "run", config={**OPTIONS, "model": {"name_or_path": str(tmp_path)}}), adapter=False)
    )
    assert "license" not in front, "the base's terms are not asserted of the tuned weights"
    assert "base_model" not in front and "base_model_relation" not in front and UNNAMED_BASE in body
    assert ("license is not known" in body) == (not expected) and (f"License of the base model: `{expected}`." in body) == bool(expected)
    assert f"from `{tmp_path.name}`" in body and str(tmp_path.parent) not in body, "of a folder its name alone"


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/passwd"), os.mkdir], ids=["link", "folder"])
def test_a_base_whose_card_is_no_file_states_no_license(make, tmp_path):
    make(tmp_path / CARD)
    assert license_of(str(tmp_path)) == ""
    assert license_of("no/such-model") == license_of("no such name at all") == license_of("") == ""


# Whose README.md it is -------------------------------------------------------------------------------------------------------------------


def export(out: Path, card: str | None) -> None:
    with replaced(out, "config.json", ()) as partial:
        (partial / "config.json").write_text("{}")
        place_card(partial, out, card)


def test_a_card_of_ours_is_replaced_and_anything_else_stays(tmp_path):
    first, second = sealed("# one\n"), sealed("# two\n")
    export(out := tmp_path / "export", first)
    assert (out / CARD).read_text() == first and is_own_card(out / CARD)
    export(out, second)
    assert (out / CARD).read_text() == second
    assert write_card(out, first) and (out / CARD).read_text() == first
    for theirs in (first.replace("one", "mine"), first + "\n", ""):
        (out / CARD).write_bytes(theirs.encode())
        export(out, second)
        assert (out / CARD).read_bytes() == theirs.encode() and not write_card(out, second)
        assert (out / CARD).read_bytes() == theirs.encode()
    export(out, None)
    assert (out / CARD).exists(), "nor is it lost where no card is written"


def test_an_edited_card_of_another_step_is_not_published(tmp_path):
    """The run continues from step 20 to 30: the card that the user edited at step 20 stays, but the weights beside it are of step 30."""
    cards = {step: model_card(run_folder(tmp_path / str(step), step), adapter=False) for step in (20, 30)}
    described = {"step": 30, "files": {}}
    write_json(tmp_path / "30" / "checkpoint-30" / "complete.json", described | {"crc32": own_sum(described)})
    export = tmp_path / "30" / "export"
    assert stale_card(export, cards[30]) is None, "there is no card"
    export.mkdir()
    for card, is_stale in ((cards[20], False), (cards[30] + "mine", False), ("# mine\n", False), (cards[20] + "mine", True)):
        (export / CARD).write_text(card)
        assert (stale_card(export, cards[30]) is not None) == is_stale
    with pytest.raises(
        ConfigError, match=r"README\.md has been edited and describes weights after 20 optimizer steps, .*after 30 optimizer"
    ):
        models.export(str(tmp_path / "30"), push="me/tuned")
    assert (export / CARD).read_text() == cards[20] + "mine" and len(list(export.iterdir())) == 1


def test_a_link_of_that_name_is_not_followed(tmp_path):
    (target := tmp_path / "target").write_text(sealed("# linked\n"))
    for number, make in enumerate((lambda path: path.symlink_to(target), lambda path: path.symlink_to("nowhere"))):
        export(out := tmp_path / str(number), None)
        make(out / CARD)
        export(out, sealed("# ours\n"))
        assert (out / CARD).is_symlink()
        assert not write_card(out, sealed("# ours\n"))
    assert target.read_text() == sealed("# linked\n")
