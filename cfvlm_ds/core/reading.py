"""File reading: JSON and YAML, in which duplicate keys are errors, and untrusted files, which must be regular files of limited size.

The functions raise ValueError or OSError without the file's name, which the caller adds.
"""

from __future__ import annotations

import difflib
import errno
import glob
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

from cfvlm_ds.core.errors import DataError

MIB = 2**20
MALFORMED = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors that can occur when a missing, damaged or malformed file is read or its values are used."""

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
_SPARE = 100  # stack frames kept free, of the 1,000 that Python allows
_YAML_VALUES = (
    ("null", "null|Null|NULL|~|", ("n", "N", "~", "")),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("merge", "<<", "<"),
)
"""Type of an unquoted value, its pattern in YAML 1.2 (https://yaml.org/spec/1.2.2, 10.3.2), and its possible first characters."""


def is_there(path: Path) -> bool:
    """Return whether a path exists or, for a pattern such as ``train-*.parquet``, whether any file matches."""
    return os.path.exists(path) or (glob.has_magic(path.name) and any(glob.iglob(path.name, root_dir=path.parent)))


def counted_from(path: str | Path) -> str:
    """Return a suffix for messages about missing files: the folder that a relative path is resolved against, or "" for an absolute path."""
    return "" if os.path.isabs(path) else f" (relative paths are resolved against {os.getcwd()})"


def similar_names(path: str | Path) -> str:
    """Return the question "did you mean ...?" with up to three similar names in the folder of ``path``, or "" if there are none."""
    try:
        names = [entry.name for entry in islice(os.scandir(Path(path).parent), 10_000)]
    except OSError:
        return ""
    near = difflib.get_close_matches(Path(path).name, names, n=3)
    return f"did you mean {' or '.join(repr(str(Path(path).with_name(name))) for name in near)}?" if near else ""


class TooLarge(ValueError):
    """A file or line that exceeds its size limit."""


class DuplicateKey(ValueError):
    """An object with a repeated key. Most parsers silently use the last value."""


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading. Raises ValueError for a pipe or device, because reading it might never end."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind in _KINDS:
            raise ValueError(f"it is {_KINDS[kind]}, not a regular file; copy its contents into one")
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


class HeldFile:
    """A regular file that stays open for the lifetime of the object. Each read passes its own offset, so threads and forked processes can
    share the object.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file. Raises the same errors as ``open_regular``."""
        self._handle = open_regular(path)
        self.number = self._handle.fileno()

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes from ``offset``; fewer only at the end of the file. Raises OSError."""
        return os.pread(self.number, length, offset)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a regular file completely. Raises TooLarge for a file of more than ``limit`` bytes."""
    with open_regular(path) as handle:
        if os.fstat(handle.fileno()).st_size > limit:  # checked before reading
            raise TooLarge(f"it has more than {limit} bytes, the limit for such a file")
        return handle.read()


def lines(handle: IO[bytes], limit: int) -> Iterator[bytes]:
    """Yield the lines of a file. Raises TooLarge for a line of more than ``limit`` bytes. The line cannot be skipped, because the start of
    the next line is unknown.
    """
    while line := handle.readline(limit + 1):
        if len(line) > limit:
            raise TooLarge(f"the line has more than {limit} bytes, the limit for one row")
        yield line


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises the same errors as ``parse_json``, and OSError."""
    return parse_json(Path(path).read_bytes().decode())


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file. Raises the same errors as ``parse_yaml``, and OSError."""
    return parse_yaml(Path(path).read_bytes().decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Parse a YAML 1.2 text, in which 1e-5 is a number, and off, 1:30 and dates are strings.

    Raises ValueError for broken YAML and for a value that contains itself, and DuplicateKey with the key and its lines.
    """
    import yaml

    class Once(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[str, int] = {}
            for key, line in ((str(key.value), key.start_mark.line + 1) for key, _ in node.value):
                if key in lines:
                    where = f"on line {line}, after line {lines[key]}"
                    raise DuplicateKey(f"key {key!r} occurs twice in one section ({where}); keep one")
                lines[key] = line
            return super().construct_mapping(node, deep)

    for name, form, begins in _YAML_VALUES:
        Once.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"({form})\\Z"), list(begins))
    try:
        loader = Once(text)
        loader.deep_construct = True  # refuses a value that contains itself
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"at line {mark.line + 1}, column {mark.column + 1} ({getattr(error, 'problem', '')})" if mark else f"({error})"
        raise ValueError(f"broken YAML {where}") from error


def yaml_of(value: Any) -> str:
    """Format a value as YAML that YAML 1.1 parsers read the same way as ``parse_yaml``."""
    import yaml

    class Quoting(yaml.SafeDumper):
        pass

    for name, form, begins in _YAML_VALUES:
        Quoting.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"({form})\\Z"), list(begins))
    return str(yaml.dump(value, Dumper=Quoting, sort_keys=False))


def parse_json(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """Parse a JSON text. Raises ValueError like json.loads and, unless a ``decoder`` is given, DuplicateKey with the key that occurs twice.

    Raises RecursionError for more than a few hundred levels of nesting. The limit is below Python's, so that code deeper in the call stack
    can still write the value as JSON.
    """
    return _loaded(text, decoder or _DECODER, _SPARE if text.count("[") + text.count("{") > _SPARE else 0)


def _loaded(text: str, decoder: json.JSONDecoder, frames: int) -> Any:
    if frames:
        return _loaded(text, decoder, frames - 1)
    return json.loads(text) if text.startswith("\ufeff") else decoder.decode(text)  # json.loads reports a byte-order mark


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Convert the key-value pairs of a JSON object to a dict. Raises DuplicateKey for a key that occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise DuplicateKey(f"key {twice!r} occurs twice in one object; keep one")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=object_of)  # json.loads would build a decoder for each text


def read_ids(file: Path) -> dict[str, int]:
    """Read ids from a file with one id per line, and map each id to its line number. Raises DataError if the file cannot be read."""
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: ids cannot be read ({error}); write one id per line, in UTF-8") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            ids.setdefault(name, number)
    return ids
