"""One figure of what a data set is made of, in the style of the others. Plain data in, one PNG out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.text import one_line
from cfvlm_ds.core.untrusted import own_output
from cfvlm_ds.tracking.figures import AS_WRITTEN, INK, LINES, in_style, paged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS, _NAME_CHARS, _BINS = 12, 28, 40
_SOFTWARE, _HEAD = "cfvlm-ds", 1024
"""What the figure says it was written with, in its first bytes; that is how it is known again."""
_ROOM = 5  # bars that a panel has room for at least: one is not as high as all of it


def data_figure(
    file: IO[bytes], histograms: Sequence[tuple[str, str, Sequence[int]]], bars: Sequence[tuple[str, str, Mapping[str, int]]]
) -> None:
    """A panel for each histogram (title, unit, values) and each count (title, unit, count by name), the largest first.

    Raises ValueError for none.
    """
    if not histograms and not bars:
        raise ValueError("the data set has no group: nothing to draw")
    figure, places = paged(len(histograms) + len(bars), 2.6)
    for axes, histogram in zip(places, histograms, strict=False):
        _draw_histogram(axes, *histogram)
    for axes, counted in zip(places[len(histograms) :], bars, strict=True):
        _draw_bars(axes, *counted)
    figure.savefig(file, format="png", metadata={"Software": _SOFTWARE})


def figure_file(name: str, option: str) -> Path:
    """The file of a figure. Raises ConfigError for one that is no PNG, and for a file that is there and no figure of this package."""
    if not name.endswith(".png"):
        raise ConfigError(f"{option} {name}: the figure is a PNG; give it a name that ends in .png")
    return own_output(Path(name), _is_figure, "this package", option=option)


def _is_figure(file: IO[bytes]) -> bool:
    return b"tEXtSoftware\0" + _SOFTWARE.encode() in file.read(_HEAD)


def _draw_histogram(axes: Axes, title: str, unit: str, values: Sequence[int]) -> None:
    import numpy as np

    found = np.asarray(values)
    low, high = int(found.min()), int(found.max())
    step = max(1, math.ceil((high - low + 1) / _BINS))  # whole numbers: no bin has more of them than another
    edges = np.arange(low, high + step + 1, step) - 0.5
    axes.hist(found, edges.tolist(), color=LINES[0])
    middle = float(np.percentile(found, 50, method="lower"))
    axes.axvline(middle, color=LINES[1], linewidth=1.5)
    axes.set_xlim(low - 2 * step, high + 2 * step)
    in_style(axes, title, f"{unit} (line: median, {middle:.0f})", "y")


def _draw_bars(axes: Axes, title: str, unit: str, counts: Mapping[str, int]) -> None:
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    shown, rest = ordered[:_MOST_BARS], ordered[_MOST_BARS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    places = range(len(shown))
    axes.bar_label(axes.barh(places, [count for _, count in shown], color=LINES[0], height=0.7), fmt="%d", padding=3, fontsize=8, color=INK)
    axes.set_yticks(places, [one_line(name, _NAME_CHARS) for name, _ in shown])
    axes.set_ylim(max(len(shown), _ROOM) - 0.5, -0.5)
    for label in axes.get_yticklabels():
        label.set(**AS_WRITTEN)
    axes.margins(x=0.14)
    in_style(axes, title, unit, "x")
