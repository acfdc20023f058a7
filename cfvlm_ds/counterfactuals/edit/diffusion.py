"""Editor that runs pipelines of the diffusers library. A pipeline that accepts a mask inpaints the picture. One that accepts a picture but
no mask follows an editing instruction. Any other pipeline generates a new picture from the text.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from cfvlm_ds.core.errors import ConfigError, is_failure
from cfvlm_ds.core.reading import parse_yaml
from cfvlm_ds.core.versions import version
from cfvlm_ds.counterfactuals.edit.base import Editor, Picture, Refused, Task
from cfvlm_ds.counterfactuals.options import EditOptions, pairs

_MULTIPLE = 32  # pixels; every known pipeline accepts pictures whose sides are multiples of this number
OLDEST = "0.42.1"
"""Oldest supported version, as in pyproject.toml. Versions before 0.38 run code from a pipeline's folder. Versions before this one import
any module that the folder names.
"""


class Diffusers(Editor):
    """Editor ``diffusers``: runs a diffusion pipeline. Each batch has one picture, because results depend on the batch size."""

    varies = True

    def __init__(self, options: EditOptions) -> None:
        try:
            import diffusers
            import torch
            from packaging.version import Version
        except ImportError as error:
            raise ConfigError(
                "--with diffusers needs the package diffusers, which is not installed; run pip install 'cfvlm-ds[edit]' (Python 3.11 or "
                "later)"
            ) from error
        if Version(diffusers.__version__) < Version(OLDEST):
            raise ConfigError(
                f"diffusers {diffusers.__version__} may run code from a pipeline's folder; run pip install 'diffusers>={OLDEST}'"
            )
        if not options.model:
            raise ConfigError("--with diffusers needs --model, the folder or hub name of a pipeline")
        self._torch = torch
        from cfvlm_ds.core.distributed import own_device, usual_dtype

        device = own_device()
        self._device, dtype = device.type, usual_dtype(device)
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                options.model, torch_dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            self.pipe = pipe.to(self._device)
        except Exception as error:  # for example, the folder contains no pipeline
            if not is_failure(error):
                raise
            raise ConfigError(f"--model {options.model} is not a diffusers pipeline ({type(error).__name__}: {error})") from error
        self.pipe.set_progress_bar_config(disable=True)
        with contextlib.suppress(AttributeError):
            self.pipe.safety_checker = None
        self._model, self._dtype = options.model, str(dtype).removeprefix("torch.")
        self._taken = set(inspect.signature(self.pipe.__call__).parameters)
        self._given = call_options(options.options)
        for name in self._given:
            if name not in self._taken:
                raise ConfigError(
                    f"--options {name}: {type(self.pipe).__name__} has no such argument; its arguments are {', '.join(sorted(self._taken))}"
                )
        self.kind = "inpaint" if "mask_image" in self._taken else "instruct" if "image" in self._taken else "regenerate"

    def settings(self) -> Mapping[str, Any]:
        return {
            "pipeline": type(self.pipe).__name__, "model": self._model, "kind": self.kind, "diffusers": version("diffusers"),
            "torch": version("torch"), "device": self._device, "dtype": self._dtype, "options": dict(self._given), "batch": 1,
        }  # fmt: skip

    def takes(self, task: Task) -> bool:
        return self.kind != "inpaint" or task.mask is not None

    def edit(self, task: Task) -> Picture | Refused | None:
        image = task.image()
        padded = _padded(image)
        arguments: dict[str, Any] = {
            "prompt": task.instruction if self.kind == "instruct" else task.text,
            "image": padded,
            "height": padded.height,
            "width": padded.width,
            "generator": self._torch.Generator("cpu").manual_seed(task.seed),
        }
        if self.kind == "inpaint":
            mask = task.mask_image(image.size)
            arguments["mask_image"] = None if mask is None else _padded(mask)
        with self._torch.no_grad():
            edited = self.pipe(**{name: value for name, value in arguments.items() if name in self._taken}, **self._given).images[0]
        if not isinstance(edited, Image.Image) or edited.size != padded.size:
            size = getattr(edited, "size", "none")
            return Refused(f"the pipeline returned a picture of another size ({size} instead of {padded.size})")
        return Picture(edited.convert("RGB").crop((0, 0, *image.size)))


def _padded(image: Image.Image) -> Image.Image:
    """Repeat a picture's last row and column until its sides are multiples of ``_MULTIPLE``, so that pipelines accept it."""
    pixels = np.asarray(image)
    sides = [(0, -side % _MULTIPLE) for side in pixels.shape[:2]]
    return Image.fromarray(np.pad(pixels, [*sides, (0, 0)][: pixels.ndim], "edge"))


def call_options(text: str) -> dict[str, Any]:
    """Parse ``NAME=VALUE,...``. Values are numbers, booleans or strings. Raises ConfigError if ``text`` is malformed."""
    options: dict[str, Any] = pairs(text, "--options", "num_inference_steps=28")
    for name, value in options.items():
        with contextlib.suppress(ValueError):
            options[name] = parse_yaml(value)
    return options
