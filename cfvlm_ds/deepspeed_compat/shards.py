"""Layout of weights and their moments in ZeRO's checkpoint files. The export reads these files; resharding reads and writes them.

ZeRO-3 splits every weight into one part per rank, padded to equal sizes. Each rank concatenates its parts in one flat tensor per sub-group.
ZeRO-1 and 2 concatenate a group's weights, pad the end, and split the result over the ranks. Moments are laid out like their weights.

The layout is defined by DeepSpeed's script zero_to_fp32. The script itself is not used: it loads every frozen weight, concatenates all
trained weights under ZeRO-2, and does not support frozen weights under ZeRO-1. Its lazy mode saves memory only for the trained weights of
ZeRO-3.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.deepspeed_compat.checkpoint_files import read_states

Shapes = Sequence[Mapping[str, torch.Size]]
"""One mapping per flat tensor, from weight names to shapes. The weights are in the same order as in the tensor."""

_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_ZERO = "optimizer_state_dict"


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of flat tensor number ``flat`` on one rank."""

    rank: int
    flat: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Elements ``start`` to ``stop`` of a flattened tensor, which a checkpoint file stores under the nested ``keys``."""

    file: Path
    keys: tuple[str | int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Weight:
    """A weight as a sequence of parts. Elements beyond the weight's size are padding."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def layout(stage: int, shapes: Shapes, sizes: Sequence[Sequence[int]]) -> dict[str, list[Piece]]:
    """Return, for each weight, the pieces of flat tensors that hold it, in order. ``sizes`` [rank][flat tensor] holds the number of
    elements of each flat tensor. Raises ConfigError if sizes and shapes do not match.
    """
    return _partitioned(shapes, sizes) if stage == 3 else _end_to_end(shapes, sizes)


def _partitioned(shapes: Shapes, sizes: Sequence[Sequence[int]]) -> dict[str, list[Piece]]:
    pieces_of, offset, flat_sizes = {}, 0, sizes[0]  # equal on every rank
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        end = offset + math.ceil(shape.numel() / len(sizes))
        pieces = list(_cut(offset, end, flat_sizes))
        pieces_of[name] = [Piece(rank, flat, start, stop) for rank in range(len(sizes)) for flat, start, stop in pieces]
        offset = end
    if offset != sum(flat_sizes):
        raise ConfigError(f"the weights have {offset} elements per rank, but each rank's file has {sum(flat_sizes)}")
    return pieces_of


def _end_to_end(shapes: Shapes, sizes: Sequence[Sequence[int]]) -> dict[str, list[Piece]]:
    pieces_of = {}
    for flat, group in enumerate(shapes):
        of_ranks, offset = [sizes_of_rank[flat] for sizes_of_rank in sizes], 0
        for name, shape in group.items():
            end = offset + shape.numel()
            pieces_of[name] = [Piece(rank, flat, start, stop) for rank, start, stop in _cut(offset, end, of_ranks)]
            offset = end
        if not 0 <= sum(of_ranks) - offset < 2 * len(sizes):  # the end is padded to a multiple of twice the number of ranks
            raise ConfigError(f"the weights have {offset} elements, but the files have {sum(of_ranks)}")
    return pieces_of


