"""Data is checked before anything is trained on it: what is wrong with it is one sentence on every rank, not a crash after an hour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cfvlm_ds.collate import load_collator
from cfvlm_ds.config import ConfigError, RunConfig
from cfvlm_ds.data import check_manifest, read_manifest
from cfvlm_ds.distributed import World, broadcast_object
from cfvlm_ds.groups import CounterfactualGroup, DataError


def read_data(config: RunConfig, world: World) -> tuple[list[CounterfactualGroup], dict[str, list[CounterfactualGroup]]]:
    """Training groups and evaluation splits. Rank 0 checks them first; what it finds is raised on every rank.

    Raises ConfigError when no training manifest is named, DataError for anything wrong with a manifest, an image or a text.
    """
    data = config.data
    if not data.train:
        raise ConfigError("data.train is not set; give the manifest of your training groups")
    manifests = {"train": data.train, **data.evaluation}
    problem = _check(config, manifests, world) if world.is_main else None
    if problem := broadcast_object(problem):
        raise DataError(problem)
    read = {name: read_manifest(path, data.root, data.format) for name, path in manifests.items()}
    return read.pop("train"), read


def _check(config: RunConfig, manifests: Mapping[str, str], world: World) -> str | None:
    """The first problem of the data, or None; what was found sound before, by size and time of the file, is not opened again."""
    run_dir = Path(config.train.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stamp = run_dir / "data_check.json"
    try:
        known = json.loads(stamp.read_text())
    except (OSError, ValueError):
        known = {}
    collator = load_collator(config.model, "full", config.data.max_pixels)
    for path in manifests.values():
        try:
            stat = Path(path).stat()
            seen = [stat.st_size, stat.st_mtime_ns, config.data.check, config.model.name_or_path]
            if known.get(path) == seen:
                continue
            if config.data.check == "rows":
                read_manifest(path, config.data.root, config.data.format)
            else:
                report = check_manifest(
                    path,
                    config.data.root,
                    config.data.format,
                    lengths=collator,
                    max_pixels=config.data.max_pixels,
                    progress=world.say,
                )
                if not report.ok:
                    more = len(report.problems) - 1
                    return report.problems[0] + (f" ({more} more: see `cfvlm-ds data check {path}`)" if more else "")
            known[path] = seen
        except FileNotFoundError:
            return f"{path}: no such manifest; correct data.train or data.evaluation"
        except DataError as error:
            return str(error)
    stamp.write_text(json.dumps(known, indent=1))
    return None
