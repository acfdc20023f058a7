"""Any data to ``cfgroup/1``: rows of a known format become lines that say the same, pictures by path."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import lines, parse_json
from cfvlm_ds.core.untrusted import new_output, own_output
from cfvlm_ds.data.containers.hub import fetched
from cfvlm_ds.data.formats import AUTO
from cfvlm_ds.data.formats.cfgroup import to_row
from cfvlm_ds.data.lines import MAX_LINE
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
    and where no row is a group; ConfigError or StorageError where ``out`` cannot be written, or is there already.
    """
    new_output(out, path)
    listed = list_of_skipped(out)
    with whole_file(out) as file:
        path = fetched(path, say=say)
        roots = [each.absolute() for each in data_roots(path, root)]
        folder = out.parent.absolute()
        base = folder if all(each.is_relative_to(folder) for each in roots) else roots[0]
        groups, problems, seen = 0, list[str](), set[int]()
        store = open_groups(path, root, format, progress=say, cache=[out.parent])
        if format == AUTO:
            say(taken_as(store))
        for index, item in store.entries():
            if not isinstance(item, DataError) and (key := hash(item.id)) in seen:
                item = DataError(f"{store.where(index)}: group id {item.id!r} is already used by an earlier row; make ids unique")
            if isinstance(item, DataError):
                if on_error == "error":
                    raise DataError(f"{item} (or leave such rows out with --on_error skip)")
                problems.append(str(item))
                continue
            seen.add(key)
            file.write(json.dumps(to_row(_absolute(item), base), ensure_ascii=False).encode() + b"\n")
            groups += 1
        if not groups:
            raise DataError(problems[0] + f" (and so are all {len(problems)} rows)" * (len(problems) > 1))
    list_skipped(listed, problems, say)
    return Converted(groups, problems, base)


def list_of_skipped(out: Path) -> Path:
    """The file beside ``out`` with the rows that are left out. Raises ConfigError where somebody else's has its name."""
    return own_output(out.with_name(f"{out.name}.skipped.jsonl"), _is_list, "this package")


def _is_list(file: IO[bytes]) -> bool:
    return set(parse_json(next(lines(file, MAX_LINE)).decode())) == {"problem"}


def list_skipped(listed: Path, problems: Sequence[str], say: Callable[[str], object]) -> None:
    """List the rows that were left out; a list of an earlier call is removed where none was."""
    if not problems:
        listed.unlink(missing_ok=True)
        return
    with whole_file(listed) as file:
        file.writelines(json.dumps({"problem": problem}, ensure_ascii=False).encode() + b"\n" for problem in problems)
    say(f"left out {len(problems)} rows, listed in {listed}; the first: {problems[0]}")


def _absolute(group: CounterfactualGroup) -> CounterfactualGroup:
    return dataclasses.replace(group, images=tuple(tuple(picture.absolute() for picture in image) for image in group.images))
