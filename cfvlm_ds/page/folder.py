"""A page as a folder: index.html and what it loads. All of it is static and works from the disk.

What the records say is in JavaScript files of plain data, in chunks that are loaded when one is looked at: browsers refuse to fetch from
the disk, but load scripts. The page's own script puts every string of them into the document as text.
"""

from __future__ import annotations

import html
import json
import math
import os
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfvlm_ds.core.distributed import cores_per_rank
from cfvlm_ds.core.errors import ConfigError, StorageError, unwritten
from cfvlm_ds.core.files import aside_of, create, whole_folder
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.text import printable
from cfvlm_ds.core.untrusted import refuse_link
from cfvlm_ds.data.decoding import MAX_PIXELS
from cfvlm_ds.page.content import item_content
from cfvlm_ds.page.pictures import Copies
from cfvlm_ds.page.records import Item, Page

MARKER, SCHEMA = "page.json", "cfpage/1"
"""The file by which a page's folder is known, and what it says."""
_ASSETS = ("page.css", "page.js")
_NAMES = {"index.html", "data", "pictures", MARKER, *_ASSETS}
_CHUNK_ITEMS, _CHUNK_BYTES = 32, 1 << 18
_MOST_PICTURES = 256  # that are decoded before the next item is asked for
_MOST_VALUES = 200  # of a filter
_OTHER = "(all others)"
_SEARCHED = 1000  # characters of an item's texts


@dataclass(frozen=True)
class Written:
    """What a page holds. ``problems`` are the pictures that it could not show, with the reason."""

    folder: Path
    num_items: int
    num_pictures: int
    problems: dict[Path, str]

    def _repr_html_(self) -> str:
        """The page itself, in a notebook: whatever serves the notebook serves the folder too, if it is below it."""
        source = html.escape(f"{os.path.relpath(self.folder)}/index.html", quote=True)
        style = "width: 100%; height: 820px; border: 1px solid #8884; border-radius: 6px"
        return f'<iframe src="{source}" style="{style}" title="groups"></iframe>'


def refuse_foreign_folder(out: Path) -> Path:
    """The absolute path of the folder that a page is to be written to, or written to again.

    Raises ConfigError for a link, a file, the current folder or one around it, and a folder that holds anything that is no part of a page.
    """
    remedy = "name another folder with --out"
    final = Path(os.path.abspath(out))
    refuse_link(final, remedy)
    refuse_link(aside_of(final), "remove it")
    if Path.cwd().is_relative_to(final.resolve()):
        raise ConfigError(f"{out} is the current folder, or around it, and would be replaced as a whole; {remedy}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{out} is a file, and a page is a folder; {remedy}")
    entries = sorted(os.listdir(final)) if final.is_dir() else []
    foreign = [name for name in entries if name not in _NAMES]
    if foreign or (entries and MARKER not in entries):
        raise ConfigError(f"{out} holds {(foreign or entries)[0]!r}, which is no part of a page, and would be replaced; {remedy}")
    return final


def write_page(
    page: Page, out: Path, *, max_pixels: int = MAX_PIXELS, say: Callable[[str], object] = lambda line: None, pool_size: int | None = None
) -> Written:
    """Write a page into a folder, in place of an earlier page there; until all of it is written, what was there stays.

    Items are asked for one by one. Memory: the pictures of a few items, and for each item its id, filters and searched text.

    Raises ConfigError as refuse_foreign_folder does, and StorageError where the folder cannot be written.
    """
    final = refuse_foreign_folder(out)
    try:
        with whole_folder(final) as folder, ThreadPoolExecutor(pool_size or cores_per_rank()) as pool:
            copies, index = Copies(folder, max_pixels), _Index()
            (folder / "data").mkdir()
            progress = Progress(say, "page", page.total, "groups")
            for number, chunk in enumerate(_chunks(page.items, copies, pool, index, progress)):
                _write(folder / "data" / f"chunk-{number:05d}.js", f"cfvlmPage.chunk({number}, [\n{','.join(chunk)}]);\n")
            _write(folder / "data" / "index.js", f"cfvlmPage.index({as_script(index.content(page))});\n")
            _write(folder / "data" / "search.js", f"cfvlmPage.search({as_script(index.searched)});\n")
            for name in _ASSETS:
                _write(folder / name, _asset(name))
            _write(folder / "index.html", string.Template(_asset("index.html")).substitute(title=html.escape(printable(page.title))))
            _write(folder / MARKER, json.dumps({"schema": SCHEMA, "items": len(index.rows)}) + "\n")
    except OSError as error:
        raise StorageError(f"{unwritten(out, error)}; what was there is unchanged; name another folder with --out") from error
    return Written(final, len(index.rows), len(copies), copies.problems)


