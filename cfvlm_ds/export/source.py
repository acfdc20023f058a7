"""What a model folder stores: the tensors of its safetensors, file by file, and the model they belong to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cfvlm_ds.config import ConfigError
from cfvlm_ds.models import load_config

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Saved:
    """A tensor on disk and the file it is in."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def skeleton(source: str) -> Any:
    """The model of ``source`` without any data: its names, shapes, ties and conversions."""
    from transformers import AutoModelForImageTextToText

    config = load_config(source)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32)


def read_saved(folder: Path, model: Any) -> tuple[dict[str, Saved], dict[str, Any]]:
    """What the export stores, by name and in the order within its files, and the index's metadata.

    This is what the source stores, file by file; in files of at most 5 GB where it has no index. A source without safetensors gives its
    configuration only: then it is what transformers would save.
    """
    if (folder / SINGLE).is_file():
        stored = read_headers(folder, [SINGLE])
    elif (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        return read_headers(folder, sorted(set(index["weight_map"].values()))), index.get("metadata", {})
    else:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
        stored = {name: Saved(SINGLE, tuple(t.shape), t.dtype) for name, t in state.items()}
    return _in_shards(stored), {}


def read_headers(folder: Path, files: Iterable[str]) -> dict[str, Saved]:
    found = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for name in handle.offset_keys():
                    part = handle.get_slice(name)
                    found[name] = Saved(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / file} cannot be read ({error}); repair the source") from error
        except KeyError as error:
            raise ConfigError(f"{folder / file} stores {name} as {error}, which is no dtype to export to; name another source") from None
    return found


def _in_shards(stored: Mapping[str, Saved]) -> dict[str, Saved]:
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in stored.items()}
    files = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB")
    return {
        name: Saved(file, stored[name].shape, stored[name].dtype)
        for file, names in files.filename_to_tensors.items()
        for name in sorted(names, key=lambda name: -stored[name].dtype.itemsize)  # keeps every tensor aligned
    }
