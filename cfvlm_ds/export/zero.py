"""Weights of a ZeRO checkpoint, keyed by their names in the model and read in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cfvlm_ds.deepspeed_compat.shards import Shards, Weight
from cfvlm_ds.models.model_files import explained

BLOCK = 1 << 23  # number of elements that are read, cast and written at a time
_MAPPED = 64 << 20  # minimum number of bytes to read before the files are mapped again


class ZeroWeights:
    """Weights of a ZeRO-1, 2 or 3 checkpoint, keyed by their names in the model and read from the ranks' files on access."""

    def __init__(self, checkpoint: Path) -> None:
        with explained(f"{checkpoint} cannot be read", "use another checkpoint"):
            self._shards = Shards(checkpoint)
            self.weights: dict[str, Weight] = {_own(name): weight for name, weight in self._shards.weights().items()}
        self.trained = {_own(name) for name in self._shards.trained}
        self._mapped = max(_MAPPED, self._shards.optimizer_bytes // 512)  # remapped at most 512 times
        self._read = 0

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a weight in flat consecutive blocks. Each block is a view of a mapped file and is valid only until the next block is
        requested.
        """
        remaining = math.prod(self.weights[name].shape)
        for part in self.weights[name].parts:
            for start in range(part.start, part.stop, BLOCK):
                # Mapped pages that have been read count as this process's memory.
                if self._read > self._mapped:
                    self._shards.contents.cache_clear()
                    self._read = 0
                block = self._shards.flat(part)[start : min(start + BLOCK, part.stop, start + remaining)]
                remaining -= block.numel()
                self._read += block.nbytes
                yield block

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = torch.empty(self.weights[name].shape, dtype=dtype)
        offset, flat = 0, weight.reshape(-1)
        for block in self.blocks(name):
            flat[offset : offset + block.numel()] = block
            offset += block.numel()
        return weight


def _own(name: str) -> str:
    return name.removeprefix("model.")  # the model is the Scorer's attribute ``model``
