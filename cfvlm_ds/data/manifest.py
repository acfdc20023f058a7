"""Manifest files: lines to rows to counterfactual groups, with every problem named by file and row.

A format is one function from a row (a JSON object) to a CounterfactualGroup whose image paths are as written. Joining them to a data
root, and refusing the ones that lead out of all roots, happens here once for all formats, so that a format cannot forget it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import CounterfactualGroup, Pictures
from cfvlm_ds.core.reading import MIB, DuplicateKey, TooLarge, lines, open_regular, parse_json, read_bytes
from cfvlm_ds.data.formats import FORMATS, Format
from cfvlm_ds.data.picture_file import picture_file

MAX_LINE = 4 * MIB
"""Bytes of a row of JSON lines: four times as many as a group of a thousand captions has."""

MAX_LIST = 128 * MIB
"""Bytes of a manifest that is one JSON list, which is in memory at once, several times its size."""

Entry = tuple[str, CounterfactualGroup | DataError]
"""Where a row is (``file:line``, or ``file: item n`` of a JSON list), and its group or what is wrong with it (``where`` included)."""


def iter_groups(path: Path, roots: Sequence[Path], convert: Format) -> Iterator[Entry]:
    """The groups of a manifest in file order; a problem is yielded in place of its group and never raised.

    ``path`` is JSON lines (blank lines are skipped), or one JSON list if its name ends in .json. A manifest without any row, or that cannot
    be read at all, yields one error. Image files are not opened. Memory: one row at a time for JSON lines, of at most MAX_LINE bytes; a
    longer one ends the reading, and so does a list of more than MAX_LIST.
    """
    if os.path.exists(path):
        for root in roots:
            if not root.is_dir():
                remedy = "pass the folder that image paths are relative to as root"
                yield str(path), DataError(f"{path}: its data root {root} is not a folder; {remedy}")
                return
    seen: dict[str, str] = {}
    confine = _Confinement(roots)
    empty = True
    for where, row in _rows(path):
        empty = False
        if isinstance(row, DataError):
            yield where, row
            continue
        try:
            group = _group(row, convert, confine)
            if group.id in seen:
                raise DataError(f"group id {group.id!r} is already used by {seen[group.id]}; make ids unique")
        except DataError as error:
            yield where, DataError(f"{where}: {error}")
            continue
        seen[group.id] = where
        yield where, group
    if empty:
        yield str(path), DataError(f"{path}: the manifest has no rows; write one JSON object per line, or check the step that built it")


def told_apart(group: CounterfactualGroup, first: int, second: int) -> bool:
    """Whether some text is known to be true of one of these two images of the group and false of the other."""
    return any({a, b} == {0, 1} for a, b in zip(group.match[first], group.match[second], strict=True))


def _group(row: Any, convert: Format, confine: _Confinement) -> CounterfactualGroup:
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, not an object; write it as {{...}}")
    try:
        group = convert(row)
    except (TypeError, AttributeError, OverflowError) as error:
        # A value of a type that the format did not expect, such as a number in place of a list: the row's fault, not the program's.
        raise DataError(f"a value in the row has the wrong type ({error}); compare it with the format's description") from error
    group = dataclasses.replace(group, images=tuple(tuple(confine(picture) for picture in pictures) for pictures in group.images))
    equal: dict[Pictures, list[int]] = {}
    for second, pictures in enumerate(group.images):
        for first in equal.setdefault(pictures, []):
            if told_apart(group, first, second):
                raise DataError(
                    f"group {group.id!r}: counterfactual image {second} equals image {first} (the same file {group.images[first][0]}) "
                    "though match tells them apart; name the edited image, or remove it"
                )
        equal[pictures].append(second)
    return group


class _Confinement:
    """The file that a path of a manifest leads to, links followed, must be inside one of the data roots; else DataError.

    A relative path is joined to the first root that has such a file, or to the first of all.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = roots
        self.resolved_roots = [root.resolve() for root in roots]
        self.folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        if not path.name:
            raise DataError(f"image path is empty; write the file's path, relative to the data root {self.roots[0]} or absolute")
        if "\0" in str(path):
            raise DataError(f"image path {str(path)!r} cannot be followed (it has a null byte); correct it")
        joined = [root / path for root in (self.roots if not path.is_absolute() else self.roots[:1])]
        full = joined[0] if len(joined) == 1 else next((each for each in joined if os.path.lexists(picture_file(each))), joined[0])
        file = picture_file(full)
        try:
            if ".." in path.parts:
                target = file.resolve()
            else:
                # A million images sit in few folders. Resolving each folder once leaves one system call per image on a network file system.
                if full.parent not in self.folders:
                    self.folders[full.parent] = full.parent.resolve()
                target = self.folders[full.parent] / file.name
                if target.is_symlink():
                    target = target.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise DataError(f"image path {str(path)!r} cannot be followed ({error}); correct it") from error
        if not any(target.is_relative_to(root) for root in self.resolved_roots):
            roots = f"root {self.roots[0]}" if len(self.roots) == 1 else f"roots {', '.join(map(str, self.roots))}"
            raise DataError(
                f"image path {str(path)!r} leads outside the data {roots} (to {target}); add the folder that holds it to data.root, which "
                "may be a list of folders (cfvlm-ds: --root, once for each), or correct the path"
            )
        return full


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, parsed JSON value or DataError) for each row of a file."""
    try:
        if path.suffix == ".json" and not _starts_with_an_object(path):
            yield from _list_rows(path)
            return
        number = 0
        with open_regular(path) as handle:
            try:
                for number, line in enumerate(lines(handle, MAX_LINE), 1):
                    if line.strip():
                        where = f"{path}:{number}"
                        remedy = "write one JSON object per line, or put a list in a file named .json"
                        yield where, _parse(line.rstrip(b"\r\n"), where, remedy)
            except TooLarge as error:
                where = f"{path}:{number + 1}"
                yield where, DataError(f"{where}: {error}; shorten it, or split the file into lines (what follows was not read)")
    except FileNotFoundError:
        yield str(path), DataError(_missing(path))
    except ValueError as error:
        yield str(path), DataError(f"{path}: the manifest cannot be read: {error}")
    except OSError as error:
        yield str(path), DataError(f"{path}: the manifest cannot be read ({error.strerror}); name a readable .jsonl or .json file")


def _starts_with_an_object(path: Path) -> bool:
    """Whether the first line is an object by itself: published data sets name files of one object per line .json too."""
    with open_regular(path) as handle:
        try:
            return isinstance(_parse(next(lines(handle, MAX_LINE), b""), str(path), ""), dict)
        except TooLarge:
            return False


def _list_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = read_bytes(path, MAX_LIST)
    except TooLarge as error:
        yield str(path), DataError(f"{path}: {error}; write one object per line to a file named .jsonl, which is read row by row")
        return
    items = _parse(content, str(path), "correct it, or name the file .jsonl if it holds one object per line")
    if isinstance(items, list):
        yield from ((f"{path}: item {number}", item) for number, item in enumerate(items, 1))
    elif isinstance(items, DataError):
        yield str(path), items
    else:
        yield str(path), DataError(f"{path}: holds a {type(items).__name__}, not a list of rows; write [...] or name the file .jsonl")


def _parse(data: bytes, where: str, remedy: str) -> Any:
    try:
        text = data.decode("utf-8-sig")
        value = parse_json(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return DataError(f"{where}: broken JSON at {line}column {error.colno} ({error.msg}); {remedy}")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        return DataError(f"{where}: {half} is half of a character, and no tokenizer or file takes it; write the whole or remove it")
    except UnicodeDecodeError as error:
        return DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except DuplicateKey as error:
        return DataError(f"{where}: {error}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested brackets
        return DataError(f"{where}: JSON that cannot be parsed ({error}); {remedy}")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such manifest, nor its folder {path.parent}; correct the path"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "correct the path"
    return f"{path}: no such manifest; {hint}"


Root = str | Path | Sequence[str | Path] | None
"""Folders that hold the images of a manifest; None for the manifest's own."""


