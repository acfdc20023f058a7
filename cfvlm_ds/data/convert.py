"""Any data to ``cfgroup/1``: rows of a known format become lines that say the same, pictures by path."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Literal, NamedTuple

from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import lines, parse_json
from cfvlm_ds.core.untrusted import new_output, own_output
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.check import look_at_rows
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.data.lines import MAX_LINE
from cfvlm_ds.data.manifest import Root, data_roots, here, open_groups, repeated
from cfvlm_ds.data.passes import Scan
from cfvlm_ds.data.picture_check import equal_images, open_pictures, opened_picture
from cfvlm_ds.data.report import CheckReport
from cfvlm_ds.data.store import GroupStore


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
    max_pixels: int = MAX_PIXELS,
) -> Converted:
    """Write the groups of a manifest to ``out``, which appears whole or not at all. Pictures that had to be copied lie in its folder.

    ``skip`` opens every picture, leaves out rows that are no group and groups with a picture that a check refuses, and lists them in a file
    beside ``out``; ``max_pixels`` as in open_image. Otherwise no picture is opened, and the first row that is no group raises DataError.
    Raises DataError where nothing is left; ConfigError or StorageError where ``out`` cannot be written, or is there already.
    """
    new_output(out, path)
    listed = list_of_skipped(out)
    with whole_file(out) as file:
        path = here(path, progress=say)
        roots = [each.absolute() for each in data_roots(path, root)]
        folder = out.parent.absolute()
        base = folder if all(each.is_relative_to(folder) for each in roots) else roots[0]
        groups, described, repeats, problems, seen = 0, 0, 0, list[str](), dict[int, int]()
        store = open_groups(path, root, format, progress=say, cache=[out.parent])
        what = "groups" if len(store) != store.num_rows else "rows"
        unsound = _unsound(store, max_pixels, say) if on_error == "skip" else lambda group: None
        for index, item in store.entries():
            if not isinstance(item, DataError) and (problem := unsound(item)) is not None:
                item = DataError(f"{store.where(index)}: {problem}")
            if not isinstance(item, DataError) and (key := hash(item.id)) in seen:
                item = DataError(repeated(store, index, seen[key], item.id))
                repeats += 1
            if isinstance(item, DataError):
                if on_error == "error":
                    raise DataError(f"{item} (or leave such rows out with --on_error skip)")
                problems.append(str(item))
                continue
            seen[key] = index
            described += all(candidate.prompt == DESCRIBE for candidate in item.candidates)
            file.write(json.dumps(to_row(_absolute(item), base), ensure_ascii=False).encode() + b"\n")
            groups += 1
        if not groups:
            raise DataError(problems[0] + f" (and so are all {len(problems)} {what})" * (len(problems) > 1))
    if described:
        say(f"{described} of {groups} groups ask {DESCRIBE!r}, as captions without a prompt of their own do (the option ask= asks another)")
    list_skipped(listed, problems, say, what)
    if repeats:
        say(f"{repeats} of the {what} that were left out repeat an earlier one, or its id")
    return Converted(groups, problems, base)


def _unsound(store: GroupStore, max_pixels: int, say: Callable[[str], object]) -> Callable[[CounterfactualGroup], str | None]:
    """Open each picture of a manifest; returns what says why a check refuses the pictures of a group, or None."""
    scan, report = Scan(), CheckReport(str(store.path))
    sound = open_pictures(report, store, *look_at_rows(report, store, say, scan).pictures, max_pixels, say, scan)

    def problem(group: CounterfactualGroup) -> str | None:
        for picture in itertools.chain(*group.images):
            if sound.find(picture) is None and isinstance(found := opened_picture(picture, None, None, max_pixels), str):
                return found
        return next(equal_images(group, sound), None)

    return problem


def list_of_skipped(out: Path) -> Path:
    """The file beside ``out`` with the rows that are left out. Raises ConfigError where somebody else's has its name."""
    return own_output(out.with_name(f"{out.name}.skipped.jsonl"), _is_list, "this package")


def _is_list(file: IO[bytes]) -> bool:
    return set(parse_json(next(lines(file, MAX_LINE)).decode())) == {"problem"}


def list_skipped(listed: Path, problems: Sequence[str], say: Callable[[str], object], what: str = "rows") -> None:
    """List the rows, or groups, that were left out; a list of an earlier call is removed where none was."""
    if not problems:
        listed.unlink(missing_ok=True)
        return
    with whole_file(listed) as file:
        file.writelines(json.dumps({"problem": problem}, ensure_ascii=False).encode() + b"\n" for problem in problems)
    say(f"left out {len(problems)} {what if len(problems) > 1 else what[:-1]}, listed in {listed}; the first: {problems[0]}")


def _absolute(group: CounterfactualGroup) -> CounterfactualGroup:
    return dataclasses.replace(group, images=tuple(tuple(picture.absolute() for picture in image) for image in group.images))
