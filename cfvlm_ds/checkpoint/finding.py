"""Checkpoint discovery: finds a run's checkpoints and verifies that they are complete and undamaged.

A run never resumes from a folder whose files do not match its ``complete.json``.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds.core.distributed import World, broadcast_object, gather_objects
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import crc32_of
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.untrusted import own_file

COMPLETE = "complete.json"


_NAME = re.compile(r"checkpoint-(\d+)")


def own_sum(listed: Mapping[str, Any]) -> int:
    """Return the CRC-32 of complete.json's entries except ``crc32``. It detects flipped bits, for example in ``step``."""
    return zlib.crc32(json.dumps({name: value for name, value in listed.items() if name != "crc32"}, sort_keys=True).encode())


def find(output_dir: Path, resume: str, world: World) -> Path | None:
    """Return the checkpoint to resume from, or None to start at step 0. All ranks get the same result.

    ``resume`` is ``auto`` (the newest intact checkpoint), ``restart`` (like ``auto``, but start at step 0 if every checkpoint is unusable
    or renamed), ``never``, or a checkpoint's path. Rank 0 checks for missing and truncated files. Then each rank verifies the checksums of
    a share of the files. Skipped checkpoints are reported with the reason. Raises ConfigError if the named checkpoint has a defect, if
    ``resume`` is ``never`` but the folder has checkpoints, or if ``auto`` finds only unusable or renamed checkpoints.
    """
    by_name = resume in ("auto", "never", "restart")
    candidates, others = broadcast_object((by_step(output_dir), _renamed(output_dir)) if by_name else ([Path(resume)], []))
    if resume == "never":
        if candidates:
            raise ConfigError(f"{output_dir} already holds {candidates[0].name}; use train.resume=auto or another output_dir")
        return None
    unusable = []
    for path in candidates:
        defect = _defect(path, world)
        if defect is None:
            for other, step in others:
                if step > description(path)["step"]:
                    world.say(f"{other} is a checkpoint of step {step} under another name; to use it, set train.resume to its path")
            return path
        if not by_name:
            raise ConfigError(f"train.resume={path}: {defect}; give a complete checkpoint or use auto")
        world.say(f"warning: skipped {path}: {defect}")
        unusable.append(f"{path.name}: {defect}")
    unusable += [f"{other.name}: it is a checkpoint of step {step}, but is not named checkpoint-{step}" for other, step in others]
    if unusable and resume == "auto":
        more = f" ({len(unusable) - 1} more)" if len(unusable) > 1 else ""
        raise ConfigError(
            f"{output_dir} has no checkpoint that can be resumed: {unusable[0]}{more}; restore one, set train.resume "
            "to the path of another, choose another train.output_dir, or set train.resume=restart to start at step 0 and keep them"
        )
    return None


def _renamed(output_dir: Path) -> list[tuple[Path, int]]:
    """Return (folder, step) for each checkpoint whose folder is not named checkpoint-STEP. Unfinished checkpoints (``.partial``) are
    ignored.
    """
    renamed = []
    for complete in sorted(output_dir.glob(f"*/{COMPLETE}")):
        if _NAME.fullmatch(complete.parent.name) or complete.parent.name.endswith(".partial"):
            continue
        with contextlib.suppress(*MALFORMED):
            renamed.append((complete.parent, int(description(complete.parent)["step"])))
    return renamed


def newest(output_dir: Path) -> Path:
    """Return the newest complete checkpoint in a run folder. Raises ConfigError if there is none."""
    for path in by_step(output_dir):
        if incomplete(path) is None:
            return path
    raise ConfigError(f"{output_dir} contains no complete checkpoint; train first, or give a checkpoint")


def description(path: Path) -> dict[str, Any]:
    """Read complete.json, which contains ``step``, ``world_size``, ``run_id``, the size and CRC-32 of every file, and more."""
    return read_json(path / COMPLETE)


def incomplete(path: Path) -> str | None:
    """Describe a checkpoint's defect, or return None if every listed file exists and has the listed size. File contents are not read."""
    try:
        described = description(path) if (path / COMPLETE).is_file() else {}  # reading a pipe would block
        listed = {name: (int(size), int(crc32)) for name, (size, crc32) in described["files"].items()}
        is_intact = described["crc32"] == own_sum(described)
        step = described["step"]
    except MALFORMED:
        return f"{COMPLETE} is missing or broken, so the checkpoint is incomplete"
    if not is_intact:
        return f"{COMPLETE} is damaged"
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != step:
        return f"it was written at step {step}, so its name is wrong"
    for name, (size, _) in listed.items():
        try:
            file = own_file(path, name, COMPLETE)
        except ConfigError as error:
            return str(error)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def damaged(path: Path, names: Iterable[str]) -> str | None:
    """Describe the first file in ``names`` that is unreadable or has changed since the save, or return None."""
    listed = description(path)["files"]
    for name in names:
        try:
            checksum = crc32_of(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if checksum != listed[name][1]:
            return f"{name} is damaged: its CRC-32 is {checksum:08x} instead of {listed[name][1]:08x}"
    return None


def _defect(path: Path, world: World) -> str | None:
    if defect := broadcast_object(incomplete(path) if world.is_main else None):
        return defect
    largest_first = sorted(listed := description(path)["files"], key=lambda name: -listed[name][0])
    reports = gather_objects(damaged(path, largest_first[world.rank :: world.size]), world)
    return next((report for report in reports if report), None)


def by_step(output_dir: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
