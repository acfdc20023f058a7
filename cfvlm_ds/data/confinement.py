"""Path confinement: the paths of a manifest, work folder or benchmark must lead into its data roots, with all links resolved."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.data.picture_file import picture_file

_OF_DATA = "add the folder that contains it to data.root, a folder or a list of folders (cfvlm-ds: repeat --root), or correct the path"


class Confinement:
    """Callable that joins a path of a manifest to a data root. Raises DataError if the file, with links resolved, is outside all roots.

    A relative path is joined to the first root that has the file, or to the first root if none has it. ``remedy`` is the end of the message
    about a path outside the roots.
    """

    def __init__(self, roots: Sequence[Path], remedy: str = _OF_DATA) -> None:
        self.roots, self._remedy = roots, remedy
        self._resolved_roots = [root.resolve() for root in roots]
        self._file = functools.lru_cache(_KEPT)(self._confined)  # neighbouring rows often share a picture or container

    def __call__(self, path: Path) -> Path:
        file = picture_file(path)
        full = self._file(file)
        return full if file is path else full.with_name(full.name + path.name[len(file.name) :])

    def _confined(self, file: Path) -> Path:
        """Return the path of a picture's file, joined to a root. Raises DataError if it is outside all roots."""
        if not file.name:
            raise DataError(f"image path is empty; write the file's path, relative to the data root {self.roots[0]} or absolute")
        joined = [root / file for root in self.roots]
        full = joined[0] if len(joined) == 1 else next(filter(os.path.lexists, joined), joined[0])
        try:
            target = full.resolve()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise DataError(f"image path {str(file)!r} cannot be resolved ({error}); correct it") from error
        if not any(target.is_relative_to(root) for root in self._resolved_roots):
            roots = ", ".join(map(str, self.roots))
            raise DataError(f"image path {str(file)!r} leads outside the data roots {roots} (to {target}); {self._remedy}")
        return target if ".." in file.parts else full  # ".." after a link leads elsewhere


_KEPT = 4096  # cached files
