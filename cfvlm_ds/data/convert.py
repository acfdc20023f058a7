"""Conversion of data sets from any supported format to ``cfgroup/1`` rows, which name pictures by path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.reading import lines, parse_json
from cfvlm_ds.core.untrusted import new_output, own_output
from cfvlm_ds.data.check import look_at_rows, open_pictures
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.lines import MAX_LINE
from cfvlm_ds.data.manifest import Root, data_roots, local_path, open_groups
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.prepare import RowLines
from cfvlm_ds.data.report import CheckReport


class Converted(NamedTuple):
    """Number of groups written, the problem of each group that was left out, and the folder that picture paths are relative to."""

    groups: int
    problems: list[str]
    root: Path


def convert(
    path: Path,
    root: Root,
    format: str,
    out: Path,
    on_error: Literal["error", "skip"] = "error",
    say: Say = no_op,
    max_pixels: int = MAX_PIXELS,
) -> Converted:
    """Write the groups of a manifest to ``out``. The file is written under a temporary name and renamed when it is complete. Pictures that
    must be copied are written to the folder that contains ``out``.

    If ``on_error`` is ``skip``, every picture is opened. Invalid rows, and groups with an unusable picture, are left out and listed in a
    file next to ``out``; ``max_pixels`` is as in open_image. If ``on_error`` is ``error``, no picture is opened, and an invalid row raises
    DataError. Raises DataError if no usable group remains, and ConfigError or StorageError if ``out`` exists or cannot be written.
    """
    new_output(out, path)
    listed, scan, pictures, broken = list_of_skipped(out), Scan(), None, dict[int, str]()
    with whole_file(out) as file:
        path = local_path(path, scan, say)
        roots = [folder.absolute() for folder in data_roots(path, root)]
        folder = out.parent.absolute()
        base = folder if all(data_root.is_relative_to(folder) for data_root in roots) else roots[0]
        store = open_groups(path, root, format, progress=say, cache=[out.parent])
        report = CheckReport(str(store.path))
        seen = look_at_rows(report, store, say, scan)
        if on_error == "skip":
            pictures, broken = open_pictures(CheckReport(str(store.path)), store, *seen.pictures, max_pixels, say, scan)
        elif report.problems:
            raise DataError(f"{report.problems[0]} (or skip such rows with --on_error skip)")
        groups, writer = 0, RowLines(store, base, pictures, broken, frozenset(seen.repeats))
        for part in scan.over(range(len(store)), writer, Progress(say, "rows", len(store), "groups")):
            file.write(part.lines)
            groups += len(part.rows)
            report.problems.extend(part.report.problems)
        if not groups:
            problems = report.problems
            raise DataError(problems[0] + f" (none of the {len(problems)} groups is usable)" * (len(problems) > 1))
    if (described := report.prompts[repr(DESCRIBE)]) and "ask=" not in format:
        say(
            f"{described} of {report.num_groups} groups use the prompt {DESCRIBE!r}, the default for captions without one (the format "
            "option ask= sets another)"
        )
    list_skipped(listed, report.problems, say, "groups")
    return Converted(groups, report.problems, base)


def list_of_skipped(out: Path) -> Path:
    """Return the path of the file next to ``out`` that lists skipped rows. Raises ConfigError if another program wrote a file there."""
    listed = out.with_name(f"{out.name}.skipped.jsonl")
    return own_output(listed, lambda file: set(parse_json(next(lines(file, MAX_LINE)).decode())) == {"problem"}, "this package")


def list_skipped(listed: Path, problems: Sequence[str], say: Say, what: str = "rows") -> None:
    """Write the list of skipped rows or groups. If there are none, remove the list that an earlier call wrote."""
    if not problems:
        listed.unlink(missing_ok=True)
        return
    with whole_file(listed) as file:
        file.writelines(json.dumps({"problem": problem}, ensure_ascii=False).encode() + b"\n" for problem in problems)
    say(f"left out {len(problems)} {what if len(problems) > 1 else what[:-1]}, listed in {listed}; the first: {problems[0]}")