def _cut(start: int, stop: int, sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Split the range ``start`` to ``stop`` of concatenated tensors at the tensors' boundaries. Yields (tensor index, start, stop)."""
    before = 0
    for index, size in enumerate(sizes):
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            yield index, first, last
        before += size


class Shards:
    """The files of a ZeRO-1, 2 or 3 checkpoint, memory-mapped on first use.

    Raises ConfigError if the folder is not a ZeRO checkpoint, or if the number of files differs from the number of ranks that wrote them.
    Other damage can raise any exception.
    """

    def __init__(self, folder: Path) -> None:
        self.contents = functools.cache(functools.partial(read_states, mmap=True))
        """A function that returns a file's contents with memory-mapped tensors."""
        self._optimizer, self._model = (_by_rank(folder, kind) for kind in ("optim", "model"))
        zero, self._state = self._zero(0), self.contents(self._model[0])
        ranks = zero["partition_count"]
        if (expected := max(ranks) if isinstance(ranks, list) else ranks) != len(self._optimizer):
            raise ConfigError(
                f"{folder} was written by {expected} ranks but contains {len(self._optimizer)} shards; use another checkpoint"
            )
        self._stage = int(zero["zero_stage"])
        flat3, flat12 = ("optimizer_state_dict", "fp32_flat_groups"), ("base_optimizer_state", "single_partition_of_fp32_groups")
        self._base, self._flat = flat3 if self._stage == 3 else flat12
        self._shapes: dict[str, torch.Size] = {name: shape for group in self._state["param_shapes"] for name, shape in group.items()}
        try:
            self._pieces = layout(self._stage, self._state["param_shapes"], self._sizes())
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}; use another checkpoint") from None

    @property
    def trained(self) -> set[str]:
        """Names of the weights that the optimizer holds."""
        return set(self._pieces)

    @property
    def optimizer_bytes(self) -> int:
        """Size in bytes of the files that hold the trained weights and their moments."""
        return sum(file.stat().st_size for file in self._optimizer)

    def weights(self) -> dict[str, Weight]:
        """Return all weights and buffers of the module that DeepSpeed trained, keyed by their names in the module."""
        state, weights = self._state, {}
        for name, pieces in self._pieces.items():
            parts = [Part(self._optimizer[piece.rank], (_ZERO, self._flat, piece.flat), piece.start, piece.stop) for piece in pieces]
            weights[name] = Weight(tuple(self._shapes[name]), tuple(parts))
        files = self._model if self._stage == 3 else self._model[:1]
        for name, shape in (state.get("frozen_param_shapes") or {}).items():
            parts = [Part(file, ("frozen_param_fragments", name), 0, math.ceil(shape.numel() / len(files))) for file in files]
            weights[name] = Weight(tuple(shape), tuple(parts))
        for alias, name in state["shared_params"].items():
            if name in weights:
                weights[alias] = weights[name]
        # state["module"] contains the buffers and, except under ZeRO-3, all weights. Under ZeRO-1, frozen weights are stored only there.
        for name in state["buffer_names"] if self._stage == 3 else state["module"]:
            tensor = state["module"][name]
            weights.setdefault(name, Weight(tuple(tensor.shape), (Part(self._model[0], ("module", name), 0, tensor.numel()),)))
        return weights

    def flat(self, part: Part) -> Tensor:
        """Return the flattened tensor that a part belongs to, as a view of the memory-mapped file."""
        tensor = self.contents(part.file)
        for key in part.keys:
            tensor = tensor[key]
        return tensor.detach().reshape(-1)

    def resharded(self, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield (name, contents) for each file that rank ``rank`` needs in a run with ``ranks`` ranks. All values are preserved exactly.

        ``shapes`` and ``sizes`` describe that rank's engine, as returned by ``flat_tensors``.
        """
        prefix = f"zero_pp_rank_{rank}_"
        first, model = self._optimizer[0], self._model[0]
        yield _RANK.sub(prefix, first.name), {**self.contents(first), _ZERO: self._optimizer_of(rank, ranks, shapes, sizes)}
        # Entries that are not partitioned are the same in every file, so each rank can copy them from a different one.
        state = {**self.contents(self._model[rank % len(self._model)]), "dp_world_size": ranks}
        if self._stage == 3:
            yield _RANK.sub(prefix, model.name), {**state, "frozen_param_fragments": self._frozen_of(state, rank, ranks)}
        elif rank == 0:
            yield model.name, state

    def _zero(self, rank: int) -> Any:
        return self.contents(self._optimizer[rank])[_ZERO]

    def _sizes(self) -> list[list[int]]:
        """Return each flat tensor's number of elements, as [rank][flat tensor]. Under ZeRO-3, all ranks have equal sizes, so only the first
        rank's file is opened.
        """
        ranks = [0] if self._stage == 3 else range(len(self._optimizer))
        sizes = [[flat.numel() for flat in self._zero(rank)[self._flat]] for rank in ranks]
        return sizes * len(self._optimizer) if self._stage == 3 else sizes

    def _optimizer_of(self, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int]) -> dict[str, Any]:
        old, new = self._zero(0), layout(self._stage, shapes, [list(sizes)] * ranks)

        def flat(index: int, moment: str | None) -> Tensor:
            filled = torch.zeros(sizes[index])
            for name in shapes[index]:
                first = 0
                for piece in new[name]:
                    last, position = first + piece.stop - piece.start, piece.start
                    for block in self._elements(name, moment, first, last) if piece.rank == rank else ():
                        filled[position : position + block.numel()] = block
                        position += block.numel()
                    first = last
            return filled

        state, owners = {}, []
        for index, names in enumerate(shapes):
            owners.append(group := self._pieces[next(iter(names))][0].flat)
            entry = old[self._base]["state"][group]
            # Copied, because two sub-groups that were split from one would otherwise share the tensor that counts their steps.
            state[index] = {
                key: flat(index, key) if torch.is_tensor(value) and value.dim() else copy.deepcopy(value) for key, value in entry.items()
            }
        # A ZeRO-3 sub-group belongs to the optimizer group of its weights. The number of sub-groups depends on the number of ranks.
        groups = [
            {**group, "params": [index for index, owner in enumerate(owners) if owner in group["params"]]}
            for group in old[self._base]["param_groups"]
        ]
        weights = [flat(index, None) for index in range(len(shapes))]
        count = old["partition_count"]
        count = [ranks] * len(count) if isinstance(count, list) else ranks
        return {**old, "partition_count": count, self._base: {"state": state, "param_groups": groups}, self._flat: weights}

    def _elements(self, name: str, moment: str | None, start: int, stop: int) -> Iterator[Tensor]:
        """Yield elements ``start`` to ``stop`` of a weight or its ``moment``, one block per piece, without padding."""
        stop, first = min(stop, self._shapes[name].numel()), 0
        for piece in self._pieces[name]:
            last = first + piece.stop - piece.start
            if max(start, first) < min(stop, last):
                zero = self._zero(piece.rank)
                tensor = zero[self._flat][piece.flat] if moment is None else zero[self._base]["state"][piece.flat][moment]
                yield tensor.detach()[piece.start + max(start, first) - first : piece.start + min(stop, last) - first]
            first = last

    def _frozen_of(self, state: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Tensor] | None:
        """Return the part of each frozen weight that ZeRO-3 assigns to a rank."""
        if state["frozen_param_fragments"] is None:
            return None
        fragments = [self.contents(file)["frozen_param_fragments"] for file in self._model]
        parts = {}
        for name, shape in state["frozen_param_shapes"].items():
            part = math.ceil(shape.numel() / ranks)
            weight = torch.cat([fragment[name].reshape(-1) for fragment in fragments])[: shape.numel()]
            own = weight[part * rank : part * (rank + 1)]
            parts[name] = torch.cat([own, own.new_zeros(part - own.numel())])
        return parts


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """Return the files of one kind, ordered by rank. Raises ConfigError if there are none."""
    files = list(folder.glob(f"*_{kind}_states.pt"))
    if not files:
        raise ConfigError(f"{folder} is not a ZeRO checkpoint (no *_{kind}_states.pt); use another checkpoint")
    return sorted(files, key=lambda file: int(match[1]) if (match := _RANK.search(file.name)) else 0)
