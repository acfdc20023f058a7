"""Figures of score matrices and learning curves, drawn with matplotlib's Agg backend and without its global state.

Plain data in, one PNG out; matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1f2933", "#6b7785", "#d9dee4"
TRUE_COLOUR = "#e8710a"
LINES = ("#2563a8", "#e8710a", "#2f9e62", "#8a4fbf", "#c2334d", "#6b7785", "#b08900", "#1296a8")
DPI = 160

# Inches. A cell is as high as a thumbnail, so that an image is beside its own row.
_CELL_W, _CELL_H, _THUMB, _MARGIN, _LINE, _TITLE, _GAP = 1.75, 1.05, 1.05, 0.2, 0.145, 0.24, 0.3
_CAPTION_CHARS, _CAPTION_LINES, _TITLE_CHARS = 26, 8, 90
_MOST_IMAGES, _MOST_CAPTIONS = 6, 8
_MOST_SERIES, _SERIES_CHARS = 8, 30

AS_WRITTEN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""For every text that holds words of the data: a caption with two dollar signs is not a formula."""


def score_matrix_figure(path: Path, groups: Sequence[Mapping[str, Any]]) -> None:
    """One PNG of sample groups: each image beside its row of scores, each caption above its column, true cells outlined.

    A group that is too large to be read shows its first images and captions, and says how many there are.

    Args:
        path: the PNG to write.
        groups: mappings with ``images`` (I lists of the PIL images shown together), ``captions`` (C texts), ``scores`` ([I][C], nats; None
            or NaN where there is none), ``match`` ([I][C]: 1 true, 0 false, None unknown) and optionally ``title``.

    Raises:
        ValueError: no groups, or a group whose parts differ in shape.
    """
    from matplotlib.figure import Figure

    if not groups:
        raise ValueError("no groups to draw")
    for group in groups:
        shape = (len(group["images"]), len(group["captions"]))
        for part in ("scores", "match"):
            if any(len(row) != shape[1] for row in group[part]) or len(group[part]) != shape[0]:
                raise ValueError(f"{part} is not [{shape[0]} images][{shape[1]} captions] in the group {group.get('title', '')!r}")
    groups = [_readable(group) for group in groups]
    width = 2 * _MARGIN + _THUMB + 0.1 + max(len(group["captions"]) for group in groups) * _CELL_W
    heights = [_group_height(group) for group in groups]
    height = sum(heights) + _GAP * len(groups) + 2 * _MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    top = _MARGIN
    for group, group_height in zip(groups, heights, strict=True):
        _draw_group(figure, group, top)
        top += group_height + _GAP
    _legend(figure, top)
    figure.savefig(path)


