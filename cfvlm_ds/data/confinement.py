"""Path confinement: each path in a manifest, work folder or benchmark must be inside a data root after symbolic links are resolved."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.picture_file import picture_file

_OF_DATA = "add the folder that contains it to data.root, a folder or a list of folders (cfvlm-ds: repeat --root), or correct the path"


class Confinement:
    """Callable that joins a path from a manifest to a data root. Raises DataError if, after links are resolved, the file is outside all
    roots.

    A relative path is joined to the first root that contains the file, or to the first root if none does. ``remedy`` is the advice at the
    end of the error message.
    """

    def __init__(self, roots: Sequence[Path], remedy: str = _OF_DATA) -> None:
        self.roots, self._remedy = roots, remedy
        self.resolved_roots = [root.resolve() for root in roots]
        self._folder = functools.lru_cache(_FOLDERS)(self._really)
        self._files: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        file = picture_file(path)
        if (full := self._files.get(file)) is None:  # neighbouring rows often share a picture or container
            full = self._confined(path, file)
        return full if file is path else full.with_name(full.name + path.name[len(file.name) :])

    def _confined(self, path: Path, file: Path) -> Path:
        if not path.name:
            raise DataError(f"image path is empty; write the file's path, relative to the data root {self.roots[0]} or absolute")
        if "\0" in str(path):
            raise DataError(f"image path {str(path)!r} is invalid (it contains a null byte); correct it")
        joined = [root / file for root in (self.roots if not file.is_absolute() else self.roots[:1])]
        full = target = (
            joined[0] if len(joined) == 1 else next((candidate for candidate in joined if os.path.lexists(candidate)), joined[0])
        )
        try:
            folder, name = os.path.split(full)
            really, inside = self._folder(folder)
            mode = mode_of(f"{really}/{name}")
            if ".." in file.parts or (mode is not None and stat.S_ISLNK(mode)):
                target, inside = self._followed(full)
                if ".." in file.parts:
                    full = Path(os.path.normpath(full))
                    if full.resolve() != target:  # ".." after a link leads elsewhere
                        full = target
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: link loop, before Python 3.13
            raise DataError(f"image path {str(path)!r} cannot be resolved ({error}); correct it") from error
        if not inside:
            roots = f"root {self.roots[0]}" if len(self.roots) == 1 else f"roots {', '.join(map(str, self.roots))}"
            raise DataError(f"image path {str(path)!r} leads outside the data {roots} (to {target.resolve()}); {self._remedy}")
        if mode is not None:  # a missing file is not cached, because it may become a link later
            if len(self._files) >= _FOLDERS:
                self._files.clear()
            self._files[file] = full
        return full

    def _really(self, folder: str) -> tuple[str, bool]:
        """Return the real path of a folder, and whether it is inside a root.

        Results are cached. Even a million images are usually in a few folders, so most need only one system call, which saves time on
        network file systems.
        """
        target, inside = self._followed(Path(folder))
        return str(target), inside

    def _followed(self, path: Path) -> tuple[Path, bool]:
        target = path.resolve()
        return target, any(target.is_relative_to(root) for root in self.resolved_roots)


def mode_of(path: str) -> int | None:
    """Return a file's mode without following links, or None if the file does not exist. Raises OSError for any other failure of lstat."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


_FOLDERS = 4096  # limit on cached folders and on cached files, because every row may have its own folder
