"""One JSON value in a file, gone through without holding it: a list of rows, COCO's captions, or an object of numbered rows.

COCO's file has pictures and captions apart: a row is a picture with all its captions, and with a list under each further key of theirs. In
an object of numbered rows, as SugarCrepe's, the values are the rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB, DuplicateKey, open_regular, parse_json
from cfvlm_ds.data.containers.rows import MAX_ROW, Row, Rows

_REMEDY = "correct it, or name the file .jsonl if it holds one object per line"
_SPACE = " \t\n\r"
_BLOCK = 4 * MIB


def json_rows(path: Path) -> Rows:
    """The rows of a file."""
    with open_regular(path) as handle:
        text = _Text(path, handle)
        first = text.peek()
        if first == "[":
            for number, value in enumerate(text.items(), 1):
                yield f"item {number}", _row(value)
        elif first == "{":
            yield from _of_object(path, text)
        else:
            value = text.value()
            kind = type(value).__name__
            raise (
                value
                if isinstance(value, DataError)
                else DataError(f"{path}: holds a {kind}, not a list of rows; write [...] or name the file .jsonl")
            )
        text.end()


def _row(value: Any) -> Row | DataError:
    if isinstance(value, (dict, DataError)):
        return value
    return DataError(f"the row is a {type(value).__name__}, not an object; write it as {{...}}")


def _of_object(path: Path, text: _Text) -> Rows:
    images, captions = dict[Any, Row](), dict[Any, list[Row]]()
    seen: set[str] = set()
    for key in text.members():
        if key in seen:
            raise DataError(f"{path}: key {key!r} occurs twice in one object; keep one of them")
        seen.add(key)
        if key in ("images", "annotations") and text.peek() == "[":
            for number, value in enumerate(text.items(), 1):
                _take(path, f"{key}, item {number}", value, images if key == "images" else None, captions)
        elif key.isdecimal() and not {"images", "annotations"} & seen and text.peek() == "{":
            yield f"key {key}", _row(text.value())
        elif not all(each.isdecimal() for each in seen):
            text.value()  # info, licenses and the like
        else:
            raise DataError(f"{path}: holds a dict, not a list of rows; write [...] or name the file .jsonl")
    if all(key.isdecimal() for key in seen):
        return
    if not {"images", "annotations"} <= seen:
        raise DataError(
            f"{path}: holds a dict, not a list of rows ({', '.join(map(repr, sorted(seen)[:10]))}); write [...] or name the file .jsonl"
        )
    for number, (image_id, row) in enumerate(images.items(), 1):
        said = captions.pop(image_id, [])
        beside = {key: [each.get(key) for each in said] for key in dict.fromkeys(key for each in said for key in each)}
        ids, texts = beside.pop("id", []), beside.pop("caption", [])
        beside = {f"annotations.{key}" if key in row else key: values for key, values in beside.items()}
        yield f"images, item {number}", row | {"caption": texts, "caption_ids": ids, **beside}
    for unknown in captions:
        problem = f"annotations name the image id {unknown!r}, which 'images' lacks; add it, or get both parts of one file"
        yield f"image {unknown!r}", DataError(problem)


def _take(path: Path, where: str, value: Any, images: dict[Any, Row] | None, captions: dict[Any, list[Row]]) -> None:
    """Keep a picture, or a caption of one, of COCO's file."""
    row = _row(value)
    if isinstance(row, DataError):
        raise DataError(f"{path}: {where}: {row}")
    needed = ("id", "file_name") if images is not None else ("image_id", "caption")
    for key in needed:
        if not isinstance(row.get(key), (str, int)) and where == "images, item 1":
            remedy = "write [...] or name the file .jsonl"
            raise DataError(f"{path}: holds a dict, not a list of rows, nor COCO's captions ({where} has no {key!r}); {remedy}")
        if not isinstance(row.get(key), (str, int)):
            raise DataError(
                f"{path}: {where}: key {key!r} is missing or no {'text' if key == 'caption' else 'name'}; COCO's captions have it"
            )
    if images is None:
        captions.setdefault(row["image_id"], []).append({key: each for key, each in row.items() if key != "image_id"})
    elif row["id"] in images:
        raise DataError(f"{path}: {where}: image id {row['id']!r} occurs twice; keep one of them")
    else:
        images[row["id"]] = {"id": row["id"], "image": row["file_name"], **{key: value for key, value in row.items() if key not in needed}}


class _Text:
    """JSON text of which a part is in memory. Raises DataError that names the place where it is broken."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self._path, self._handle = path, handle
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._lines, self._column, self._ended = "", 0, 0, 0, False
        self._bytes = 0
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space; an empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def items(self) -> Iterator[Any]:
        """The items of a list; one that is broken within, such as by a key given twice, is a DataError in its place."""
        self._expect("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self._expect(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of an object; whoever asks for the next one has taken the value."""
        self._expect("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._broken("Expecting property name enclosed in double quotes", self._at)
            key = self.value()
            self._expect(":")
            yield key
            if self._expect(",}") == "}":
                return

    def value(self) -> Any:
        """The value that begins here, or a DataError for one with a key given twice."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._longer():
                    continue
                raise self._broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._broken(str(error), self._at) from error
            if end < len(self._text) or not self._longer():  # a number may go on
                break
        written = self._text[self._at : end]
        self._at = end
        if len(written) > MAX_ROW:
            return DataError(f"the row has more than {MAX_ROW} characters, the bound for one row; shorten it")
        try:
            parse_json(written)
        except DuplicateKey as error:
            return DataError(str(error))
        except RecursionError as error:
            return DataError(f"JSON that cannot be parsed ({error}); correct it")
        return value

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self._broken("Extra data", self._at)

    def _expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            raise self._broken(f"Expecting {' or '.join(repr(each) for each in characters)}", self._at)
        self._at += 1
        return found

    def _longer(self) -> bool:
        """Have more text of a value that does not end in what is there."""
        return len(self._text) - self._at <= MAX_ROW and self._more()

    def _more(self) -> bool:
        if self._ended:
            return False
        block = self._handle.read(_BLOCK)
        self._ended = not block
        try:
            more = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: byte {self._bytes + error.start + 1} is not UTF-8; save the file as UTF-8") from error
        self._bytes += len(block)
        gone = self._text[: self._at]
        self._lines += gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._column + len(gone)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more) or not self._ended

    def _broken(self, message: str, place: int) -> DataError:
        before = self._text[:place]
        line = self._lines + before.count("\n") + 1
        column = place - before.rfind("\n") if "\n" in before else self._column + place + 1
        return DataError(f"{self._path}: broken JSON at {f'line {line}, ' if line > 1 else ''}column {column} ({message}); {_REMEDY}")


def is_lines(path: Path) -> bool:
    """Whether a file named .json has one object per line, as published data sets have too; one line is a row, unless it holds rows.

    Raises OSError and ValueError as open_regular does.
    """
    with open_regular(path) as handle:
        line = handle.readline(MAX_ROW + 1)
        while line and not line.strip() and len(line) <= MAX_ROW:
            line = handle.readline(MAX_ROW + 1)
    try:
        row = json.loads(line.decode("utf-8-sig")) if len(line) <= MAX_ROW else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and not {"images", "annotations"} <= row.keys() and not (row and all(key.isdecimal() for key in row))
