"""Editors that obtain pictures from outside the package: from a folder, or from a command that runs once per picture. These pictures are
checked like any untrusted file. The editor ``none`` edits only the text.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task, opened, picture_by_id
from cfvlm_ds.counterfactuals.options import EditOptions


def png(image: Image.Image) -> bytes:
    """Encode a picture as PNG without metadata."""
    image.info.clear()
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=3)
    return content.getvalue()


class Folder(Editor):
    """Editor ``folder``: uses the file FOLDER/SOURCE/NUMBER.png (or .jpg, .jpeg, .webp) for the edit with the id SOURCE/NUMBER. It accepts
    an edit only if this file exists.
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
    """Editor ``none``: edits only the text."""

    def settings(self) -> Mapping[str, Any]:
        return {}


class Command(Editor):
    """Editor ``command``: runs a command line in which ``{request}`` stands for a JSON file with the picture's path and the instruction,
    and ``{output}`` for the file that the command must write.

    Text from a model or a data row is never inserted into the command line.
    """

    varies = True

    def __init__(self, options: EditOptions) -> None:
        self._command, self._timeout_s, self.threads = options.command, options.timeout_s, options.threads
        try:
            self._words = shlex.split(options.command)
        except ValueError as error:
            raise ConfigError(f"--command {options.command!r}: {str(error).lower()}; correct its quotation marks") from error
        if not self._words or not all(any(place in word for word in self._words) for place in ("{request}", "{output}")):
            raise ConfigError(f"--command {options.command!r} must contain {{request}} and {{output}}; add them")

    def settings(self) -> Mapping[str, Any]:
        return {"version": 1, "command": self._command}

    def edit(self, task: Task) -> Picture | Refused | None:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            request, output = folder / "request.json", folder / "output"
            image = task.image()
            (folder / "image.png").write_bytes(png(image))
            task_json: dict[str, Any] = {
                "id": task.id, "type": task.type, "caption": task.caption, "text": task.text, "from": task.source_words,
                "to": task.target_words, "instruction": task.instruction, "seed": task.seed, "width": image.width, "height": image.height,
                "image": str(folder / "image.png"),
            }  # fmt: skip
            if (mask := task.mask_image(image.size)) is not None:
                (folder / "mask.png").write_bytes(png(mask))
                task_json["mask"] = str(folder / "mask.png")
            request.write_text(json.dumps(task_json))
            command_line = [word.replace("{request}", str(request)).replace("{output}", str(output)) for word in self._words]
            problem = self._run(command_line, folder / "errors")
            if not problem and not output.is_file():
                problem = "the command wrote no picture to {output}"
            return Refused(problem) if problem else opened(output, "the command's picture")

    def _run(self, words: list[str], errors: Path) -> str:
        """Run the command. Return the reason for a failure, or "" on success. If the command takes too long, kill it and its child
        processes.
        """
        with open(errors, "w+b") as error_output:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=error_output, start_new_session=True
                )
            except OSError as error:
                raise ConfigError(f"--command {words[0]}: cannot be started ({error.strerror}); correct it") from error
            try:
                code = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                return f"the command took more than {self._timeout_s:g} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            error_output.seek(max(0, error_output.seek(0, os.SEEK_END) - 400))
            return f"the command exited with code {code}: {error_output.read().decode('utf-8', 'replace')}" if code else ""
