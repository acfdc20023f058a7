"""Checks of untrusted file names and links, and of output paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cfvlm_ds.core.errors import ConfigError, writing
from cfvlm_ds.core.files import aside_of, whole_folder
from cfvlm_ds.core.reading import MALFORMED, open_regular

_LONGEST_NAME = 255  # bytes, the limit of file systems


def bare_name(name: Any, source: Path | str, ending: str = "") -> str:
    """Return ``name`` if it is a file name, not a path. Otherwise, raise a ConfigError that names ``source``, the file that contains the
    name.

    A file name is not empty, ``.`` or ``..``. It contains only printable characters, contains no path separator of any operating system,
    and ends in ``ending``.
    """
    text = name if isinstance(name, str) else ""
    is_plain = text not in ("", ".", "..") and not {"/", "\\"} & {*text} and text.isprintable()
    if not is_plain or len(text.encode("utf-8", "surrogatepass")) > _LONGEST_NAME or not text.endswith(ending):
        what = f"the plain name of a file{ending and f' that ends in {ending}'}, and only files of the folder itself are read"
        raise ConfigError(f"{source}: {str(name)[:300]!r} is not {what}; correct it, or download the folder again")
    return text


def own_file(folder: Path, name: Any, source: Path | str) -> Path:
    """Return the path of a file in ``folder``, given its file name or relative path ``name``. Raises ConfigError for any other name, and
    for a link that leads out of the folder.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    path = folder.joinpath(*(bare_name(part, source) for part in parts))
    refuse_foreign(path, folder)
    return path


def refuse_foreign(path: Path, folder: Path) -> None:
    """Raise ConfigError if ``path`` is outside ``folder`` after links are resolved.

    A snapshot in a hub cache is allowed to link to the cache's ``blobs`` folder. That folder must not be a link itself, because the author
    of the snapshot could choose its target.
    """
    try:
        target, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ConfigError(f"{path} cannot be resolved ({error}); put the file itself there") from error
    blobs = [inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else []
    if not any(target.is_relative_to(allowed) for allowed in (inside, *blobs)):
        raise ConfigError(f"{path} leads to {target}, outside its folder; put the file itself there")


def refuse_link(path: Path, remedy: str) -> None:
    """Raise ConfigError if ``path`` is a link: nothing is written through a link, and no link is replaced."""
    if path.is_symlink():
        raise ConfigError(f"{path} is a link to {os.readlink(path)}, and links are never written through; {remedy}")


def output_file(path: Path, *inputs: str | Path, option: str = "--out") -> Path:
    """Check the path of an output file, create its folder, and return the path.

    Raises ConfigError if ``path`` is one of the ``inputs``, a link, or something else that is not a file, and StorageError if it cannot be
    written.
    """
    refuse_link(path, f"name the file itself with {option}")
    if path.exists() and any(Path(source).exists() and path.samefile(source) for source in inputs):
        raise ConfigError(f"{path} is an input and would be overwritten; name another output file")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} exists and is not a file; name a file with {option}")
    with writing(path, f"name another file with {option}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def new_output(path: Path, *inputs: str | Path) -> Path:
    """Like ``output_file``, but also raises ConfigError if the file exists, because a file in a common format might belong to the user."""
    output_file(path, *inputs)
    if path.exists():
        raise ConfigError(f"{path} already exists and would be overwritten; remove it, or name another file with --out")
    return path


def refuse_filled(folder: Path, except_for: Collection[str] = ()) -> None:
    """Raise ConfigError if a folder to be replaced is a link or a file, or has entries whose names are not in ``except_for``."""
    refuse_link(folder, remedy := "name another folder")
    if folder.exists() and (not folder.is_dir() or any(each.name not in except_for for each in folder.iterdir())):
        raise ConfigError(f"{folder} already exists, is not empty and would be replaced; {remedy}")


def refuse_replacing(
    folder: Path,
    marker: str,
    needed: Iterable[Path] = (),
    remedy: str = "name another folder with --out",
    names: Collection[str] | None = None,
) -> Path:
    """Return the resolved path of a folder that can be replaced because it is new, empty, or of the same kind (it has the file ``marker``).

    Raises ConfigError for any other folder, for a link or file, for a folder that contains the working directory or a path in ``needed``,
    and, if ``names`` is given, for a folder with an entry that is not in ``names``.
    """
    refuse_link(folder, remedy)
    final = folder.resolve()
    refuse_link(aside_of(final), "remove it")
    for path in (*needed, Path.cwd()):
        if path.is_relative_to(final):
            raise ConfigError(f"{folder} contains {path}, which is in use and would be replaced; {remedy}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder; {remedy}")
    entries = sorted(os.listdir(final)) if final.is_dir() else []
    foreign = [name for name in entries if names is not None and name not in names]
    if foreign or (entries and marker not in entries):
        raise ConfigError(f"{folder} contains other files, such as {(foreign or entries)[0]!r}, which would be lost; {remedy}")
    return final


@contextmanager
def replaced(folder: Path, marker: str, needed: Iterable[Path] = (), names: Collection[str] | None = None) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` at the end of the block.

    Raises the same errors as ``refuse_replacing``. Within the block, an OSError becomes a StorageError.
    """
    final = refuse_replacing(folder, marker, needed, names=names)
    with writing(folder, "its previous contents are unchanged; name another folder with --out"), whole_folder(final) as partial:
        yield partial


def own_output(path: Path, ours: Callable[[IO[bytes]], bool], writer: str, *inputs: str | Path) -> Path:
    """Like ``output_file``, but also raises ConfigError if the file exists, unless it is empty or was written by ``writer``.

    ``ours`` must return True for a file written by ``writer``. For any other file, it must return False or raise one of the ``MALFORMED``
    errors.
    """
    output_file(path, *inputs)
    if path.exists() and path.stat().st_size > 0:
        try:
            with open_regular(path) as handle:
                known = ours(handle)
        except (StopIteration, *MALFORMED):
            known = False
        if not known:
            raise ConfigError(f"{path} already exists and was not written by {writer}; name another file with --out")
    return path
