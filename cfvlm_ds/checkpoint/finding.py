"""The checkpoints of a run folder: which there are, and whether they are whole and undamaged.

A folder that does not match its list, ``complete.json``, is never resumed from.
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
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.untrusted import own_file

COMPLETE = "complete.json"


_NAME = re.compile(r"checkpoint-(\d+)")


def own_sum(listed: Mapping[str, Any]) -> int:
    """CRC-32 of the list itself without this number: otherwise a flipped bit in ``step`` or ``world_size`` would go unnoticed."""
    return zlib.crc32(json.dumps({name: value for name, value in listed.items() if name != "crc32"}, sort_keys=True).encode())


def find(output_dir: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to continue from: the newest one without a defect (``auto``), the named one, or None; the same on every rank.

    Rank 0 looks for missing and truncated files, then every rank reads a share of them and compares their sums. Says which checkpoints were
    passed over and why. Raises ConfigError when the named one has a defect, when ``never`` meets a folder that has checkpoints, and when
    ``auto`` finds checkpoints, under whatever name, and none that can be used: ``restart`` takes step 0 then.
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
                    world.say(
                        f"{other} is a checkpoint of step {step} and not continued from for its name; give train.resume its path to do so"
                    )
            return path
        if not by_name:
            raise ConfigError(f"train.resume={path}: {defect}; name a complete checkpoint or use auto")
        world.say(f"passed over {path}: {defect}")
        unusable.append(f"{path.name}: {defect}")
    unusable += [f"{other.name}: it is a checkpoint of step {step} under another name than checkpoint-{step}" for other, step in others]
    if unusable and resume == "auto":
        more = f" ({len(unusable) - 1} more)" if len(unusable) > 1 else ""
        raise ConfigError(
            f"{output_dir} holds checkpoints of which none can be continued from: {unusable[0]}{more}; restore one or give train.resume "
            "the path of another, choose another train.output_dir, or set train.resume to restart to start at step 0 beside them"
        )
    return None


def _renamed(output_dir: Path) -> list[tuple[Path, int]]:
    """Folders with the contents of a checkpoint but another name, and their steps; what a killed save has left does not count."""
    found = []
    for listed in sorted(output_dir.glob(f"*/{COMPLETE}")):
        if _NAME.fullmatch(listed.parent.name) or listed.parent.name.endswith(".partial"):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found.append((listed.parent, int(description(listed.parent)["step"])))
    return found


def newest(output_dir: Path) -> Path:
    """The newest complete checkpoint of a run folder. Raises ConfigError when there is none."""
    for path in by_step(output_dir):
        if incomplete(path) is None:
            return path
    raise ConfigError(f"{output_dir} holds no complete checkpoint; train first, or name a checkpoint")


def description(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself: ``step``, ``world_size``, ``run_id``, and ``files`` with their sizes and CRC-32."""
    return read_json(path / COMPLETE)


def incomplete(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every listed file is there in full; their contents are not read."""
    try:
        described = description(path) if (path / COMPLETE).is_file() else {}  # a pipe would be waited for
        listed = {name: (int(size), int(crc32)) for name, (size, crc32) in described["files"].items()}
        whole = described["crc32"] == own_sum(described)
        step = described["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{COMPLETE} is missing or broken, so the checkpoint was never finished"
    if not whole:
        return f"{COMPLETE} is damaged"
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != step:
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
    """Which of these files of a complete checkpoint no longer has the contents that were written, or None."""
    listed = description(path)["files"]
    for name in names:
        try:
            found = crc32_of(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found != listed[name][1]:
            return f"{name} is damaged: its CRC-32 is {found:08x} instead of {listed[name][1]:08x}"
    return None


def _defect(path: Path, world: World) -> str | None:
    if defect := broadcast_object(incomplete(path) if world.is_main else None):
        return defect
    largest_first = sorted(listed := description(path)["files"], key=lambda name: -listed[name][0])
    reports = gather_objects(damaged(path, largest_first[world.rank :: world.size]), world)
    return next((report for report in reports if report), None)


def by_step(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
