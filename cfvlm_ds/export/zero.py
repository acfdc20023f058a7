"""What a ZeRO checkpoint holds: every weight as parts of the ranks' files, read in blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.checkpoint import read_states
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.untrusted import refuse_foreign
from cfvlm_ds.models.stored import explained

BLOCK = 1 << 23  # elements read, cast and written at a time
_MAPPED = 64 << 20  # bytes read before the files are mapped again, at least


@dataclass(frozen=True)
class Part:
    """Elements ``start`` to ``stop`` of a flattened tensor, which is found in a file of the checkpoint by ``keys``."""

    file: str
    keys: tuple[str | int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """A weight as the parts that make it up, end to end; what the last ones hold beyond its size is padding."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class ZeroWeights:
    """The weights of a ZeRO-1, 2 or 3 checkpoint by their names in the model, read from the ranks' files when asked for.

    DeepSpeed's zero_to_fp32 defines the layout and finds the files. Its lazy mode is lazy for the trained weights of ZeRO-3 only: it loads
    every frozen weight, and under ZeRO-2 concatenates all trained ones; under ZeRO-1 it has no frozen weights at all.
    """

    def __init__(self, checkpoint: Path) -> None:
        from deepspeed.utils.zero_to_fp32 import get_model_state_files, get_optim_files

        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._read = 0
        try:
            optimizer, states = get_optim_files(str(checkpoint)), get_model_state_files(str(checkpoint))
        except FileNotFoundError as error:
            raise ConfigError(f"{checkpoint} is no ZeRO checkpoint ({error}); name another one") from error
        for file in (*optimizer, *states):
            refuse_foreign(Path(file), checkpoint)
        self._mapped = max(_MAPPED, sum(os.path.getsize(file) for file in optimizer) // 512)  # at most 512 times
        self.weights: dict[str, Weight] = {}
        self.trained: set[str] = set()
        with explained(f"{checkpoint} cannot be read", "name another checkpoint"):
            self._find(optimizer, states)

    def _find(self, optimizer: list[str], states: list[str]) -> None:
        checkpoint = self._checkpoint
        zero = self._tree(optimizer[0])["optimizer_state_dict"]
        ranks = zero["partition_count"]
        if (expected := max(ranks) if isinstance(ranks, list) else ranks) != len(optimizer):
            raise ConfigError(f"{checkpoint} was written by {expected} ranks and holds the shards of {len(optimizer)}; name another one")
        state = self._tree(states[0])
        partitioned = int(zero["zero_stage"]) == 3
        if partitioned:
            weights = self._stage_3(optimizer, state["param_shapes"])
        else:
            weights = self._stage_1_or_2(optimizer, state["param_shapes"], zero.get("param_alignment_paddings"))
        self.trained = {_own(name) for name in weights}
        for name, shape in (state.get("frozen_param_shapes") or {}).items():
            files = states if partitioned else states[:1]
            parts = [Part(file, ("frozen_param_fragments", name), 0, math.ceil(shape.numel() / len(files))) for file in files]
            weights[name] = Weight(tuple(shape), tuple(parts))
        for alias, name in state["shared_params"].items():
            if name in weights:
                weights[alias] = weights[name]
        # The module holds buffers; outside ZeRO-3 all weights too, and under ZeRO-1 it alone has the frozen ones.
        for name in state["buffer_names"] if partitioned else state["module"]:
            tensor = state["module"][name]
            weights.setdefault(name, Weight(tuple(tensor.shape), (Part(states[0], ("module", name), 0, tensor.numel()),)))
        self.weights = {_own(name): weight for name, weight in weights.items()}

    def _stage_3(self, files: list[str], groups: list[dict[str, torch.Size]]) -> dict[str, Weight]:
        """Every weight is cut into one part per rank, padded to equal sizes; a rank's parts follow each other through its flat tensors."""
        sizes = [flat.numel() for flat in self._tree(files[0])["optimizer_state_dict"]["fp32_flat_groups"]]
        weights, offset = {}, 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            end = offset + math.ceil(shape.numel() / len(files))
            pieces = list(_cut(offset, end, sizes))
            parts = [Part(file, ("optimizer_state_dict", "fp32_flat_groups", i), a, b) for file in files for i, a, b in pieces]
            weights[name] = Weight(tuple(shape), tuple(parts))
            offset = end
        if offset != sum(sizes):
            raise ConfigError(f"{self._checkpoint}: the weights take {offset} elements of each rank's {sum(sizes)}; name another one")
        return weights

    def _stage_1_or_2(self, files: list[str], groups: list[Any], paddings: list[list[int]] | None) -> dict[str, Weight]:
        """The weights of a group follow each other in one flat tensor, of which every rank has an equal part."""
        key = "single_partition_of_fp32_groups"
        weights = {}
        for group, shapes in enumerate(groups):
            sizes = [self._tree(file)["optimizer_state_dict"][key][group].numel() for file in files]
            offset = 0
            for position, (name, shape) in enumerate(shapes.items()):
                end = offset + shape.numel()
                parts = [Part(files[i], ("optimizer_state_dict", key, group), a, b) for i, a, b in _cut(offset, end, sizes)]
                weights[name] = Weight(tuple(shape), tuple(parts))
                offset = end + (paddings[group][position] if paddings else 0)
            if not 0 <= sum(sizes) - offset < 2 * len(files):  # the end is padded to a multiple of twice the number of ranks
                raise ConfigError(f"{self._checkpoint}: the weights take {offset} of {sum(sizes)} elements; name another one")
        return weights

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The weight as flat pieces, end to end. Each is a view of a mapped file and must not be kept."""
        left = math.prod(self.weights[name].shape)
        for part in self.weights[name].parts:
            for start in range(part.start, part.stop, BLOCK):
                # The pages of a mapping count as this process's memory from the first time that they are read.
                if self._read > self._mapped:
                    self._open.clear()
                    self._read = 0
                tensor = self._tree(part.file)
                for key in part.keys:
                    tensor = tensor[key]
                block = tensor.detach().reshape(-1)[start : min(start + BLOCK, part.stop, start + left)]
                left -= block.numel()
                self._read += block.nbytes
                yield block

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        whole = torch.empty(self.weights[name].shape, dtype=dtype)
        offset, flat = 0, whole.reshape(-1)
        for block in self.blocks(name):
            flat[offset : offset + block.numel()] = block
            offset += block.numel()
        return whole

    def _tree(self, file: str) -> Any:
        """A file's contents, its tensors mapped."""
        if file not in self._open:
            self._open[file] = read_states(file, mmap=True)
        return self._open[file]


def _own(name: str) -> str:
    return name.removeprefix("model.")  # the Scorer holds the model as .model


def _cut(start: int, stop: int, sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(index, start, stop) of the pieces that ``start`` to ``stop`` has in tensors of these sizes laid end to end."""
    before = 0
    for index, size in enumerate(sizes):
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            yield index, first, last
        before += size
