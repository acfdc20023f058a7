"""Tables and figures from the records of benchmarks/learning.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from learning_arms import CONTROL_ARM, KNOWN, STEPS

Base = dict[str, dict[str, float]]
"""Group accuracy of the base by split and edit, in %."""
BEST = "best, 1 thread"
"""The default rounding of sums."""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t of a 95 % interval, by number of pairs."""


def told(record: dict[str, Any]) -> tuple[str, str, str]:
    """Return what distinguishes the row of a record apart from its seed: the arm, the rate, and everything else."""
    threads, clock = record["threads"], record.get("clock", STEPS)
    groups, noise = record.get("groups", 0), record.get("noise", 0)
    how = [record["capability"] or "best", f"{threads} thread{'s' if threads > 1 else ''}"]
    how += [f"time of {clock} steps"] if clock != STEPS else []
    how += [f"{groups:,} groups"] if groups else []
    how += [f"{noise} % wrong"] if noise else []
    how += [f"{record['more']} more statements"] if record.get("more") else []
    return record["arm"], record["rate"], ", ".join(how)


def tables(records: list[dict[str, Any]], base: Base) -> Iterator[str]:
    """Yield tables of group accuracy by edit on held-out combinations: means over seeds with half the width of their 95 % t interval,
    differences from the control, and each run.
    """
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (list(KNOWN).index(r["arm"]), *told(r), r["seed"])):
        rows.setdefault(told(record), []).append(record)
    edits = list(records[0]["results"]["combo"])
    questions = [split for split in records[0]["results"] if split != "combo"]
    head = [*edits, *questions]
    pairs = records[0]["results"]["combo"]["relation"]["groups"]
    yield "\n".join(
        [
            f"| group accuracy, %, {pairs} pairs per edit | rate | sums, data | seeds | steps | {' | '.join(head)} |",
            f"|---|---:|---|---:|---:|{'---:|' * len(head)}",
            f"| base | | | | | {' | '.join(f'{value:.1f}' for value in base_of(base, edits, questions))} |",
            *(line(key, found, edits, questions) for key, found in rows.items()),
        ]
    )
    if differences := [each for key, found in rows.items() if (each := paired(key, found, rows, edits))]:
        title = f"| points above {KNOWN[CONTROL_ARM].title}, pairs of seeds | rate | seeds | {' | '.join(edits)} |"
        yield "\n".join([title, f"|---|---:|---:|{'---:|' * len(edits)}", *differences])
    yield "\n".join(
        [
            f"| run | steps | processor s | {' | '.join(head)} |",
            f"|---|---:|---:|{'---:|' * len(head)}",
            *(
                f"| {KNOWN[r['arm']].title}, {r['rate']}, {told(r)[2]}, seed {r['seed']} | {r['steps']} | {r['processor_seconds']} | "
                f"{' | '.join(f'{value:.1f}' for value in values(r, edits, questions))} |"
                for found in rows.values()
                for r in found
            ),
        ]
    )


def base_of(base: Base, edits: list[str], questions: list[str]) -> list[float]:
    return [base["combo"][edit] for edit in edits] + [base[split]["all"] for split in questions]


def choices(records: list[dict[str, Any]]) -> str:
    """Return a table of group accuracy on the validation split for each seed, by arm and rate."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in sorted(records, key=lambda each: (list(KNOWN).index(each["arm"]), each["seed"])):
        found.setdefault(record["arm"], {}).setdefault(record["rate"], []).append(record)
    rates = sorted({rate for of_rate in found.values() for rate in of_rate}, key=float)
    lines = [f"| validation, %, by seed | steps | {' | '.join(rates)} |", f"|---|---:|{'---:|' * len(rates)}"]
    for arm, of_rate in found.items():
        steps = "/".join(sorted({str(each["steps"]) for seeds in of_rate.values() for each in seeds}))
        cells = [", ".join(f"{each['validation']:.1f}" for each in of_rate.get(rate, [])) for rate in rates]
        lines.append("".join(f"| {cell} " if cell else "| " for cell in (KNOWN[arm].title, steps, *cells)) + "|")
    return "\n".join(lines)


def renewed(page: str, tables: Iterable[tuple[str, str]]) -> str:
    """Return ``page`` with the table after each `` `python COMMAND` `` replaced; ``tables`` are pairs of a command and its table.

    Raises ValueError if the page does not contain a command exactly once.
    """
    for command, table in tables:
        parts = re.split(rf"(`python {re.escape(command)}`(?:(?!^\|).)*?^)(?:\|[^\n]*\n)+", page, flags=re.MULTILINE | re.DOTALL)
        if len(parts) != 3:
            raise ValueError(f"`python {command}` must occur exactly once, before its table")
        page = f"{parts[0]}{parts[1]}{table}\n{parts[2]}"
    return page


def renew_pages(pages: Iterable[Path], tables: Iterable[tuple[str, str]]) -> None:
    """Write tables, each with its command, into the pages that show them."""
    shown = list(tables)
    for page in pages:
        text = page.read_text()
        page.write_text(renewed(text, [(command, table) for command, table in shown if f"`python {command}`" in text]))


def values(record: dict[str, Any], edits: list[str], questions: list[str]) -> list[float]:
    found = record["results"]
    return [found["combo"][edit]["group"] for edit in edits] + [found[split]["all"]["group"] for split in questions]


def paired(key: tuple[str, ...], found: list[dict[str, Any]], rows: dict[tuple[str, ...], list[dict[str, Any]]], edits: list[str]) -> str:
    """Return a row with an arm's differences from the NLL control: mean and half the width of the 95 % t interval over shared seeds.

    The control is used at the rate with the most seeds. Return "" for fewer than two shared seeds.
    """
    control = max((some for other, some in rows.items() if other[0] == CONTROL_ARM and other[2] == key[2]), key=len, default=[])
    of_seed = {record["seed"]: values(record, edits, []) for record in control}
    pairs = [(values(record, edits, []), of_seed[record["seed"]]) for record in found if record["seed"] in of_seed]
    if key[0] == CONTROL_ARM or len(pairs) < 2:
        return ""
    columns = [[own[k] - theirs[k] for own, theirs in pairs] for k in range(len(edits))]
    cells = [f"{statistics.mean(column):+.1f} ± {half_width(column):.1f}" for column in columns]
    return f"| {KNOWN[key[0]].title} | {key[1]} | {len(pairs)} | {' | '.join(cells)} |"


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t interval for the mean of two or more values."""
    return T95[min(len(values), max(T95))] * statistics.stdev(values) / len(values) ** 0.5