def _readable(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's first images and captions, as many as can be read; its title counts the others."""
    images, captions = len(group["images"]), len(group["captions"])
    title = _short(str(group.get("title", "")), _TITLE_CHARS)
    if images > _MOST_IMAGES or captions > _MOST_CAPTIONS:
        shown = f"{min(images, _MOST_IMAGES)} of {images} images, {min(captions, _MOST_CAPTIONS)} of {captions} captions"
        title = f"{title} ({shown})".strip()
    rows = {part: [row[:_MOST_CAPTIONS] for row in group[part][:_MOST_IMAGES]] for part in ("scores", "match")}
    return {"title": title, "images": group["images"][:_MOST_IMAGES], "captions": group["captions"][:_MOST_CAPTIONS], **rows}


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _wrapped(caption: str) -> list[str]:
    caption = caption[: 2 * _CAPTION_CHARS * _CAPTION_LINES]  # wrapping takes time for a caption of megabytes
    return textwrap.wrap(caption, _CAPTION_CHARS, max_lines=_CAPTION_LINES, placeholder=" \N{HORIZONTAL ELLIPSIS}") or [""]


def _caption_height(group: Mapping[str, Any]) -> float:
    return max(len(_wrapped(caption)) for caption in group["captions"]) * _LINE + 0.1


def _group_height(group: Mapping[str, Any]) -> float:
    return (_TITLE if group.get("title") else 0.0) + _caption_height(group) + len(group["images"]) * _CELL_H


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the top left corner, without frame or ticks."""
    total_w, total_h = figure.get_size_inches()
    axes = figure.add_axes((left / total_w, 1 - (top + height) / total_h, width / total_w, height / total_h))
    axes.set_axis_off()
    return axes


def _draw_group(figure: Figure, group: Mapping[str, Any], top: float) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    num_images, num_captions = len(group["images"]), len(group["captions"])
    cells_left, cells_top = _MARGIN + _THUMB + 0.1, top + _group_height(group) - num_images * _CELL_H
    total_w, total_h = figure.get_size_inches()
    if group.get("title"):
        figure.text(_MARGIN / total_w, 1 - top / total_h, group["title"], fontsize=10.5, weight="bold", color=INK, va="top", **AS_WRITTEN)
    for c, caption in enumerate(group["captions"]):
        x = (cells_left + (c + 0.5) * _CELL_W) / total_w
        y = 1 - (cells_top - 0.07) / total_h
        lines = "\n".join(_wrapped(caption))
        figure.text(x, y, lines, fontsize=8.5, color=INK, ha="center", va="bottom", linespacing=1.2, **AS_WRITTEN)
    for i, pictures in enumerate(group["images"]):
        part = _THUMB / max(1, len(pictures))
        for k, picture in enumerate(pictures):
            _axes(figure, _MARGIN + k * part, cells_top + i * _CELL_H + 0.03, part, _CELL_H - 0.06).imshow(picture)
        if not pictures:
            thumbnail = _axes(figure, _MARGIN, cells_top + i * _CELL_H + 0.03, _THUMB, _CELL_H - 0.06)
            thumbnail.text(0.5, 0.5, "no image", fontsize=8.5, color=MUTED, ha="center", va="center")

    axes = _axes(figure, cells_left, cells_top, num_captions * _CELL_W, num_images * _CELL_H)
    axes.set_xlim(0, num_captions)
    axes.set_ylim(num_images, 0)
    known = [float(score) for row in group["scores"] for score in row if score is not None and math.isfinite(score)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    blues = LinearSegmentedColormap.from_list("scores", colormaps["Blues"]([0.06, 0.3, 0.6, 0.92]))
    for i in range(num_images):
        for c in range(num_captions):
            score, match = group["scores"][i][c], group["match"][i][c]
            valid = score is not None and math.isfinite(score)
            shade = (score - low) / (high - low) if valid and high > low else 0.5
            face = blues(shade) if valid else "#f4f5f7"
            pad_x, pad_y = 0.035 / _CELL_W, 0.035 / _CELL_H
            box = (c + pad_x, i + pad_y), 1 - 2 * pad_x, 1 - 2 * pad_y
            edge = TRUE_COLOUR if match == 1 else "none"
            axes.add_patch(Rectangle(*box, facecolor=face, edgecolor=edge, linewidth=2.6 if match == 1 else 0, clip_on=False))
            colour = MUTED if not valid else "white" if shade > 0.55 else INK
            text = f"{score:.1f}".replace("-", "\N{MINUS SIGN}") if valid else "\N{EN DASH}"
            axes.text(c + 0.5, i + 0.5, text, ha="center", va="center", fontsize=12, color=colour)


def _legend(figure: Figure, top: float) -> None:
    from matplotlib.patches import Rectangle

    axes = _axes(figure, _MARGIN, top - 0.12, 4.0, 0.2)
    axes.set_xlim(0, 4.0)
    axes.set_ylim(0, 0.2)
    axes.add_patch(Rectangle((0.02, 0.04), 0.17, 0.12, facecolor="none", edgecolor=TRUE_COLOUR, linewidth=1.8))
    axes.text(0.27, 0.1, "true   |   log p(caption given image), nats   |   darker: likelier", fontsize=8, color=MUTED, va="center")


def learning_curves_figure(path: Path, metrics_jsonl: Path) -> None:
    """One PNG of small multiples over optimizer steps, from a run's ``metrics.jsonl``.

    Metrics are chosen by name: ``loss/...``, ``logp/...`` (nats per token), ``active/...`` (fractions) and ``eval/SPLIT/METRIC`` (%), by
    split and not by edit type. A panel shows a few series, of accuracies the most telling metric of every split first, and counts the
    others. One without data is left out; a value that is not finite leaves a gap. Long series show a running average over the faint raw
    values.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds none of these metrics.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    series = _read_series(metrics_jsonl)
    panels = []
    for title, label, prefix, place in _PANELS:
        fit = sorted((rank, name) for name in series if (rank := place(name)) is not None)
        if fit:
            shown = [name for _, name in fit[:_MOST_SERIES]]
            panels.append((title, label, {name: series[name] for name in shown}, sum(n.startswith(prefix) for n in series) - len(shown)))
    if not panels:
        raise ValueError(f"{metrics_jsonl} has no metric named loss/..., logp/..., active/... or eval/...: nothing to draw")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(5.2 * columns, 3.0 * rows), dpi=DPI, facecolor="white", layout=layout)
    for index, (title, label, chosen, others) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_curves(axes, title, label, chosen, others)
    figure.savefig(path)


