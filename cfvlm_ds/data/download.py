"""Picture download: pictures that rows name by URL, or contain as base64 text, are written to files before training.

No other module fetches pictures over the network. The size and download time of each picture are limited, and the downloaded file must be
an image. The file's name is a hash of the picture's URL, so a second run fetches only missing pictures.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.http import call
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import new_output, refuse_link
from cfvlm_ds.data.containers.open import open_rows
from cfvlm_ds.data.convert import list_of_skipped, list_skipped
from cfvlm_ds.data.decoding import MAX_PIXELS, image_size
from cfvlm_ds.data.manifest import local_path

MAX_DOWNLOAD = 64 << 20
"""Maximum size of a picture in bytes."""
TIMEOUT_S, WHOLE_S, ATTEMPTS, PAUSE_S = 20.0, 120.0, 3, 1.0
"""Limits for one picture: seconds without a response, total seconds, number of attempts, and seconds before the second attempt."""
COLUMNS = {
    "image", "images", "image_url", "url", "image_0", "image_1", "image_path", "img_path", "rejected_image", "rejected_images",
    "negative_image", "negative_images",
}  # fmt: skip
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 256  # rows whose pictures are fetched concurrently


class Downloaded(NamedTuple):
    """Number of rows written, number of distinct pictures, and the reason for each row that was left out."""

    rows: int
    pictures: int
    problems: list[str]


def download(
    path: Path,
    out: Path,
    on_error: Literal["error", "skip"] = "error",
    threads: int = 16,
    say: Say = no_op,
) -> Downloaded:
    """Write the rows of ``path`` to ``out``, and their pictures to the folder ``OUT.pictures`` next to it. The written rows contain the
    paths of these files instead of URLs.

    If a row's pictures cannot be fetched and ``on_error`` is ``skip``, the row is left out and listed in a file next to ``out``. If
    ``on_error`` is ``error``, DataError is raised. Raises ConfigError or StorageError if ``out`` exists or cannot be written.
    """
    folder = out.with_name(f"{out.name}.pictures")
    refuse_link(folder, "name another file with --out")
    new_output(out, path)
    listed = list_of_skipped(out)
    count, files, problems = 0, set[str](), list[str]()
    with whole_file(out) as file, ThreadPoolExecutor(threads) as pool:
        path = local_path(path, progress=say)
        rows = open_rows(path, progress=say)
        progress = Progress(say, f"pictures of {path}", len(rows), "rows")
        for first in range(0, len(rows), _CHUNK):
            chunk = [(rows.where(row), rows.value(row)) for row in range(first, min(first + _CHUNK, len(rows)))]
            named = [_addresses(row) for _, row in chunk]
            wanted = dict.fromkeys(address for addresses in named for address in addresses)
            fetched = dict(zip(wanted, pool.map(lambda address: _fetched(address, folder), wanted), strict=True))
            progress.advance(len(chunk))
            for (where, row), addresses in zip(chunk, named, strict=True):
                failed = next((error for address in addresses if isinstance(error := fetched[address], DataError)), None)
                if isinstance(row, DataError) or failed is not None:
                    problems.append(str(row) if failed is None else f"{where}: {failed}")
                    if on_error == "error":
                        raise DataError(f"{problems[0]} (or skip such rows with --on_error skip)")
                    continue
                files.update(str(fetched[address]) for address in addresses)
                file.write(json.dumps(_with_files(row, fetched.__getitem__), ensure_ascii=False).encode() + b"\n")
                count += 1
    list_skipped(listed, problems, say)
    return Downloaded(count, len(files), problems)


def _addresses(row: Any) -> list[str]:
    """Return the picture URLs in a row, including data URLs."""
    addresses = list[str]()
    _with_files(row, addresses.append)
    return addresses


def _with_files(value: Any, file: Callable[[str], Any], key: str = "") -> Any:
    """Return a copy of a row in which each picture URL is replaced with ``file(URL)``."""
    if isinstance(value, Mapping):
        return {name: _with_files(item, file, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_files(item, file, key) for item in value]
    is_address = isinstance(value, str) and key in COLUMNS and value.startswith(("http://", "https://", "data:image/"))
    return file(value) if is_address else value


def _fetched(address: str, folder: Path) -> str | DataError:
    """Fetch a picture into ``folder`` unless its file exists. Return the file's path relative to the folder's parent, or the error."""
    file = folder / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
    try:
        if not file.is_file():
            content = _of_text(address) if address.startswith("data:") else _of_network(address)
            folder.mkdir(exist_ok=True)
            replace(unchecked := file.with_suffix(".unchecked"), content)
            try:
                image_size(unchecked, MAX_PIXELS)
            except DataError as error:
                raise DataError("the file is not a picture within the limits; check the address, or leave the row out") from error
            finally:
                unchecked.unlink()
            replace(file, content)
        return f"{folder.name}/{file.name}"
    except DataError as error:
        return DataError(f"{quoted(address, 80)}: {error}")
    except OSError as error:
        return DataError(f"{quoted(address, 80)}: its file {file} cannot be written ({error.strerror or error})")


def _of_text(address: str) -> bytes:
    kind, _, text = address.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError("not in base64")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError(f"the picture stored in the row cannot be decoded ({error}); write the row again") from error


def _of_network(address: str) -> bytes:
    headers = {"User-Agent": "cfvlm-ds data download"}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            reply = call(address, headers, silence_s=TIMEOUT_S, whole_s=WHOLE_S, most_bytes=MAX_DOWNLOAD, follow=True)
            if reply.status < 300:
                return reply.content
            why, again = f"the server replied {reply.status} {reply.reason}", reply.status in _AGAIN
        except (OSError, ValueError, http.client.HTTPException) as error:
            why, again = str(getattr(error, "reason", error)) or type(error).__name__, not isinstance(error, ValueError)
        if not again or attempt == ATTEMPTS:
            raise DataError(f"cannot be fetched ({why}); check the address, or leave the row out")
        time.sleep(attempt * PAUSE_S)
    raise AssertionError
