"""Any data to ``cfgroup/1``: rows of a known format become lines that say the same, pictures by path."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.untrusted import output_file
from cfvlm_ds.data.containers.hub import fetched
from cfvlm_ds.data.formats import AUTO
from cfvlm_ds.data.formats.cfgroup import to_row
from cfvlm_ds.data.manifest import Root, data_roots, open_groups, taken_as


class Converted(NamedTuple):
    """What came of a conversion; ``root`` is the folder that picture paths are relative to."""

    groups: int
    problems: list[str]
    root: Path


def convert(
    path: Path,
    root: Root,
    format: str,
    out: Path,
    on_error: Literal["error", "skip"] = "error",
    say: Callable[[str], object] = lambda line: None,
) -> Converted:
    """Write the groups of a manifest to ``out``, which appears whole or not at all. Pictures that had to be copied lie in its folder.

    ``skip`` leaves out rows that are no group, and lists them in a file beside ``out``. Raises DataError for the first of them otherwise,
    and where no row is a group; ConfigError or StorageError where ``out`` cannot be written.
    """
    output_file(out)
    path = fetched(path, say=say)
    if out.exists() and path.exists() and out.samefile(path):
        raise DataError(f"{out}: is the file that is converted; name another one with --out")
    roots = [each.absolute() for each in data_roots(path, root)]
    folder = out.parent.absolute()
    base = folder if all(each.is_relative_to(folder) for each in roots) else roots[0]
    groups, problems, seen = 0, list[str](), set[int]()
    store = open_groups(path, root, format, progress=say, cache=[out.parent])
    if format == AUTO:
        say(taken_as(store))
    with whole_file(out) as lines:
        for index, item in store.entries():
            if not isinstance(item, DataError) and (key := hash(item.id)) in seen:
                item = DataError(f"{store.where(index)}: group id {item.id!r} is already used by an earlier row; make ids unique")
            if isinstance(item, DataError):
                if on_error == "error":
                    raise DataError(f"{item} (or leave such rows out with --on_error skip)")
                problems.append(str(item))
                continue
            seen.add(key)
            groups += 1
            lines.write(json.dumps(to_row(_absolute(item), base), ensure_ascii=False).encode() + b"\n")
        if not groups:
            raise DataError(problems[0] + f" (and so are all {len(problems)} rows)" * (len(problems) > 1))
    list_skipped(out, problems, say)
    return Converted(groups, problems, base)


def list_skipped(out: Path, problems: Sequence[str], say: Callable[[str], object]) -> None:
    """List the rows that were left out in a file beside ``out``; one of an earlier call is removed where none was."""
    listed = out.with_name(f"{out.name}.skipped.jsonl")
    if not problems:
        listed.unlink(missing_ok=True)
        return
    with whole_file(listed) as lines:
        lines.writelines(json.dumps({"problem": problem}, ensure_ascii=False).encode() + b"\n" for problem in problems)
    say(f"left out {len(problems)} rows, listed in {listed}; the first: {problems[0]}")


def _absolute(group: CounterfactualGroup) -> CounterfactualGroup:
    return dataclasses.replace(group, images=tuple(tuple(picture.absolute() for picture in image) for image in group.images))