_ACCURACIES = ("group", "pair", "image_pair", "text", "image")
"""In the order in which they are shown, as far as there is room."""


def _accuracy(name: str) -> int | None:
    """The place of an accuracy of a whole split among those that are shown; None for any other name."""
    parts = name.split("/")
    return _ACCURACIES.index(parts[2]) if len(parts) == 3 and parts[0] == "eval" and parts[2] in _ACCURACIES else None


def _named(prefix: str) -> Callable[[str], int | None]:
    return lambda name: 0 if name.startswith(prefix) else None


_PANELS: tuple[tuple[str, str, str, Callable[[str], int | None]], ...] = (
    ("Loss terms", "loss", "loss/", _named("loss/")),
    ("Log-probabilities of the four kinds of cell", "nats per token", "logp/", _named("logp/")),
    ("Active fraction", "fraction", "active/", _named("active/")),
    ("Evaluation accuracy", "%", "eval/", _accuracy),
)
"""(title, unit, prefix of all names that belong to it, the place of a name among those that are shown)."""


def _read_series(metrics_jsonl: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    with metrics_jsonl.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break  # still being written
            row = json.loads(line)
            for name, value in row.items():
                if name not in ("step", "time"):
                    series.setdefault(name, []).append((row["step"], float(value)))
    return series


def _draw_curves(axes: Axes, title: str, label: str, chosen: Mapping[str, list[tuple[int, float]]], others: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (name, points) in enumerate(chosen.items()):
        steps = [step for step, _ in points]
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        colour = LINES[index % len(LINES)]
        dense = len(points) > 60
        smooth = _smoothed(values) if dense else values
        if dense:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        marker = "o" if len(points) <= 30 else ""
        short = _short(name.split("/", 1)[1], _SERIES_CHARS)
        # matplotlib leaves a label that begins with an underscore out of the legend
        axes.plot(steps, smooth, color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=short.lstrip("_") or "series")
    axes.set_title(title, fontsize=10.5, weight="bold", color=INK, loc="left", pad=8)
    axes.set_xlabel("optimizer step", fontsize=8.5, color=MUTED)
    axes.set_ylabel(label, fontsize=8.5, color=MUTED)
    if label in ("fraction", "%"):
        axes.set_ylim(*(-0.03, 1.03) if label == "fraction" else (-3, 103))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    if others:
        note = f"and {others} more in metrics.jsonl"
        axes.plot([], [], linestyle="none", label=note)
    legend = axes.legend(
        fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2, handlelength=1.2
    )
    for text in legend.get_texts():
        text.set(**AS_WRITTEN)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average over about a fiftieth of the run, corrected for its start; gaps stay gaps."""
    keep = 1 - 1 / max(len(values) / 50, 2)
    total = weight = 0.0
    smooth = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            smooth.append(total / weight)
        else:
            smooth.append(math.nan)
    return smooth
