"""Reading of a benchmark's official files: rows with their locations, and paths of pictures.

The files are untrusted, so their sizes are limited, and a name in a row cannot refer to a file outside the folder. A picture folder can be
a link, because picture collections are large and shared, but a link inside it must not lead outside. Parquet files are converted once to
JSON lines, and their pictures are copied into one file (cfvlm_ds.data.containers).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import DataError, writing
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.reading import MIB, DuplicateKey, lines, open_regular, parse_json, read_bytes
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import refuse_foreign
from cfvlm_ds.data.confinement import Confinement
from cfvlm_ds.data.fields import further_keys
from cfvlm_ds.data.picture_file import picture_file

MAX_FILE = 256 * MIB
"""Maximum size in bytes of an annotation file that is read into memory at once: ten times the largest official file."""
MAX_ROW = 4 * MIB
_OUTSIDE = "put the picture itself there; only a whole folder of pictures may be a link"
_AGAIN = "get the official file again"


@dataclass(frozen=True)
class File:
    """An official file with rows: .json, .jsonl, .csv, .tsv, .parquet, or .txt with two tab-separated columns.

    Args:
        name: path below the benchmark's folder; ``*`` matches any name, and ``**`` matches any number of folders.
        columns: names of the columns if rows are lists of values; in other files, each row names its columns.
        rows: number of rows in the official file; None if unknown.
        lines: JSON lines file that is read instead if it exists.
        part: part of the benchmark that the rows belong to, such as a split.
    """

    name: str
    columns: tuple[str, ...] = ()
    rows: int | None = None
    lines: str = ""
    part: str = ""


@dataclass(frozen=True)
class Row:
    """A row of an official file.

    Args:
        values: column -> value.
        where: location of the row, with which its error messages begin.
        number: 1-based number of the row in its file, or its key if the file is a JSON object.
        part: part of the benchmark that the file belongs to.
        file: path of the file below the benchmark's folder.
        source: folder of the benchmark.
    """

    values: dict[str, Any]
    where: str
    number: str
    part: str
    file: str
    source: Source

    def __getitem__(self, column: str) -> Any:
        """Return the value in a column. Raises DataError if the row lacks the column."""
        if column not in self.values:
            further_keys(self.values, (column,), self.where)  # raises for a likely misspelling
            present = ", ".join(map(str, list(self.values)[:20]))
            raise self.error(f"column {column!r} is missing (columns: {present})")
        return self.values[column]

    def error(self, problem: str, remedy: str = _AGAIN) -> DataError:
        """Return a DataError that begins with the row's location."""
        return DataError(f"{self.where}: {problem}; {remedy}")

    def rows(self, column: str) -> Iterator[Row]:
        """Yield the objects in a list-valued column as rows. Raises DataError if the value is not a list of objects."""
        values = self[column]
        if not isinstance(values, list):
            raise self.error(f"{column!r} must be a list, not {quoted(values)}")
        for number, value in enumerate(values, 1):
            where = f"{self.where}: {column} {number}"
            yield Row(_checked(where, value), where, str(number), self.part, self.file, self.source)

    def text(self, column: str) -> str:
        """Return the text in a column with surrounding white space removed. Raises DataError if the value is empty or not a string."""
        value = self[column]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{column!r} must be a text, not {quoted(value)}")
        return value.strip()

    def choice(self, column: str, known: Sequence[Any]) -> int:
        """Return the index of a column's value in ``known``, ignoring case. Raises DataError if the value is not in ``known``."""
        value = self[column]
        plain = [entry.lower() if isinstance(entry, str) else entry for entry in known]
        normalised = value.strip().lower() if isinstance(value, str) else value
        if isinstance(value, bool) or normalised not in plain:
            raise self.error(f"{column!r} must be {' or '.join(map(str, known))}, not {quoted(value)}")
        return plain.index(normalised)

    def truth(self, column: str, known: Sequence[Any]) -> tuple[int, ...]:
        """Return a row of a truth table, with 1 at the index of the column's value in ``known``. Raises the same errors as ``choice``."""
        return one_hot(self.choice(column, known), len(known))

    def picture(self, name: Any, *folders: str) -> Path:
        """Return the path of a picture; see ``Source.picture``."""
        return self.source.picture(self.where, name, *folders)


def one_hot(gold: int, size: int) -> tuple[int, ...]:
    """Return a row of a truth table in which only the text with the index ``gold`` is true."""
    return tuple(int(place == gold) for place in range(size))


