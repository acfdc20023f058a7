"""Safetensors files that are written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.export.source import DTYPE_NAMES, Saved
from cfvlm_ds.models.model_files import INDEX, SINGLE


class Files:
    """Safetensors files whose tensors can be written in any order. All offsets are computed in advance from names, shapes and dtypes."""

    def __init__(self, folder: Path, saved: Mapping[str, Saved], say: Say, alive: Alive = no_op) -> None:
        self._folder, self._saved, self._alive = folder, saved, alive
        self._starts: dict[str, int] = {}
        self._progress = Progress(say, "export", sum(tensor.nbytes for tensor in saved.values()) / 1e9, "GB")
        for file in {tensor.file: None for tensor in saved.values()}:
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name, tensor in saved.items():
                if tensor.file == file:
                    begin, end = end, end + tensor.nbytes
                    header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
                    self._starts[name] = begin
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with create(folder / file) as handle:
                handle.write(len(text).to_bytes(8, "little") + text)
                handle.truncate(8 + len(text) + end)
            for name in header.keys() - {"__metadata__"}:
                self._starts[name] += 8 + len(text)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write a tensor, given as flat blocks, in the source's dtype. Raises ConfigError if its size differs from the source's."""
        tensor = self._saved[name]
        remaining = tensor.nbytes
        with open(self._folder / tensor.file, "r+b") as handle:
            handle.seek(self._starts[name])
            for block in blocks:
                block = block.to(tensor.dtype)
                if (remaining := remaining - block.nbytes) < 0:
                    break
                handle.write(block.view(torch.uint8).numpy().data)
                self._alive()
                self._progress.advance(block.nbytes / 1e9)
        if remaining:
            raise ConfigError(
                f"the source stores {name} with shape {list(tensor.shape)}, unlike the trained weight; download the model again"
            )


def write_index(folder: Path, saved: Mapping[str, Saved], metadata: Mapping[str, Any]) -> None:
    """Write the model's index, which maps tensors to files and states the total size in bytes. A model in a single file has no index."""
    if {tensor.file for tensor in saved.values()} == {SINGLE}:
        return
    total = sum(tensor.nbytes for tensor in saved.values())
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": {name: tensor.file for name, tensor in sorted(saved.items())}}
    with create(folder / INDEX) as handle:
        handle.write((json.dumps(index, indent=2) + "\n").encode())
