"""Figures of learning curves and of differences between results, drawn with matplotlib's Agg backend.

matplotlib is imported only when a figure is drawn, and its global style is not changed.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfvlm_ds.core.text import one_line
from cfvlm_ds.tracking.metrics_log import read_rows

INK, MUTED, RULE = "#1f2933", "#6b7785", "#d9dee4"
LINES = ("#2563a8", "#e8710a", "#2f9e62", "#8a4fbf", "#c2334d", "#6b7785", "#b08900", "#1296a8")
_MOST_RATIO = 1e6  # largest ratio of two values on a logarithmic axis
_MOST_SERIES, _SERIES_CHARS, _MOST_ROWS, _TITLE_CHARS = 8, 30, 40, 90

_STYLE: Any = {
    "text.parse_math": False, "text.usetex": False,  # otherwise, two dollar signs in a name would enclose a formula
    "figure.dpi": 160, "figure.facecolor": "white",
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.labelsize": 8.5, "axes.labelcolor": MUTED, "axes.edgecolor": RULE, "axes.axisbelow": True,
    "axes.spines.left": False, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": RULE, "grid.linewidth": 0.7, "legend.fontsize": 8, "legend.frameon": False, "legend.labelcolor": INK,
    "xtick.major.size": 0, "xtick.labelsize": 8, "xtick.labelcolor": MUTED,
    "ytick.major.size": 0, "ytick.labelsize": 8, "ytick.labelcolor": MUTED,
}  # fmt: skip


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float, layout: Any = "constrained") -> Iterator[Any]:
    """Yield a figure of ``width`` x ``height`` inches, and write it to a PNG file at the end of the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        figure.savefig(path)


def learning_curves_figure(path: Path, metrics_jsonl: Path, counts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Plot a run's ``metrics.jsonl`` against optimizer steps, as one PNG with several panels.

    The panels show ``loss/...``, ``logp/...`` (nats per token), ``active/...`` (fractions) and accuracies in %:
    ``eval_sample/SPLIT/METRIC``, or ``eval/SPLIT/METRIC`` for a split that was not evaluated on a sample. Accuracies for individual edit
    types are not shown. A panel shows a few series and states how many it leaves out; the most informative accuracy of every split comes
    first. Equal series are drawn as one line, labelled with all their names. Empty panels and fractions that never change are omitted.
    Non-finite values leave gaps. Long series are drawn as a moving average over faint raw values.

    Args:
        counts: maps a metric to its number of groups, such as "120 of 450 groups", for the legend.

    Raises:
        FileNotFoundError: the metrics file does not exist.
        ValueError: the metrics file contains none of these metrics.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator

    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(metrics_jsonl):
        for name, value in row.items():
            series.setdefault(name, []).append((row["step"], float(value)))
    panels, sampled = [], {name.split("/")[1] for name in series if name.startswith("eval_sample/")}
    for title, label, prefix in _PANELS:
        names = [name for name in series if name.startswith(prefix) and not (label == "fraction" and _is_constant(series[name]))]
        if prefix == "eval/":
            names = [name for name in names if name.split("/")[1] not in sampled and not name.split("/")[-1].startswith(("loss", "nll"))]
        if fit := sorted((rank, name) for name in names if (rank := _place(name)) is not None):
            shown = {name: series[name] for _, name in fit[:_MOST_SERIES]}
            panels.append((title, label, shown, len(names) - len(shown)))
    if not panels:
        raise ValueError(f"{metrics_jsonl} has no metric named loss/..., logp/..., active/... or eval/...: nothing to draw")
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.06, wspace=0.04)
    with _figure(path, 5.2 * columns, 3.0 * rows, layout) as figure:
        for place, (title, label, chosen, others) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            finite = [value for points in chosen.values() for _, value in points if math.isfinite(value)]
            # terms differ by orders of magnitude, so small ones would look flat
            logarithmic = label == "loss" and any(finite) and min(finite) >= 0
            edge = max(min(filter(None, finite)) / 2, max(finite) / _MOST_RATIO) if logarithmic else -math.inf
            lines: dict[tuple[str, str], list[str]] = {}  # names of equal series, which would hide each other
            for name, points in chosen.items():
                lines.setdefault((name.split("/")[0], str(points)), []).append(name)
            for index, (name, *equal) in enumerate(lines.values()):
                points = chosen[name]
                steps = [step for step, _ in points]
                values = [max(value, edge) if math.isfinite(value) else math.nan for _, value in points]
                colour = LINES[index % len(LINES)]
                dense = len(points) > 60
                smooth = _smoothed(values) if dense else values
                if dense:
                    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
                marker = "o" if len(points) <= 30 else ""
                short = [_LABELS.get(each) or textwrap.fill(one_line(each.split("/", 1)[1], 200), _SERIES_CHARS) for each in (name, *equal)]
                short = [f"{text}, {counts[each]}" if each in counts else text for each, text in zip((name, *equal), short, strict=True)]
                # matplotlib's legend omits labels that begin with an underscore
                text = "\n= ".join(short).lstrip("_") or "series"
                width = 3.4 if label == "%" and index == 0 else 1.7  # other curves would hide the headline metric
                axes.plot(steps, smooth, color=colour, linewidth=width, marker=marker, markersize=3.5, label=text)
            note = "; each line averages only the groups with such a pair" if len(lines) > 1 and label == "nats per token" else ""
            axes.set(title=title, xlabel=f"optimizer step{note}", ylabel=label)
            axes.grid(axis="y")
            if label in ("fraction", "%"):
                axes.set_ylim(*(-0.03, 1.03) if label == "fraction" else (-3, 103))
            if logarithmic:
                if min(finite) < edge:
                    axes.set_ylabel(f"loss (lower values drawn at {edge:.1g})")
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            if others:
                axes.plot([], [], linestyle="none", label=f"and {others} more in metrics.jsonl")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.2, handlelength=1.2)


