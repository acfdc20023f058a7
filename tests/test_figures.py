"""Figures: they are drawn, hold what they should, and name bad input. How they look was judged by eye."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cfvlm_ds.figures import TRUE_COLOUR, learning_curves_figure, score_matrix_figure


def _group(**changes: Any) -> dict[str, Any]:
    group: dict[str, Any] = {
        "title": "count",
        "images": [[Image.new("RGB", (32, 24), "#00ff00")], [Image.new("RGB", (24, 32), "#00ff00")]],
        "captions": ["two red circles", "three red circles that need several lines of text to be said in full"],
        "scores": [[-8.0, -12.0], [None, float("nan")]],
        "match": [[1, 0], [None, 1]],
    }
    return group | changes


def _share(path: Path, colour: str) -> float:
    """Share of the pixels of exactly this colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        counts = rgb.getcolors(rgb.width * rgb.height) or []
        return sum(count for count, pixel in counts if pixel == wanted) / (rgb.width * rgb.height)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in rows))
    return path


def test_score_matrix_shows_images_and_outlines_true_cells(tmp_path: Path) -> None:
    score_matrix_figure(tmp_path / "none.png", [_group(match=[[0, 0], [0, 0]])])
    score_matrix_figure(tmp_path / "two.png", [_group()])
    assert _share(tmp_path / "two.png", "#00ff00") > 0.05
    assert _share(tmp_path / "two.png", TRUE_COLOUR) > 2 * _share(tmp_path / "none.png", TRUE_COLOUR) > 0  # the legend has one
    score_matrix_figure(tmp_path / "three.png", [_group(), _group(title=""), _group(images=[[], []])])
    with Image.open(tmp_path / "two.png") as one, Image.open(tmp_path / "three.png") as three:
        assert three.height > 2.5 * one.height and three.width == one.width


@pytest.mark.parametrize("part", ["scores", "match"])
def test_score_matrix_of_the_wrong_shape_is_named(tmp_path: Path, part: str) -> None:
    for wrong in ([[1.0, 2.0]], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match=f"{part} is not .*count"):
            score_matrix_figure(tmp_path / "x.png", [_group(**{part: wrong})])
    with pytest.raises(ValueError, match="no groups"):
        score_matrix_figure(tmp_path / "x.png", [])


def test_learning_curves_have_a_panel_for_what_there_is(tmp_path: Path) -> None:
    loss = [{"step": step, "loss/lm": 1.0 / step, "lr": 0.1} for step in range(1, 101)]
    learning_curves_figure(tmp_path / "loss.png", _write(tmp_path / "loss.jsonl", [*loss, {"step": 101, "loss/lm": "nan"}]))
    more = [
        {"step": 50, "eval/val/group": 0.5, "eval/val/seconds": 3.0},
        {"step": 1, "logp/lp_00": -3.0},
        {"step": 1, "active/causal": 1.0},
    ]
    metrics = _write(tmp_path / "all.jsonl", loss + more)
    with metrics.open("a") as file:
        file.write('{"step": 102, "lo')  # the run is writing
    learning_curves_figure(tmp_path / "all.png", metrics)
    with Image.open(tmp_path / "loss.png") as one, Image.open(tmp_path / "all.png") as four:
        assert (four.width, four.height) == (2 * one.width, 2 * one.height)


def test_learning_curves_without_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        learning_curves_figure(tmp_path / "x.png", _write(tmp_path / "m.jsonl", [{"step": 1, "lr": 0.1}]))
    with pytest.raises(FileNotFoundError):
        learning_curves_figure(tmp_path / "x.png", tmp_path / "missing.jsonl")


def test_importing_does_not_import_matplotlib() -> None:
    code = "import sys, cfvlm_ds.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
