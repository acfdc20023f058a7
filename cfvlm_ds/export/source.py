"""An export's source: the tensors in a model folder, and the model that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.models import load_config
from cfvlm_ds.models.model_files import INDEX, SINGLE, explained, header, read_index, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Saved:
    """A tensor on disk: its file, shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def skeleton(source: str) -> Any:
    """Build the model of ``source`` on the meta device, to read its weight names, shapes, tied weights and conversions."""
    from transformers import AutoModelForImageTextToText

    config = load_config(source)
    impossible = f"no model can be built from the configuration of {source!r}", "use the model from which the checkpoint was trained"
    with explained(*impossible), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)


def read_saved(folder: Path, model: Any) -> tuple[dict[str, Saved], dict[str, Any]]:
    """Return the tensors to export, keyed by name, and the metadata of the source's index.

    They are the tensors of the source's safetensors files, in order. If there are no such files, they are the tensors that transformers
    would save for the source's configuration, in one file.
    """
    if files := weight_files(folder):
        return read_headers(folder, files), {} if files == [SINGLE] else read_index(folder / INDEX, ".safetensors")[1]
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
    largest_first = sorted(state.items(), key=lambda entry: -entry[1].dtype.itemsize)  # keeps every tensor aligned
    return {name: Saved(SINGLE, tuple(tensor.shape), tensor.dtype) for name, tensor in largest_first}, {}


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, Saved]:
    stored: dict[str, Saved] = {}
    for file in files:
        for name, (shape, dtype) in header(folder / file).items():
            if dtype not in DTYPES:
                raise ConfigError(f"{folder / file} stores {name} as {dtype}, which cannot be exported; use another source")
            if name in stored:
                raise ConfigError(f"{folder / file} and {stored[name].file} both store {name}; download the model again")
            stored[name] = Saved(file, shape, DTYPES[dtype])
    return stored