def differences_figure(path: Path, title: str, differences: Mapping[str, Mapping[str, tuple[float, tuple[float, float] | None]]]) -> None:
    """Draw differences in percentage points as one PNG, with one row per label, one colour per result, and error bars for the intervals.

    Args:
        differences: result -> label -> (difference, interval or None). Only the first 40 labels are drawn; the title gives the total.
    """
    labels = list(dict.fromkeys(label for of_result in differences.values() for label in of_result))
    shown = labels[:_MOST_ROWS]
    with _figure(path, 8, 1.4 + 0.34 * len(shown)) as figure:
        axes = figure.add_subplot()
        for index, (result, of_result) in enumerate(differences.items()):
            colour, offset = LINES[index % len(LINES)], (index - (len(differences) - 1) / 2) * 0.6 / len(differences)
            rows = [(row, *of_result[label]) for row, label in enumerate(shown) if label in of_result]
            heights, values = [row + offset for row, _, _ in rows], [value for _, value, _ in rows]
            axes.plot(values, heights, "o", color=colour, markersize=4.5, label=one_line(result, 60).lstrip("_"))
            spans = [(height, span) for height, (_, _, span) in zip(heights, rows, strict=True) if span is not None]
            axes.hlines([height for height, _ in spans], [low for _, (low, _) in spans], [high for _, (_, high) in spans], color=colour)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [one_line(label, 60) for label in shown], fontsize=8.5, color=INK)
        axes.invert_yaxis()
        axes.set_xlabel("difference in percentage points; bars: 95 % intervals, not given for few groups")
        axes.grid(axis="x")
        others = f" ({len(shown)} of {len(labels)} rows)" if len(shown) < len(labels) else ""
        axes.set_title(one_line(title, _TITLE_CHARS) + others)
        if len(differences) > 1:
            axes.legend()


_ACCURACIES = ("group", "pair", "image_pair", "factual", "text", "image")
"""Accuracies in order of priority. A panel shows as many as fit."""
_PANELS = (
    ("Loss terms in training", "loss", "loss/"),
    ("Log-likelihoods of the training groups", "nats per token", "logp/"),
    ("Comparisons with a loss above 0", "fraction", "active/"),
    ("Accuracy on a sample of the evaluation sets", "%", "eval_sample/"),
    ("Evaluation accuracy", "%", "eval/"),
)
"""(title, unit, prefix of metric names) of each panel."""
_LABELS = {
    "loss/align": "align (sum of NLLs)",
    "logp/lp_00": "original text, original image",
    "logp/lp_kk": "edited text, edited image",
    "logp/lp_0k": "edited text, original image (false)",
    "logp/lp_k0": "original text, edited image (false)",
}
"""Metric -> legend label, for metrics whose names are not self-explanatory."""


def _place(name: str) -> int | None:
    """Return a metric's priority in its panel (0 is first), or None for metrics that are not shown, such as accuracies by edit type."""
    first, *_, metric = parts = name.split("/")
    if first not in ("eval", "eval_sample"):
        return 0
    return _ACCURACIES.index(metric) if len(parts) == 3 and metric in _ACCURACIES else None


def _is_constant(points: Sequence[tuple[int, float]]) -> bool:
    return len(points) > 1 and len({value for _, value in points}) == 1


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average over about a fiftieth of the run, with bias correction. Gaps are kept."""
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