def read_manifest(path: str | Path, root: Root = None, format: str = "cfgroup") -> list[CounterfactualGroup]:
    """The groups of a manifest, in file order: JSON lines, or one JSON list in a file named .json.

    Image paths are absolute, or relative to ``root`` (default: the manifest's folder), of several to the first that has such a file, and
    are returned joined to it. The file a path leads to, links followed, must be inside one of them; images are not opened. Raises DataError
    on the first problem: one sentence naming file, row (1-based line, or item of a list) and remedy.
    """
    groups = []
    for _, item in read_entries(path, root, format):
        if isinstance(item, DataError):
            raise item
        groups.append(item)
    return groups


def data_roots(path: str | Path, root: Root) -> list[Path]:
    """The folders that images of the manifest at ``path`` may be in, the one that paths are relative to first. Raises DataError on none."""
    if root is None:
        return [Path(path).parent]
    roots = [Path(root)] if isinstance(root, str | Path) else [Path(each) for each in root]
    if not roots:
        raise DataError(f"{path}: its data root is an empty list; name the folder of its images, or leave the option out")
    return roots


def named_apart(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path: a file's stem, with as many of its folders before it as tell it from the others.

    Raises DataError for a path that is given twice.
    """
    wholes = [Path(os.path.normpath(Path(path).absolute())).parts for path in paths]
    for path, whole in zip(paths, wholes, strict=True):
        if wholes.count(whole) > 1:
            raise DataError(f"{path} is given twice; name each manifest once")
    stems = [(*whole[:-1], Path(whole[-1]).stem) for whole in wholes]
    if len(set(stems)) == len(stems):
        wholes = stems
    return {"/".join(whole[-_depth(whole, wholes) :]): path for path, whole in zip(paths, wholes, strict=True)}


def _depth(whole: tuple[str, ...], among: list[tuple[str, ...]]) -> int:
    return next(n for n in range(1, len(whole) + 1) if sum(other[-n:] == whole[-n:] for other in among) == 1)


def read_entries(path: str | Path, root: Root, format: str) -> Iterator[Entry]:
    path = Path(path)
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FORMATS)}"
        raise DataError(f"{path}: unknown format {format!r}; {hint}")
    return iter_groups(path, data_roots(path, root), FORMATS[format])
