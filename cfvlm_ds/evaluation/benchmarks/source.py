"""Official files of a benchmark, as they lie in its folder: rows with their places, pictures with theirs.

Files that somebody else made: sizes are bounded, and a name in a row leads to no file outside of the folder. A folder of pictures may be a
link, since collections of pictures are large and shared; a link within it must end there. Parquet files are turned into JSON lines once,
and the pictures in them into parts of one file (cfvlm_ds.data.containers).
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import DataError, StorageError, unwritten
from cfvlm_ds.core.files import cache_folder, whole_file
from cfvlm_ds.core.reading import MIB, DuplicateKey, lines, open_regular, parse_json, read_bytes
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import refuse_foreign
from cfvlm_ds.data.confinement import Confinement
from cfvlm_ds.data.containers.kinds import is_there
from cfvlm_ds.data.containers.prepared import prepare, prepared_places
from cfvlm_ds.data.formats.fields import further_keys
from cfvlm_ds.data.picture_file import picture_file

MAX_FILE = 256 * MIB
"""Bytes of an annotation file that is read whole: ten times the largest one."""
MAX_ROW = 4 * MIB
_OUTSIDE = "put the picture itself there; only a whole folder of pictures may be a link"

Row = dict[str, Any]
Placed = tuple[str, Any]
"""Where a row is, and its value or the DataError for it."""


class Source:
    """The folder of a benchmark; ``say`` is told of long work on its files.

    Attributes:
        counts: file -> rows that were in it.
        notes: what is worth saying of the files.
        absent: picture that rows name and that is not there -> the error for the first of these rows.
    """

    def __init__(self, root: Path, say: Callable[[str], object] = lambda line: None) -> None:
        self.root, self._say = root, say
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []
        self.absent: dict[Path, DataError] = {}
        self._made: dict[str, Path] = {}
        """File, as places name it -> folder of the pictures that its rows brought."""
        self._confined: dict[tuple[Path, ...], Confinement] = {}

    def rows(self, name: str, columns: Sequence[str], lines: str = "") -> Iterator[tuple[str, Row | DataError]]:
        """The rows of a file as objects that have ``columns``; others that they have are metadata, unless they look like a misspelt one.

        A file that is missing, or cannot be read on, is one DataError. ``lines`` names JSON lines that are read in place of the file.
        """
        for where, value in self.values(name, lines):
            yield where, value if isinstance(value, DataError) else _checked(where, value, columns)

    def values(self, name: str, lines: str = "") -> Iterator[Placed]:
        """The values of a file: the items of a list, the values of an object, the lines of a table, the rows of Parquet files."""
        path, read = self.root / name, _READERS.get(Path(name).suffix)
        if lines and (self.root / lines).is_file():
            path, read = self.root / lines, _json_lines
        elif path.suffix == _PARQUET and is_there(path):
            read = self._prepared
        if read is None or not is_there(path) or path.is_dir():
            yield str(path), self._missing(path, lines)
            return
        self.counts[name], where = 0, ""
        try:
            for where, value in read(path):
                self.counts[name] += 1
                yield where, value
        except DataError as error:  # which names the file and what to do
            yield str(path), error
        except OSError as error:
            yield str(path), DataError(f"{path}: cannot be read ({error.strerror or error}); correct its permissions or get it again")
        except Exception as error:  # parsers raise nearly anything on damaged bytes
            after = f" after {where.removeprefix(str(path)).lstrip(': ')}" if where else ""
            yield str(path), DataError(f"{path}: cannot be read{after} ({error}); get the official file again, in UTF-8")

    def _prepared(self, path: Path) -> Iterator[Placed]:
        """The rows of Parquet files, of which JSON lines are made the first time; a line that is a text says what is wrong with its row."""
        made = prepare(path, "parquet", prepared_places(path, cache_folder()), self._say).lines
        self._made[str(path)] = made.parent
        for number, (_, value) in enumerate(_json_lines(made), 1):
            where = f"{path}:{number}"
            yield where, DataError(f"{where}: {value}") if isinstance(value, str) else value

    def _missing(self, path: Path, lines: str) -> DataError:
        if lines:
            return DataError(
                f"{path}: no such file, nor {self.root / lines} with its rows as JSON lines; docs/benchmarks says where it is and where it "
                "belongs"
            )
        there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"did you rename {near[0]!r}?" if near else "docs/benchmarks says where it is and where it belongs"
        return DataError(f"{path}: no such file; {hint}")

    def picture(self, where: str, name: Any, *folders: str) -> Path:
        """The file of a picture that a row names, in the first of ``folders`` that has it; where none has, it is ``absent``.

        A folder that begins with ``../`` is shared by benchmarks, and beside this one's. Raises DataError that begins with ``where`` for a
        name that is none.
        """
        if not isinstance(name, str):
            raise DataError(f"{where}: {quoted(name)} is no name of a picture; get the official file again")
        made = self._made.get(where.rpartition(":")[0])
        roots = (*([made] if made is not None else []), *(self._folder(folder) for folder in folders or ("",)))
        if roots not in self._confined:
            self._confined[roots] = Confinement(roots, _OUTSIDE)
        try:
            path = self._confined[roots](Path(name))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if not picture_file(path).is_file():
            others = f" (nor {', '.join(str(root / name) for root in roots[1:])})" if len(roots) > 1 else ""
            problem = f"{where}: no picture {roots[0] / name}{others}; put the pictures there, as docs/benchmarks says"
            self.absent.setdefault(path, DataError(problem))
        return path

    def _folder(self, folder: str) -> Path:
        return self.root.parent / folder[3:] if folder.startswith("../") else self.root / folder


def keep_picture(root: Path, path: Path, image: Image.Image) -> Path:
    """Write what was made of an official picture, as PNG, below the benchmark's folder. Raises StorageError, and ConfigError where a link
    leads out of it."""
    refuse_foreign(path, root)
    content = io.BytesIO()
    image.save(content, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, shared=True) as file:
            file.write(content.getvalue())
    except OSError as error:
        raise StorageError(unwritten(path, error)) from error
    return path


def each(rows: Iterator[tuple[str, Row | DataError]], make: Callable[[str, Row], Any]) -> Iterator[Any]:
    """What ``make`` gives for each row, or the DataError for it, which names the row."""
    for where, row in rows:
        if isinstance(row, DataError):
            yield row
            continue
        try:
            yield make(where, row)
        except DataError as error:
            yield error if str(error).startswith(where) else DataError(f"{where}: {error}")
        except Exception as error:  # whatever the row's values make of what takes them apart
            yield DataError(f"{where}: a value in the row has the wrong type or form ({error}); get the official file again")


def text(where: str, row: Row, key: str) -> str:
    """A text of a row. Raises DataError for another type or an empty one."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} must be a text, not {quoted(value)}; get the official file again")
    return value.strip()


