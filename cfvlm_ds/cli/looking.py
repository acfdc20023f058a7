"""``cfvlm-ds data view``: inspection of data and of a run's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfvlm_ds.cli.options import Positive, Reading, add_function, say
from cfvlm_ds.core.errors import ConfigError


def add(data: Any) -> None:
    """Register ``view`` as a subcommand of ``data``."""
    add_function(data, _view)


def _view(
    source: str,
    *,
    scores: str | None = None,
    sample: Positive | None = None,
    ids: str | None = None,
    seed: int = 0,
    rejected: bool = False,
    out: str = "page",
    reading: Reading,
) -> None:
    """Write an HTML page that shows groups: pictures, texts, truth tables, scores.

    Example: cfvlm-ds data view groups.jsonl --out page

    Args:
        source: manifest, or work folder of `data propose`.
        scores: file that `cfvlm-ds score` wrote for the manifest, or a file in a run's scores folder.
        sample: number of groups to show; by default 200.
        ids: file with the ids of the groups to show, one per line. The groups are shown in this order.
        seed: seed for sampling a manifest.
        rejected: show only the rejected candidates of a work folder, with the reasons for rejection.
        out: folder to write or replace.
    """
    if sample and ids:
        raise ConfigError("--sample and --ids cannot be combined; give only one")
    number, folder = sample or 200, Path(out)
    if (Path(source) / "run.json").is_file():
        from cfvlm_ds.counterfactuals.looking import view_work

        if useless := [f"--{name}" for name, value in {"root": reading.root, "scores": scores, "ids": ids}.items() if value]:
            raise ConfigError(f"{source} is a work folder, which records its own pictures; leave out {', '.join(useless)}")
        written = view_work(Path(source), folder, rejected=rejected, sample=number, seed=seed, say=say)
    elif rejected:
        raise ConfigError(f"{source} is not a work folder and has no rejected candidates; leave out --rejected")
    else:
        from cfvlm_ds.evaluation import view

        written = view(source, folder, scores=scores, sample=number, seed=seed, ids=ids, say=say, **vars(reading))
    print(f"wrote {folder / 'index.html'}: {written.num_items} groups, {written.num_pictures} pictures")
    if written.problems:
        first = next(iter(written.problems.values()))
        print(f"{len(written.problems)} pictures could not be shown; the page gives the reason for each. The first: {first}")
