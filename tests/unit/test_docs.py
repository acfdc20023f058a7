"""The pages of docs/ and README: what they quote, the commands they show, and the reference that is generated from the code."""

from __future__ import annotations

import ast
import csv
import functools
import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from conftest import REPO, environment, flat
from nbclient import NotebookClient
from PIL import Image, ImageDraw

from cfvlm_ds.cli import main
from cfvlm_ds.cli.train import with_quickstart
from cfvlm_ds.core.parsing import parse_config
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.formats import FORMATS
from cfvlm_ds.objectives import OBJECTIVES

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@functools.cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPO / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_in_the_code() -> list[str]:
    """Every string of the package on one line, with a NUL for what is filled in."""
    said = []
    for path in (REPO / "cfvlm_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return [" ".join(text.split()) for text in said]


def test_every_message_of_the_troubleshooting_page_is_one():
    page = (REPO / "docs" / "troubleshooting.md").read_text().split("\n## Options\n")[1].split("\n## Results\n")[0]
    quoted, said = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE), said_in_the_code()
    assert len(quoted) > 40
    patterns = {message: ".*?".join(re.escape(part.strip()) for part in message.split("...") if part.strip()) for message in quoted}
    assert not [message for message, pattern in patterns.items() if not any(re.search(pattern, text) for text in said)]


def test_what_security_promises_is_tested():
    """Each promise names a test that is there."""
    page = (REPO / "docs" / "security.md").read_text()
    rows = page.split("## Promises")[1].split("## Limits of these promises")[0].splitlines()[4:]
    files = {str(path.relative_to(REPO)): path.read_text() for path in (REPO / "tests").rglob("test_*.py")}
    for row in filter(None, rows):
        named, tests = re.findall(r"`(tests/[\w/]+\.py)`", row), re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= files.keys(), row
        assert all(any(f"def {test}(" in files[file] for file in named) for test in tests), row


def test_every_metric_of_a_training_is_on_the_page():
    page = (REPO / "docs" / "metrics.md").read_text()
    code = "".join(path.read_text() for room in ("training", "objectives") for path in (REPO / "cfvlm_ds" / room).glob("*.py"))
    named = set(re.findall(r'"((?:throughput|checkpoint|active|violated|dpo|symmpo|misp|svco|credit)/\w+)"', code)) | {
        "skipped_steps",
        "skipped_groups",
        "grad_norm",
    }
    assert len(named) > 15 and not [name for name in sorted(named) if f"`{name}`" not in page]


def commands(page: Path) -> list[list[str]]:
    """The commands of cfvlm-ds and of train.py that a page shows: two may share a line; "..." is no option."""
    found = []
    for _, _, block in FENCE.findall(page.read_text()):
        for line in block.splitlines():
            for part in re.split(r" {3,}(?=cfvlm-ds )", line):
                words = shlex.split(part, comments=True) if re.match(r"(cfvlm-ds|train\.py|python|deepspeed|sbatch) ", part) else []
                if (
                    words
                    and "..." not in words
                    and (words[0] == "cfvlm-ds" or any(word.endswith(("train.py", "node.sh")) for word in words))
                ):
                    found.append(words)
    return found


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("name, words", COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS])
def test_every_command_of_the_pages_parses(name, words, tmp_path, monkeypatch):
    """Commands and options that a page shows are there; nothing is run."""
    ran: list[Any] = []
    monkeypatch.setattr(main, "exit_cleanly", ran.append)
    for folder in ("examples", "ds_configs"):
        (tmp_path / folder).symlink_to(REPO / folder)
    for config in ("my.yaml", "made.yaml", "twenty.yaml"):
        (tmp_path / config).write_text("model: {name_or_path: some/model}\n")
    monkeypatch.chdir(tmp_path)
    script = next((place for place, word in enumerate(words) if word.endswith(("train.py", "node.sh"))), None)
    if words[0] == "cfvlm-ds" and words[1] != "train":
        main.main(words[1:])
        assert len(ran) == 1
    else:
        arguments = words[2:] if script is None else words[script + 1 :]
        parse_config(with_quickstart(arguments), OBJECTIVES)


