"""Data is checked before anything is trained on it: what is wrong with it is one sentence on every rank, not a crash after an hour."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cfvlm_ds.collate import Collator, load_collator
from cfvlm_ds.config import IMAGE_LIMITS, ConfigError, DataConfig, DataSet, RunConfig
from cfvlm_ds.data import check_manifest, image_size, read_manifest
from cfvlm_ds.distributed import World, broadcast_object
from cfvlm_ds.groups import CounterfactualGroup, DataError


def read_data(config: RunConfig, world: World) -> tuple[list[CounterfactualGroup], dict[str, list[CounterfactualGroup]]]:
    """Training groups and evaluation splits. Rank 0 checks them first; what it finds is raised on every rank.

    Raises ConfigError when no training manifest is named, DataError for anything wrong with a manifest, an image or a text.
    """
    data = config.data
    if not data.train:
        raise ConfigError("data.train is not set; give the manifest of your training groups")
    sets = [data.train_set, *data.evaluation_sets.values()]
    problem = _check(config, sets, world) if world.is_main else None
    if problem := broadcast_object(problem) if world.size > 1 else problem:
        raise DataError(problem)
    train, *evaluation = (read_manifest(each.path, each.root, each.format or data.format) for each in sets)
    return train, dict(zip(data.evaluation, evaluation, strict=True))


def group_tokens(groups: Sequence[CounterfactualGroup], collator: Collator, data: DataConfig, world: World) -> list[int]:
    """Tokens of every group in the rows that ``collator`` builds. Rank 0 reads the images' headers and tells the others.

    Raises DataError on every rank, naming a file without a header, or a group that is larger than a limit of ``data`` allows.
    """
    found: list[int] | str | None = None
    if world.is_main:
        paths = list({picture: None for group in groups for pictures in group.images for picture in pictures})
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                sizes = dict(zip(paths, pool.map(functools.partial(image_size, max_pixels=data.max_pixels), paths), strict=True))
            trees = [collator.tree_tokens(group, sizes) for group in groups]
            whole, largest = [sum(tokens) for tokens in trees], [max(tokens, default=0) for tokens in trees]
            found = (
                _too_large(groups, whole, "max_tokens_per_micro_batch", data)
                or _too_large(groups, largest, "max_tokens_per_forward", data)
                or whole
            )
        except DataError as error:
            found = str(error)
    found = broadcast_object(found)
    if not isinstance(found, list):
        raise DataError(str(found))
    return found


def _too_large(groups: Sequence[CounterfactualGroup], tokens: list[int], option: str, data: DataConfig) -> str | None:
    limit = getattr(data, option)
    if limit is None or (most := max(tokens)) <= limit:
        return None
    what = "one image and its texts" if option == "max_tokens_per_forward" else "its images and texts"
    return (
        f"group {groups[tokens.index(most)].id!r} has {most} tokens in {what}, and data.{option} is {limit}; raise it, or show images with "
        "fewer tokens"
    )


def _check(config: RunConfig, sets: Sequence[DataSet], world: World) -> str | None:
    """The first problem of the data, or None; what was found sound before, by size and time of the file, is not opened again.

    Says what each manifest holds.
    """
    run_dir = Path(config.train.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stamp = run_dir / "data_check.json"
    try:
        known = dict(json.loads(stamp.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}
    collator = load_collator(config.model, "full", config.data.max_pixels)
    for path, root, format in ((each.path, each.root, each.format or config.data.format) for each in sets):
        try:
            stat = Path(path).stat()
            limits = [getattr(config.model, option) for option in IMAGE_LIMITS]
            seen = [
                stat.st_size,
                stat.st_mtime_ns,
                root,
                format,
                config.data.max_pixels,
                config.data.check,
                config.model.name_or_path,
                *limits,
            ]
            if isinstance(entry := known.get(path), list) and entry[:-1] == seen:
                world.say(str(entry[-1]))
                continue
            if config.data.check == "rows":
                found = f"{path}: {len(read_manifest(path, root, format))} groups"
            else:
                report = check_manifest(
                    path,
                    root,
                    format,
                    lengths=collator,
                    max_pixels=config.data.max_pixels,
                    progress=world.say,
                )
                if not report.ok:
                    more = len(report.problems) - 1
                    return report.problems[0] + (f" ({more} more: see `cfvlm-ds data check {path}`)" if more else "")
                found = f"{path}: {report.num_groups} groups, {report.num_images} images"
                found += f", visual tokens {report.visual_range}" if report.visual_range else ""
            world.say(found)
            known[path] = [*seen, found]
        except FileNotFoundError:
            return f"{path}: no such manifest; correct data.train or data.evaluation"
        except DataError as error:
            return str(error)
    stamp.write_text(json.dumps(known, indent=1))
    return None
