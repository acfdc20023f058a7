"""Editors that create no picture. ``folder`` takes edited pictures from a folder, and ``none`` edits only the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task, opened, picture_by_id
from cfvlm_ds.counterfactuals.options import EditOptions


class Folder(Editor):
    """Editor ``folder``: uses the file FOLDER/SOURCE/NUMBER.png for the edit with the id SOURCE/NUMBER. It accepts an edit only if the file
    exists.
    """

    def __init__(self, options: EditOptions) -> None:
        self._folder = Path(options.folder)
        if not options.folder or not self._folder.is_dir():
            raise ConfigError(f"--with folder needs --folder, the folder of edited pictures; {options.folder!r} is not a folder")

    def takes(self, task: Task) -> bool:
        return picture_by_id(self._folder, task.id) is not None

    def edit(self, task: Task) -> Picture | Refused | None:
        path = picture_by_id(self._folder, task.id)
        return Refused("no such file") if path is None else opened(path, str(path))


class TextAlone(Editor):
    """Editor ``none``: only the text is edited."""

    def settings(self) -> Mapping[str, Any]:
        return {}