def test_the_reference_lists_what_the_parser_takes():
    """Names and defaults, compared with what a run has where no option is given."""
    text = (REPO / "docs" / "configuration.md").read_text()
    assert text == script("options").page(), "written anew by `python docs/options.py`"
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.partition("\n## All options\n")[2].splitlines()]
    rows = {row[0].strip("`"): row for row in cells if row and row[0].startswith("`")}
    every_term = [part for name, term in OBJECTIVES.items() for part in (f"--objective.{name}.weight", str(term().weight))]
    taken = flat(parse_config(every_term, OBJECTIVES).resolved)
    del taken["deepspeed"]
    nested = ("build.habits", "train.rounds")
    prefixes = tuple(f"{name}." for name in (*nested, "data.evaluation.NAME", "data.train.SOURCE"))
    inside = {name for name in rows if name.startswith(prefixes)}
    assert rows.keys() - inside == taken.keys() - set(nested) and len(inside) == 8 + 9 + 11 + 6
    for name, default in taken.items():
        if name in rows:
            shown = rows[name][2].strip("`")
            assert shown == "none" if default in (None, "", {}) else shown == str(default).lower() or float(shown) == default, name
    assert all(row[4] in ("confirm", "refuse", "free", "ignored") and row[5] for row in rows.values())


def test_a_link_that_leads_nowhere_is_a_warning(caplog):
    """Which a strict build makes an error; a good one leads to the page's place in the site."""
    hooks = script("site_hooks")

    def relinked(text: str, uri: str) -> str:
        return hooks._LINK.sub(lambda link: hooks._relinked(link, uri), text)

    assert relinked("[x](docs/slurm.md#environment)", "README.md") == "[x](slurm.md#environment)"
    assert relinked("[x](../benchmarks/RESULTS.md)", "families.md") == "[x](benchmarks/RESULTS.md)"
    assert relinked("![x](../docs/scoring.png)", "benchmarks/RESULTS.md") == "![x](../scoring.png)"
    assert relinked("[x](https://arxiv.org/abs/2506.17267)", "README.md") == "[x](https://arxiv.org/abs/2506.17267)"
    with caplog.at_level(logging.WARNING):
        assert not caplog.messages
        relinked("[x](docs/nowhere.md)", "README.md")
        relinked("[x](../LICENSE)", "families.md")
    assert ["which is not there" in message or "is no page" in message for message in caplog.messages] == [True, True]


def test_the_picture_of_the_architecture_shows_every_folder():
    picture = FENCE.findall((REPO / "docs" / "architecture.md").read_text().split("\n## Package diagram\n")[1])[0][2]
    shown = set(re.findall(r"(?:^ |\+-- )([a-z_]+)  ", picture, re.MULTILINE))
    assert shown == {path.parent.name for path in (REPO / "cfvlm_ds").glob("*/__init__.py")}


@pytest.mark.long
def test_the_notebook_makes_a_compared_model_of_twenty_pictures(tmp_path):
    notebook = nbformat.read(REPO / "examples" / "quickstart.ipynb", as_version=4)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "groups.jsonl").write_text("of an earlier run\n")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (compared,) = (cell.outputs[0].text for cell in notebook.cells if "cfvlm-ds compare" in cell.source)
    before, after = re.findall(r"\| group \| (\S+) \| (\S+) \|", compared)[0]
    assert float(before) < float(after), compared
    assert len([*tmp_path.glob("work*/runs/notebook/export/model.safetensors")]) == 1