def line(key: tuple[str, ...], found: list[dict[str, Any]], edits: list[str], questions: list[str]) -> str:
    columns = zip(*(values(record, edits, questions) for record in found), strict=True)
    cells = [f"{statistics.mean(c):.1f}" + (f" ± {half_width(c):.1f}" if len(c) > 1 else "") for c in columns]
    steps = "/".join(sorted({str(record["steps"]) for record in found}))
    return f"| {KNOWN[key[0]].title} | {key[1]} | {key[2]} | {len(found)} | {steps} | {' | '.join(cells)} |"


def figure(path: Path, shown: dict[str, list[dict[str, Any]]], base: Base) -> None:
    """Draw bars by edit type on held-out combinations: base, ``nll`` and ``default``, means over seeds with 95 % t intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = list(base["combo"])
    bars: list[tuple[str, str, list[list[float]]]] = [("base", "#c9c9c9", [[value] for value in base_of(base, edits, [])])]
    for name, title, colour in (("nll", KNOWN[CONTROL_ARM].title, "#7f8790"), ("default", KNOWN["default"].title, "#1f6f8b")):
        if found := shown[name]:
            bars.append((f"+ {title}", colour, [[each["combo"][edit]["group"] for each in found] for edit in edits]))
    canvas, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.8 / len(bars)
    for k, (name, colour, each) in enumerate(bars):
        place = [e + (k - (len(bars) - 1) / 2) * width for e in range(len(edits))]
        means = [statistics.mean(v) for v in each]
        axes.bar(place, means, 0.92 * width, color=colour, label=name)
        if len(each[0]) > 1:
            axes.errorbar(place, means, [half_width(v) for v in each], fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.axhline(100 / 6, color="#333333", linewidth=0.8, linestyle=":")
    axes.text(-0.85, 100 / 6 + 1, "chance", fontsize=8)
    axes.set_xticks(range(len(edits)), [edit.replace("_", " ") for edit in edits])
    axes.set_ylim(0, 100)
    axes.set_ylabel("group accuracy, %")
    axes.set_title("Held-out combinations", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(frameon=False, fontsize=9, ncols=len(bars), loc="outside upper right")
    canvas.savefig(path, dpi=160)


def over_time(path: Path, lines: dict[str, dict[int, dict[str, Any]]], base: Base) -> None:
    """Draw accuracy on held-out combinations against training time in steps of the default objective, with a line for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = ("all", "relation", "colour_swap")
    canvas, axes = pyplot.subplots(1, len(edits), figsize=(10, 3.2), layout="constrained")
    colours = ("#7f8790", "#d08c3f", "#1f6f8b")
    for one, edit in zip(axes, edits, strict=True):
        for (name, of_clock), colour in zip(lines.items(), colours, strict=True):
            clocks = sorted(of_clock)
            one.plot(clocks, [of_clock[c]["combo"][edit]["group"] for c in clocks], "o-", color=colour, label=name, markersize=4)
        one.axhline(base["combo"][edit], color="#999999", linewidth=0.8, linestyle=":", label="base")
        one.set_xscale("log")
        ticks = sorted({clock for of_clock in lines.values() for clock in of_clock})
        one.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        one.minorticks_off()
        one.set_title({"all": "all edits"}.get(edit, edit), fontsize=10, loc="left")
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("group accuracy, %")
    axes[1].set_xlabel("training time, in steps of the default objective (1,000: 4 minutes of one core)")
    canvas.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=len(lines) + 1, loc="outside upper right")
    canvas.savefig(path, dpi=160)