@dataclass(eq=False)
class Source:
    """Folder of a benchmark. ``say`` is called with progress messages.

    Attributes:
        counts: name of an official file -> number of its rows, excluding those for which ``Benchmark.item`` returns None.
        read: name of an official file -> name of the file that was actually read.
        absent: path of a missing picture -> error for the first row that names it.
    """

    root: Path
    say: Say = lambda line: None
    counts: dict[str, int] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    absent: dict[Path, DataError] = field(default_factory=dict)
    _brought: tuple[Path, ...] = ()
    """Folder with the converted pictures of the current file, if any."""
    _confined: dict[tuple[Path, ...], Confinement] = field(default_factory=dict)

    def rows(self, file: File) -> Iterator[Row | DataError]:
        """Yield the rows of a file, with a DataError in place of an invalid row or of a missing or damaged file."""
        path = self.root / file.name
        names = sorted(glob(file.name, root_dir=self.root, recursive=True))  # follows links, unlike Path.glob
        if file.lines and (self.root / file.lines).is_file():
            names = [file.lines]
        elif path.suffix == ".parquet":
            names = [file.name] * bool(names)
        if not names:
            alternative = f" and no {self.root / file.lines} with its rows as JSON lines" if file.lines else ""
            yield DataError(f"{path}: no such file{alternative}; docs/benchmarks describes where to get it and where to put it")
        for name in names:
            yield from self._rows(file, name)

    def sound_rows(self, file: File) -> Iterator[Row]:
        """Yield the rows of a file that other files depend on. Raises DataError for a missing file or an invalid row."""
        for row in self.rows(file):
            if isinstance(row, DataError):
                raise row
            yield row

    def _rows(self, file: File, name: str) -> Iterator[Row | DataError]:
        # imported late, here and below, because training without benchmarks does not need them
        from cfvlm_ds.data.containers.rows import rows_of
        from cfvlm_ds.data.containers.tables import csv_rows, tsv_rows

        readers: dict[str, Callable[[Path], _Placed]] = {
            ".json": _json_values,
            ".jsonl": _json_lines,
            ".txt": _text_lines,
            ".csv": csv_rows,
            ".tsv": tsv_rows,
            ".parquet": self._prepared,
        }
        path, self._brought = self.root / name, ()
        self.counts.setdefault(file.name, 0)
        self.read[file.name] = name
        try:
            for place, value in rows_of(path, readers[path.suffix]):
                self.counts[file.name] += 1
                kind, _, number = place.partition(" ")
                where = f"{path}:{number}" if kind == "line" else f"{path}: {place}"
                try:
                    yield Row(_checked(where, value, file.columns), where, number, file.part, name, self)
                except DataError as error:
                    yield error
        except DataError as error:  # its message names the file and the remedy
            yield error

    def _prepared(self, path: Path) -> _Placed:
        """Yield the rows of Parquet files, which are converted to JSON lines on first use. A line that is a JSON string, not an object, is
        the error message for its row.
        """
        from cfvlm_ds.data.containers.prepared import prepare

        converted = prepare(path, "parquet", say=self.say).lines
        self._brought = (converted.parent,)
        for place, value in _json_lines(converted):
            yield place, DataError(value) if isinstance(value, str) else value

    def picture(self, where: str, name: Any, *folders: str) -> Path:
        """Return the path of a picture in the first of ``folders`` that contains it. If none does, record its path in ``absent``.

        A folder whose name begins with ``../`` lies beside the benchmark's folder and is shared by several benchmarks. Raises DataError for
        an invalid name; the message begins with ``where``.
        """
        if not isinstance(name, str):
            raise DataError(f"{where}: {quoted(name)} is not the name of a picture; {_AGAIN}")
        beside, inside = self.root.parent, self.root
        named = (beside / folder[3:] if folder.startswith("../") else inside / folder for folder in folders or ("",))
        roots = (*self._brought, *named)
        if roots not in self._confined:
            self._confined[roots] = Confinement(roots, _OUTSIDE)
        try:
            path = self._confined[roots](Path(name))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if not picture_file(path).is_file():
            others = f" (nor {', '.join(str(root / name) for root in roots[1:])})" if len(roots) > 1 else ""
            problem = f"{where}: no picture {roots[0] / name}{others}; put the pictures there, as described in docs/benchmarks"
            self.absent.setdefault(path, DataError(problem))
        return path


def keep_picture(root: Path, path: Path, image: Image.Image) -> Path:
    """Save a picture that was derived from an official one as the PNG file ``path``, and return ``path``. ``root`` is the benchmark's
    folder.

    Raises StorageError if the file cannot be written, and ConfigError if a link leads out of the folder.
    """
    refuse_foreign(path, root)
    content = io.BytesIO()
    image.save(content, "PNG")
    with writing(path, "free some space"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, shared=True) as file:
            file.write(content.getvalue())
    return path


def _checked(where: str, value: Any, columns: Sequence[str] = ()) -> dict[str, Any]:
    if isinstance(value, DataError):
        raise DataError(f"{where}: {value}")
    if columns and isinstance(value, list) and len(value) == len(columns):
        return dict(zip(columns, value, strict=True))
    if not isinstance(value, dict):
        form = f"[{', '.join(columns)}]" if columns else "an object"
        raise DataError(f"{where}: the row must be {form}, not {quoted(value)}; {_AGAIN}")
    return value


_Placed = Iterator[tuple[str, Any]]
"""Iterator over (location, value) pairs of a file. An unreadable value is a DataError."""


def _json_values(path: Path) -> _Placed:
    """Yield the rows of a .json file, which contains either one JSON value or one object per line. Published files use both forms."""
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
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        yield from ((f"key {key}", row) for key, row in value.items())
    else:
        yield from ((f"item {number}", row) for number, row in enumerate(value if isinstance(value, list) else [value], 1))


def _json_lines(path: Path) -> _Placed:
    with open_regular(path) as handle:
        for number, line in enumerate(lines(handle, MAX_ROW), 1):
            if not line.strip():
                continue
            try:
                value = parse_json(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                value = DataError(f"broken JSON ({error}); {_AGAIN}")
            yield f"line {number}", value


def _text_lines(path: Path) -> _Placed:
    """Yield each non-empty line, split at its last tab."""
    content = read_bytes(path, MIB).decode("utf-8-sig")
    for number, line in enumerate((line for line in content.splitlines() if line.strip()), 1):
        before, _, after = line.rpartition("\t")
        yield f"line {number}", [before, after]