def as_script(value: Any) -> str:
    """A value as a JavaScript literal that is also safe within HTML. Nothing in it is a key that the data chose: ``__proto__`` is one that
    JavaScript gives a meaning."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    """JSON has no word for a number that is not finite; the page shows these as they are named."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _chunks(items: Iterable[Item], copies: Copies, pool: ThreadPoolExecutor, index: _Index, progress: Progress) -> Iterator[list[str]]:
    """The items' content, in lists of a bounded size, of which each is one file."""
    chunk: list[str] = []
    number = size = 0
    for batch in _batches(items):
        seen = copies.look((picture for item in batch for image in item.images for picture in image.pictures), pool)
        for item in batch:
            text = as_script(item_content(item, seen, copies.problems))
            if chunk and (len(chunk) == _CHUNK_ITEMS or size + len(text) > _CHUNK_BYTES):
                yield chunk
                chunk, size, number = [], 0, number + 1
            chunk.append(text)
            size += len(text)
            index.add(item, number)
            progress.advance()
    if chunk:
        yield chunk


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """A few items at a time, whose pictures are decoded side by side and compared."""
    batch: list[Item] = []
    pictures = 0
    for item in items:
        batch.append(item)
        pictures += sum(len(image.pictures) for image in item.images)
        if len(batch) == _CHUNK_ITEMS or pictures >= _MOST_PICTURES:
            yield batch
            batch, pictures = [], 0
    if batch:
        yield batch


@dataclass
class _Index:
    """What the page knows of all its items from the start: where each is, what it is filtered and ordered by."""

    rows: list[tuple[int, str, float | None, dict[str, list[str]]]] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, item: Item, chunk: int) -> None:
        values = {name: [printable(value) for value in dict.fromkeys(values)] for name, values in item.filters.items()}
        for name, each in values.items():
            self.counts.setdefault(name, Counter()).update(each)
        worst = min((table.worst for table in item.scores if table.worst is not None), default=None)
        self.rows.append((chunk, printable(item.id), worst, values))
        texts = " ".join([item.id, *(text.text[:_SEARCHED] for text in item.texts)])
        self.searched.append(" ".join(texts[:_SEARCHED].lower().split()))

    def content(self, page: Page) -> dict[str, Any]:
        """The filters, their values by frequency, and a row for each item that names values by their numbers."""
        places: list[dict[str, int]] = []
        filters = []
        for name, counts in self.counts.items():
            common = [value for value, _ in counts.most_common(_MOST_VALUES)]
            rest = sum(counts.values()) - sum(counts[value] for value in common)
            places.append({value: place for place, value in enumerate(common)})
            filters.append(
                {"name": printable(name), "values": [[value, counts[value]] for value in common] + [[_OTHER, rest]] * bool(rest)}
            )
        rows = []
        for chunk, name, worst, values in self.rows:
            named = [
                sorted({known.get(v, len(known)) for v in values.get(key, ())}) for key, known in zip(self.counts, places, strict=True)
            ]
            rows.append([chunk, name, worst, named])
        return {
            "title": printable(page.title),
            "facts": [[printable(part) for part in fact] for fact in page.facts],
            "scored": printable(page.scored),
            "filters": filters,
            "rows": rows,
        }


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    with create(path) as file:
        file.write(text.encode())
