"""Which benchmarks are asked, how, and on which items."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Benchmark, Loaded, load
from cfvlm_ds.evaluation.probes import PROBES, Generate, Probe

Way: TypeAlias = Probe | Generate

_OPTION = re.compile(r'\s*(\w+)\s*=\s*(?:"([^"]*)"|([^,"]*))\s*(?:,|$)', re.ASCII)
SKIP = "name --on_error skip to leave such items out, counted and named"


@dataclass(frozen=True)
class Chosen:
    """A benchmark that is asked in one way. ``label`` names it in files: the probe, and its options where they are not the defaults."""

    name: str
    benchmark: Benchmark
    label: str
    way: Way
    root: Path

    @property
    def place(self) -> str:
        """Where its results are, below their folder."""
        return f"{self.name}/{self.label}"


def choose(names: Sequence[str], root: Path, probes: Sequence[str] = ()) -> list[Chosen]:
    """The benchmarks of these names, whose folders are in ``root``; each asked in those of the ways that fit it, its own default without
    any. Raises ConfigError for an unknown name, and for a benchmark that none of the ways fits."""
    asked = [way_named(spec) for spec in probes]
    found: list[Chosen] = []
    for name in dict.fromkeys(names):
        benchmark = benchmark_named(name)
        ways = [each for each in asked if each[1].name in benchmark.probes] if asked else [way_named(benchmark.probes[0])]
        if not ways:
            said = ", ".join(label for label, _ in asked)
            raise ConfigError(f"benchmark {name!r} is not asked by {said}; it has {', '.join(benchmark.probes)}")
        found += [Chosen(name, benchmark, label, way, root / name) for label, way in ways]
    if not found:
        raise ConfigError(f"no benchmark is named; known: {', '.join(BENCHMARKS)}")
    if unused := [label for label, way in asked if not any(each.way == way for each in found)]:
        raise ConfigError(f"--probes {unused[0]} fits none of the benchmarks {', '.join(names)}; leave it out")
    return found


def benchmark_named(name: str) -> Benchmark:
    """Raises ConfigError for a name that is no benchmark's."""
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BENCHMARKS)}"
        raise ConfigError(f"unknown benchmark {name!r}; {hint} (one of your own is registered in a script before this is called)")
    return BENCHMARKS[name]


def way_named(spec: str) -> tuple[str, Way]:
    """Label and probe of ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``. Raises ConfigError for an unknown name or option."""
    name, _, options = spec.partition(":")
    known: dict[str, Way] = {**PROBES, Generate.name: Generate()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"unknown probe {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
    values = _values(spec, name, options, known[name])
    changed = {option: value for option, value in values.items() if value != getattr(known[name], option)}
    ending = "".join(f".{re.sub(r'[^A-Za-z0-9_-]+', '_', str(value))[:40]}" for value in changed.values())
    try:
        return f"{name}{ending}", dataclasses.replace(known[name], **changed)  # type: ignore[type-var]
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"probe {spec}: {error}; correct its options") from error


def _values(spec: str, name: str, options: str, probe: Any) -> dict[str, Any]:
    kinds = {field.name: field for field in dataclasses.fields(probe)}
    found: dict[str, Any] = {}
    place = 0
    while place < len(options):
        if (part := _OPTION.match(options, place)) is None:
            raise ConfigError(f"probe {spec} is not understood at {options[place:]!r}; write NAME:OPTION=VALUE,OPTION=VALUE")
        option, place = part[1], part.end()
        if option not in kinds:
            has = f"it has {', '.join(kinds)}" if kinds else "it has none"
            raise ConfigError(f"probe {name!r} has no option {option!r}; {has}")
        value, default = part[3].strip() if part[2] is None else part[2], getattr(probe, option)
        if isinstance(default, bool):
            allowed: dict[str, Any] = {"true": True, "false": False}
        elif isinstance(default, int):
            allowed = {value: int(value)} if re.fullmatch(r"[0-9]{1,9}", value, re.ASCII) else {}
        elif option == "mode":
            allowed = {each: each for each in ("sum", "mean", "pmi")}
        else:
            allowed = {value: value} if value and ("{text}" in value or option != "template") else {}
        if value not in allowed:
            must = " or ".join(allowed) or ("a text with {text} in it" if option == "template" else "a whole number or a text")
            raise ConfigError(f"option {option!r} of probe {name!r} must be {must}, not {value!r}")
        found[option] = allowed[value]
    return found


def load_items(chosen: Chosen, say: Callable[[str], object], *, limit: int | None = None, skip: bool = False) -> Loaded:
    """The items of a benchmark, about ``limit`` of them. Raises DataError for the first row that is none, or picture of these that is not
    there, unless such are to be skipped, and where none is left."""
    loaded = load(chosen.benchmark, chosen.root, say, limit)
    if loaded.problems and not (skip and loaded.items):
        more = f" ({len(loaded.problems) - 1} more)" if len(loaded.problems) > 1 else ""
        remedy = f"; {SKIP}" if loaded.items else ""
        raise DataError(f"benchmark {chosen.name}: {loaded.problems[0]}{more}{remedy}")
    for note in loaded.notes:
        say(f"{chosen.name}: {note}")
    return loaded
