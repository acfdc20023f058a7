"""Selection of benchmarks, their probes and their items."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.named import named, near
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.versions import version
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Benchmark, Loaded, load
from cfvlm_ds.evaluation.benchmarks.base import Mentions
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, Parser, answer
from cfvlm_ds.evaluation.probes import PROBES, Generate, Probe

Way: TypeAlias = Probe | Generate

OF_MODEL = ("weights", "inputs", "adapter")
"""Names of the hashes that identify a model and its inputs."""
_SKIP = "use --on_error skip to leave such items out; they are counted and named"


@dataclass(frozen=True)
class Chosen:
    """A benchmark with one of its probes. ``label`` names the probe in paths, with the values of non-default options."""

    name: str
    benchmark: Benchmark
    label: str
    way: Way
    root: Path

    @property
    def read(self) -> Parser | Mentions:
        """Function that parses a generated answer, or counts the mentions in a description."""
        return self.benchmark.mentions or PARSERS.get(self.name, answer)

    @property
    def place(self) -> str:
        """Path of the result below the results folder."""
        return f"{self.name}/{self.label}"

    def header(self, model: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that the scores depend on, as stored in results.json. ``model`` holds the model's hashes by name."""
        names = (*OF_MODEL, "writing") if isinstance(self.way, Generate) else OF_MODEL
        return {
            "benchmark": self.name,
            "probe": {"name": self.way.name, **asdict(self.way)},  # type: ignore[arg-type]
            "model": {name: model.get(name) for name in names},
            "data": dict(data),
            "settings": dict(settings),
            "versions": {name: version(name) for name in ("cfvlm-ds", "torch", "transformers")},
        }


def choose(names: Sequence[str], root: Path, probes: Sequence[str] = ()) -> list[Chosen]:
    """Select the named benchmarks. Each benchmark is evaluated with those of ``probes`` that it supports, or with its default probe if
    ``probes`` is empty. ``root`` contains the benchmarks' folders.

    Raises ConfigError for an unknown name, a benchmark that supports none of the probes, or a probe that none of the benchmarks supports.
    """
    requested = [way_named(spec) for spec in probes]
    selected: list[Chosen] = []
    for name in dict.fromkeys(names):
        benchmark = benchmark_named(name)
        ways = [choice for choice in requested if choice[1].name in benchmark.probes] if requested else [way_named(benchmark.probes[0])]
        if not ways:
            labels = ", ".join(label for label, _ in requested)
            raise ConfigError(f"benchmark {name!r} does not support the probe {labels}; it supports {', '.join(benchmark.probes)}")
        selected += [Chosen(name, benchmark, label, way, root / name) for label, way in ways]
    if not selected:
        raise ConfigError(f"no benchmark was given; available: {', '.join(BENCHMARKS)}")
    if unused := [label for label, way in requested if not any(choice.way == way for choice in selected)]:
        raise ConfigError(f"--probes {unused[0]} fits none of the benchmarks {', '.join(names)}; leave it out")
    return selected


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark by name. Raises ConfigError for an unknown name."""
    if name not in BENCHMARKS:
        hint = near(name, BENCHMARKS, "known: ")
        raise ConfigError(f"unknown benchmark {name!r}; {hint} (a script must register a benchmark of your own before this call)")
    return BENCHMARKS[name]


def way_named(spec: str) -> tuple[str, Way]:
    """Parse ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``, and return the probe's label and the probe. Raises ConfigError for an unknown
    name or option.
    """
    try:
        way: Way = named("probe", spec, PROBES)
    except ValueError as error:
        raise ConfigError(f"{error}") from error
    changed = [value for option, value in vars(way).items() if value != vars(PROBES[way.name])[option]]
    return "".join([way.name, *(f".{re.sub(r'[^A-Za-z0-9_-]+', '_', str(value))[:40]}" for value in changed)]), way


def load_items(chosen: Chosen, say: Say, *, limit: int | None = None, skip: bool = False, remedy: str = _SKIP) -> Loaded:
    """Load the items of a benchmark, or about ``limit`` of them.

    Raises DataError for the first invalid row or missing picture. If ``skip`` is True, such items are left out instead, unless no valid
    items remain.
    """
    loaded = load(chosen.benchmark, chosen.root, say, limit)
    refuse_problems(f"benchmark {chosen.name}", loaded.problems, len(loaded.items), skip, remedy)
    for note in loaded.notes:
        say(f"{chosen.name}: {note}")
    return loaded


def refuse_problems(label: str, problems: Sequence[object], num_items: int, skip: bool = False, remedy: str = _SKIP) -> None:
    """Raise DataError for the first problem with a benchmark's items, unless ``skip`` is True and valid items remain."""
    if problems and not (skip and num_items):
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{label}: {problems[0]}{more}{f'; {remedy}' if num_items else ''}")
