"""Reading files: JSON and YAML without a key twice; of untrusted ones, regular files only and never more than a bound.

Errors are ValueError or OSError without the file's name; the caller knows it and puts it in front.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

MIB = 2**20

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
_SPARE = 100  # of the thousand calls within one another that Python allows
_YAML_VALUES = (
    ("null", "null|Null|NULL|~|", ("n", "N", "~", "")),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("merge", "<<", "<"),
)
"""Kind of a value without quotes, its form in YAML 1.2 (https://yaml.org/spec/1.2.2, 10.3.2), and what it begins with."""


def is_there(path: Path) -> bool:
    """Tell whether a path, or a file of a pattern such as ``train-*.parquet``, is there."""
    return os.path.exists(path) or (glob.has_magic(path.name) and any(glob.iglob(path.name, root_dir=path.parent)))


def counted_from(path: str | Path) -> str:
    """Say from which folder a relative path counts, at the end of a sentence about one that is missing."""
    return "" if os.path.isabs(path) else f" (a relative path counts from {os.getcwd()})"


class TooLarge(ValueError):
    """A file or line is longer than its bound."""


class DuplicateKey(ValueError):
    """An object has a key twice; most readers would silently take the last one."""


def open_regular(path: str | Path) -> IO[bytes]:
    """A regular file, open for reading. Raises ValueError for a pipe or device, which could be waited for, or read, without end."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind in _KINDS:
            raise ValueError(f"it is {_KINDS[kind]} and not a regular file; write its contents to one")
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


class HeldFile:
    """A regular file that stays open as long as somebody holds it. Nobody moves in it: threads share it, and processes that are forked."""

    def __init__(self, path: str | Path) -> None:
        """Raises as open_regular does."""
        self._handle = open_regular(path)
        self.number = self._handle.fileno()

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            handle.close()

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from a place on; fewer only at the end of the file. Raises OSError."""
        if len(part := os.pread(self.number, length, offset)) == length:
            return part
        parts = [part]
        while part and len(part) < length:
            offset, length = offset + len(part), length - len(part)
            parts.append(part := os.pread(self.number, length, offset))
        return b"".join(parts)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All of a regular file. Raises TooLarge for one of more than ``limit`` bytes."""
    with open_regular(path) as handle:
        stated = os.fstat(handle.fileno()).st_size  # nothing is read of a file that says it is larger
        content = read_within(handle, stated, limit) if stated <= limit else b""
    if stated > limit or len(content) > limit:
        raise TooLarge(f"it has more than {limit} bytes, the bound for such a file")
    return content


def read_within(handle: IO[bytes], stated: int, limit: int) -> bytes:
    """What is left of a file that says it has ``stated`` bytes, or the first ``limit`` + 1 of more: no memory is asked for that it does not
    take."""
    content = handle.read(stated + 1)
    return content if len(content) <= stated else content + handle.read(limit + 1 - len(content))


def lines(handle: IO[bytes], limit: int) -> Iterator[bytes]:
    """The lines of a file. Raises TooLarge at one of more than ``limit`` bytes, since it is not known where the next one begins."""
    while line := handle.readline(limit + 1):
        if len(line) > limit:
            raise TooLarge(f"the line has more than {limit} bytes, the bound for one row")
        yield line


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises as parse_json does, and OSError."""
    return parse_json(Path(path).read_bytes().decode())


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file. Raises as parse_yaml does, and OSError."""
    return parse_yaml(Path(path).read_bytes().decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Parse a YAML 1.2 text: 1e-5 is a number; off, 1:30 and dates are strings.

    Raises ValueError for broken YAML and for a value within itself, DuplicateKey naming key and lines.
    """
    import yaml

    class Once(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            lines: dict[str, int] = {}
            for key, line in ((str(key.value), key.start_mark.line + 1) for key, _ in node.value):
                if key in lines:
                    where = f"on line {line}, after line {lines[key]}"
                    raise DuplicateKey(f"key {key!r} occurs twice in one section ({where}); keep one of them")
                lines[key] = line
            return super().construct_mapping(node, deep)

    for name, form, begins in _YAML_VALUES:
        Once.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"({form})\\Z"), list(begins))
    try:
        loader = Once(text)
        loader.deep_construct = True  # which refuses a value within itself
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"at line {mark.line + 1}, column {mark.column + 1} ({getattr(error, 'problem', '')})" if mark else f"({error})"
        raise ValueError(f"broken YAML {where}") from error


def yaml_of(value: Any) -> str:
    """Write a value as YAML that ``parse_yaml``, and a reader of YAML 1.1, read as the same."""
    import yaml

    class Quoting(yaml.SafeDumper):
        pass

    for name, form, begins in _YAML_VALUES:
        Quoting.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"({form})\\Z"), list(begins))
    return str(yaml.dump(value, Dumper=Quoting, sort_keys=False))


def parse_json(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """The value of a JSON text. Raises ValueError as json.loads does, DuplicateKey naming the key unless a ``decoder`` of its own reads it.

    Raises RecursionError for lists and objects within one another by the hundred, some of which could just be read: not where the stack
    is deeper, though, and they could not be written.
    """
    return _loaded(text, decoder or _DECODER, _SPARE if text.count("[") + text.count("{") > _SPARE else 0)


def _loaded(text: str, decoder: json.JSONDecoder, frames: int) -> Any:
    if frames:
        return _loaded(text, decoder, frames - 1)
    return json.loads(text) if text.startswith("\ufeff") else decoder.decode(text)  # the former says what is wrong with it


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise DuplicateKey(f"key {twice!r} occurs twice in one object; keep one of them")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for each text
