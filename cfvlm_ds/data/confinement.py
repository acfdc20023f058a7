"""Where the paths of a manifest, a work folder or a benchmark may lead: into its data roots, whoever wrote it and whatever is a link."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.picture_file import file_name, picture_file

_OF_DATA = (
    "add the folder that holds it to data.root, which may be a list of folders (cfvlm-ds: --root, once for each), or correct the path"
)


class Confinement:
    """The file that a path of a manifest leads to, links followed, must be inside one of the data roots; else DataError.

    A relative path is joined to the first root that has such a file, or to the first of all. ``remedy`` ends the sentence about a path
    that leads elsewhere.
    """

    def __init__(self, roots: Sequence[Path], remedy: str = _OF_DATA) -> None:
        self.roots, self._remedy = roots, remedy
        self.resolved_roots = [root.resolve() for root in roots]
        self._folder = functools.lru_cache(_FOLDERS)(self._really)
        self._containers: dict[str, Path] = {}
        self._files: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        if (found := self._files.get(path)) is not None:  # rows that follow one another often show one picture
            return found
        if self._containers and (known := self._containers.get(_container(path))) is not None:
            return known / path
        if not path.name:
            raise DataError(f"image path is empty; write the file's path, relative to the data root {self.roots[0]} or absolute")
        if "\0" in str(path):
            raise DataError(f"image path {str(path)!r} cannot be followed (it has a null byte); correct it")
        joined = [root / path for root in (self.roots if not path.is_absolute() else self.roots[:1])]
        full = joined[0] if len(joined) == 1 else next((each for each in joined if os.path.lexists(picture_file(each))), joined[0])
        target = full
        try:
            folder, name = os.path.split(full)
            really, inside = self._folder(folder)
            mode = mode_of(f"{really}/{file_name(name)}")
            if ".." in path.parts or (mode is not None and stat.S_ISLNK(mode)):
                target, inside = self._followed(picture_file(full))
                if ".." in path.parts:
                    full = Path(os.path.normpath(full))
                    if picture_file(full).resolve() != target:  # after a link it leads elsewhere than its letters say
                        full = target.with_name(target.name + name[len(file_name(name)) :])
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise DataError(f"image path {str(path)!r} cannot be followed ({error}); correct it") from error
        if not inside:
            roots = f"root {self.roots[0]}" if len(self.roots) == 1 else f"roots {', '.join(map(str, self.roots))}"
            raise DataError(f"image path {str(path)!r} leads outside the data {roots} (to {target.resolve()}); {self._remedy}")
        if full in joined and (container := _container(path)) and os.path.lexists(picture_file(full)):
            if len(self._containers) >= _FOLDERS:
                self._containers.clear()
            self._containers[container] = self.roots[joined.index(full)]
        if mode is not None:  # what is not there yet may become a link
            if len(self._files) >= _FOLDERS:
                self._files.clear()
            self._files[path] = full
        return full

    def _really(self, folder: str) -> tuple[str, bool]:
        """Where a folder really is, and whether that is inside a root. A million images sit in few folders: resolving each of those once
        leaves one system call per image on a network file system."""
        target, inside = self._followed(Path(folder))
        return str(target), inside

    def _followed(self, path: Path) -> tuple[Path, bool]:
        target = path.resolve()
        return target, any(target.is_relative_to(root) for root in self.resolved_roots)


def _container(path: Path) -> str:
    """The path of the file that a picture is a part of, as it is written; nothing for a file of its own. Some tars have the pictures of
    all rows: where each is, is asked once."""
    name = path.name
    inner = file_name(name)
    return "" if inner == name else str(path)[: len(inner) - len(name)]


def mode_of(path: str) -> int | None:
    """Return the mode of a file, not of what a link leads to; None where there is none. Raises OSError as lstat does."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


_FOLDERS = 4096  # and containers and files, that are remembered: a million rows may also have a folder each