def choice(where: str, row: Row, key: str, known: Sequence[Any]) -> int:
    """The place in ``known`` of what a row says; texts whatever their case. Raises DataError for another value."""
    value = row[key]
    plain = [each.lower() if isinstance(each, str) else each for each in known]
    asked = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, bool) or asked not in plain:
        raise DataError(f"{where}: {key!r} must be {' or '.join(map(str, known))}, not {quoted(value)}; get the official file again")
    return plain.index(asked)


def _checked(where: str, value: Any, columns: Sequence[str]) -> Row | DataError:
    if not isinstance(value, dict):
        return DataError(f"{where}: the row is a {type(value).__name__}, not an object; get the official file again")
    try:
        further_keys(value, columns, where)
    except DataError as error:
        return error
    if absent := [name for name in columns if name not in value]:
        has = ", ".join(map(str, list(value)[:20]))
        return DataError(f"{where}: column {absent[0]!r} is missing (there are: {has}); get the official file again")
    return value


def _json_values(path: Path) -> Iterator[Placed]:
    """Of one JSON value, or of one object per line: published files of either kind are named .json."""
    content = read_bytes(path, MAX_FILE).decode("utf-8-sig")
    try:
        value = parse_json(content)
    except DuplicateKey:
        raise
    except ValueError:
        if not content.lstrip().startswith("{") or "\n" not in content.strip():
            raise
        yield from _json_lines(path)
        return
    if isinstance(value, list):
        yield from ((f"{path}: item {number}", row) for number, row in enumerate(value, 1))
    elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        yield from ((f"{path}: key {key!r}", row) for key, row in value.items())
    elif isinstance(value, dict):
        yield f"{path}: item 1", value
    else:
        raise ValueError(f"it holds a {type(value).__name__}, not a list of rows")


def _json_lines(path: Path) -> Iterator[Placed]:
    with open_regular(path) as handle:
        for number, line in enumerate(lines(handle, MAX_ROW), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, parse_json(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where}: broken JSON ({error}); get the official file again")


def _table(delimiter: str) -> Callable[[Path], Iterator[Placed]]:
    def read(path: Path) -> Iterator[Placed]:
        reader = csv.reader(io.StringIO(read_bytes(path, MAX_FILE).decode("utf-8-sig"), newline=""), delimiter=delimiter)
        try:
            columns = [column.strip() for column in next(reader, [])]
            if len(set(columns)) < len(columns):
                raise ValueError("two columns have one name")
            for line in reader:
                where = f"{path}:{reader.line_num}"
                if len(line) == len(columns):
                    yield where, dict(zip(columns, line, strict=True))
                elif line:
                    yield where, DataError(f"{where}: {len(line)} fields for {len(columns)} columns; get the official file again")
        except csv.Error as error:
            raise ValueError(f"no table: {error}") from error

    return read


_PARQUET = ".parquet"
_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".json": _json_values,
    ".jsonl": _json_lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