def test_the_format_of_the_page_reads_rows(tmp_path, monkeypatch):
    section = (REPO / "docs" / "extending.md").read_text().split("\n## A data format\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.setitem(FORMATS, "negated", None)  # and taken out again at the end
    exec(compile(block, "extending.md", "exec"), {})
    row = {"id": "a", "image": "a.png", "caption": "a dog", "wrong": "no dog"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (group,) = read_manifest(tmp_path / "rows.jsonl", format="negated")
    assert group.images == ((tmp_path / "a.png",),) and group.match == ((1, 0),)
    assert [each.text for each in group.candidates] == ["a dog", "no dog"]


def followed(page: str, folder: Path, draw: Callable[[str, str], object]) -> str:
    """Writes the page's files and runs its commands as they stand, in order, without a network; what they print."""
    for name in ("train.py", "cfvlm_ds", "ds_configs"):
        (folder / name).symlink_to(REPO / name)
    said, variables = "", environment() | {"HF_HUB_OFFLINE": "1"}
    for language, title, block in FENCE.findall(page):
        if title:
            (folder / title).write_text(block)
            draw(title, block)
        for command in block.splitlines() if language == "bash" else ():
            done = subprocess.run(command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            said += done.stdout
    return said


@pytest.mark.long
def test_the_tutorial_runs(tmp_path):
    """On pictures drawn for its table, which has more lines of the same kind."""
    page = (REPO / "docs" / "tutorial.md").read_text()
    said = followed(page, tmp_path, lambda title, _: title == "captions.csv" and draw_pictures(tmp_path))
    assert "step 20/20" in said and "| test | mean of edit types, blank image |" in said
    assert {"results.md", "learning_curves.png", "export"} <= set(os.listdir(tmp_path / "runs" / "mine"))


@pytest.mark.long
def test_data_are_made_as_the_page_says(tmp_path):
    """From drawn pictures and a table of captions to adapters, and from twenty pictures to a comparison."""
    for folder in ("pictures", "photos"):
        (tmp_path / folder).mkdir()
    lines = ["image,caption"]
    for number, (first, second) in enumerate(itertools.permutations(("red", "green", "blue", "yellow", "purple"), 2)):
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).ellipse((8, 32, 40, 64), fill=first)
        ImageDraw.Draw(picture).rectangle((56, 32, 88, 64), fill=second)
        picture.save(tmp_path / "photos" / f"{number}.png")
        lines.append(f"{number}.png,a {first} circle to the left of a {second} square")
    (tmp_path / "twenty.csv").write_text("\n".join(lines) + "\n")

    def draw(title: str, block: str) -> None:
        for number, row in enumerate(csv.DictReader(block.splitlines()) if title == "plain.csv" else ()):
            picture = Image.new("RGB", (64, 48), (200, 200, 200))
            ImageDraw.Draw(picture).ellipse((4, 10, 28, 34), fill=("red", "blue", "yellow")[number])
            ImageDraw.Draw(picture).rectangle((38, 10, 60, 34), fill="green")
            picture.save(tmp_path / "pictures" / row["image"])

    said = followed(
        (REPO / "docs" / "making_data.md").read_text().split("\n## Quick start\n")[1].split("\n## Propose\n")[0], tmp_path, draw
    )
    groups = read_manifest(tmp_path / "made.jsonl", [tmp_path, tmp_path / "pictures", tmp_path / "W"])
    assert len(groups) == 3 and "back end: mine" in said and "editor: flip" in said and "step 4/4" in said
    assert any(len(group.images) > 1 and "shard-" in str(group.images[1][0]) for group in groups)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "| test |" in (tmp_path / "runs" / "twenty" / "results.md").read_text() and "colour" in said


def draw_pictures(folder: Path) -> None:
    """Twenty lines of the table, each with pictures of its own."""
    with open(folder / "captions.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    (folder / "photos").mkdir()
    more = []
    for copy in range(5):
        for number, row in enumerate(rows):
            named = dict(row)
            for place, key in enumerate(("image", "edited_image")):
                if row[key]:
                    named[key] = row[key] if not copy else f"{copy}_{row[key]}"
                    picture = Image.new("RGB", (64 + 8 * number, 56), ((40 * copy) % 256, 60 * number, 120))
                    ImageDraw.Draw(picture).rectangle((10 + 12 * place, 10, 30 + 12 * place, 30), fill=("red", "blue")[place])
                    picture.save(folder / "photos" / named[key])
            more.append(named | {"id": f"{row['id']}-{copy}"})
    with open(folder / "captions.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(more)
