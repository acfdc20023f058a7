"""Pictures that are there: edited ones in a folder by their ids, real ones that `mine` has found; and text alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.text import one_line
from cfvlm_ds.counterfactuals.edit.base import EditContext, Picture, Refused, Task, picture_by_id
from cfvlm_ds.data.decoding import open_image


class Folder:
    """The editor ``folder``: FOLDER/SOURCE/NUMBER.png is the edited picture of the edit SOURCE/NUMBER; one without is not its own."""

    varies, threads = False, 1

    def __init__(self, context: EditContext) -> None:
        self._folder = Path(context.options.folder)
        if not context.options.folder or not self._folder.is_dir():
            raise ConfigError(f"--with folder needs --folder, the folder of edited pictures; {context.options.folder!r} is none")

    def settings(self) -> Mapping[str, Any]:
        return {"version": 1}

    def takes(self, task: Task) -> bool:
        return picture_by_id(self._folder, task.id) is not None

    def edit(self, task: Task) -> Picture | Refused | None:
        path = picture_by_id(self._folder, task.id)
        if path is None:
            return Refused("no such file")
        try:
            return Picture(open_image(path))
        except DataError as error:
            return Refused(one_line(str(error), 300))


class TextAlone:
    """The editor ``none``: the edit stays one of the text."""

    varies, threads = False, 1

    def __init__(self, context: EditContext | None = None) -> None:
        pass

    def settings(self) -> Mapping[str, Any]:
        return {}

    def takes(self, task: Task) -> bool:
        return True

    def edit(self, task: Task) -> Picture | Refused | None:
        return None
