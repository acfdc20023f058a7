"""Figures: they are drawn, hold what they should, and name bad input. How they look was judged by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from PIL import Image

from cfvlm_ds.evaluation import Accuracy
from cfvlm_ds.tracking.figures import learning_curves_figure
from cfvlm_ds.training.results import draw_curves


def _share(path: Path, colour: str) -> float:
    """Share of the pixels of exactly this colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        counts = rgb.getcolors(rgb.width * rgb.height) or []
        return sum(count for count, pixel in counts if pixel == wanted) / (rgb.width * rgb.height)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_rows(path, ({"time": 0.0, **row} for row in rows))
    return path


def test_learning_curves_have_a_panel_for_what_there_is(tmp_path):
    loss = [{"step": step, "loss/lm": 1.0 / step, "lr": 0.1} for step in range(1, 101)]
    learning_curves_figure(tmp_path / "loss.png", _write(tmp_path / "loss.jsonl", [*loss, {"step": 101, "loss/lm": "nan"}]))
    more = [
        {"step": 50, "eval/val/group": 0.5, "eval/val/seconds": 3.0},
        {"step": 1, "logp/lp_00": -3.0},
        {"step": 1, "active/causal": 1.0},
        {"step": 1, "active/constant": 1.0},
        {"step": 2, "active/constant": 1.0},
    ]
    metrics = _write(tmp_path / "all.jsonl", loss + more)
    with metrics.open("a") as file:
        file.write('{"step": 102, "lo')  # the run is writing
    learning_curves_figure(tmp_path / "all.png", metrics)
    with Image.open(tmp_path / "loss.png") as one, Image.open(tmp_path / "all.png") as four:
        assert (four.width, four.height) == (2 * one.width, 2 * one.height)


@pytest.mark.parametrize("words", ["$\\frac{$", "5 $ and 6 {$", "_a\t$x_$", "\\ {}%s"])
def test_words_of_the_data_are_drawn_as_written(words, tmp_path):
    """Names that read as formulas to the library, some of them broken ones."""
    rows = [{"step": step, f"eval/{words}/group": 50.0, f"loss/{words}": 1.0} for step in (1, 2)]
    learning_curves_figure(tmp_path / "curves.png", _write(tmp_path / "metrics.jsonl", rows))
    assert _share(tmp_path / "curves.png", "#2563a8") > 0


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of their files."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


def test_accuracies_are_percent_and_few_enough_to_read(tmp_path, drawn):
    """Four splits with six metrics for each of ten edit types: eight series of whole splits, the others counted."""
    names = [
        f"eval/split_{split}/{edit}{metric}"
        for split in range(4)
        for edit in ("", *(f"edit {k}/" for k in range(9)))
        for metric in ("text", "image", "group", "pair", "blind_pair", "sham")
    ]
    rows = [{"step": step, **{name: 80.0 + place / 40 + step for place, name in enumerate(names)}} for step in (1, 2, 3)]
    rows[0] |= {f"eval/split_0/{loss}": 1.0 for loss in ("loss", "loss_align", "nll")}  # not accuracies
    learning_curves_figure(tmp_path / "x.png", _write(tmp_path / "m.jsonl", [*rows, {"step": 3, "logp/lp_00": -1.0}]))
    (figure,) = drawn
    logp, accuracy = figure.axes
    assert (logp.get_ylabel(), accuracy.get_ylabel()) == ("nats per token", "%")
    assert accuracy.get_ylim()[0] < 0 and 100 < accuracy.get_ylim()[1] < 110
    shown = [f"split_{split}/{metric}" for metric in ("group", "pair") for split in range(4)]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == [*shown, f"and {len(names) - 8} more in metrics.jsonl"]
    assert accuracy.lines[0].get_linewidth() > accuracy.lines[1].get_linewidth(), "visible behind the others"
    assert all(line.get_ydata()[-1] == rows[-1][f"eval/{name}"] for line, name in zip(accuracy.lines, shown, strict=False))


def test_a_line_has_the_number_of_groups_behind_it(tmp_path, drawn):
    """Of 9 groups, 5 allow ``group``; ``pair`` and ``factual`` are equal, but not of equally many groups. A sample has its size."""
    points = {"val/group": 20.0, "val/pair": 40.0, "val/factual": 40.0}
    rows = [{"step": step, **{f"eval/{name}": value + step for name, value in points.items()}} for step in (1, 2)]
    _write(tmp_path / "metrics.jsonl", [*rows, {"step": 2, "eval_sample/many/pair": 1.0}])
    results = {"val": [Accuracy("all", 9, {}, groups={"group": 5, "pair": 9, "factual": 8}, mean=True)], "none": []}
    assert draw_curves(tmp_path, results, {"eval_sample/many/pair": "30 of 99 groups"}, list[str]().append)
    sample, accuracy = ([text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn[0].axes)
    assert sample == ["many/pair, 30 of 99 groups"]
    assert accuracy == ["val/group, 5 groups", "val/pair, 9 groups\n= val/factual, 8 groups"]


@pytest.mark.parametrize(("lowest", "scale"), [(0.01, "log"), (0.0, "log"), (-0.01, "linear")])
def test_a_small_loss_term_is_no_flat_line(tmp_path, drawn, lowest, scale):
    """The lines of two terms that both halve have the same height in the panel, unless a term is negative."""
    rows = [{"step": step, "loss/align": 0.7 / step, "loss/csd": 0.02 / step, "loss/fcd": lowest} for step in (1, 2)]
    learning_curves_figure(tmp_path / "x.png", _write(tmp_path / "m.jsonl", rows))
    (panel,) = drawn[0].axes
    assert panel.get_yscale() == scale
    align, csd = ([panel.transData.transform(point)[1] for point in line.get_xydata()] for line in panel.lines[:2])
    assert (align[0] - align[1] == pytest.approx(csd[0] - csd[1])) == (scale == "log")


@pytest.mark.parametrize("end", [0.0, 1e-30])
def test_a_loss_term_that_ends_at_zero_leaves_the_others_visible(tmp_path, drawn, end):
    """A long series, whose moving average falls by a constant factor per step: the axis keeps its ticks, and the label names the edge."""
    rows = [{"step": step, "loss/align": 3 / step, "loss/csd": 0.02 if step < 20 else end} for step in range(1, 200)]
    learning_curves_figure(tmp_path / "x.png", _write(tmp_path / "m.jsonl", rows))
    (panel,) = drawn[0].axes
    low, high = panel.get_ylim()
    assert high / low < 1e7 and sum(low <= tick <= high for tick in panel.get_yticks()) > 3
    assert panel.get_ylabel().startswith("loss (lower values drawn at ")
    drawn_at = [value for line in panel.lines for value in line.get_ydata()]
    assert low <= min(drawn_at), "no value is below the panel"


def test_learning_curves_without_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        learning_curves_figure(tmp_path / "x.png", _write(tmp_path / "m.jsonl", [{"step": 1, "lr": 0.1}]))
