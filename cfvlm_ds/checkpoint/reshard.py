"""A checkpoint of one number of ranks resharded for another: the same values of weights and moments, bit for bit.

ZeRO-3 cuts every weight into one part per rank, padded to equal sizes; a rank's parts follow each other in flat tensors, one per sub-group.
ZeRO-1 and 2 lay the weights of a group end to end, pad the end and cut that. Moments lie as their weights do. What is cut is read where it
lies, from mapped files, and every rank writes its own new files only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create
from cfvlm_ds.core.untrusted import refuse_foreign

Shapes = Sequence[Mapping[str, torch.Size]]
"""Name -> shape of the trained weights, one mapping per flat tensor, in the order in which they lie there."""

Reader = Callable[[Path], dict[str, Any]]

_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def reshard(source: Path, target: Path, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int], read: Reader) -> None:
    """Write the files of ``rank`` of ``ranks`` into ``target``, a folder that DeepSpeed then loads as its own.

    ``shapes`` is the engine's layout of the new run, and ``sizes`` the elements of this rank's flat tensors; ``read`` maps a file. Raises
    ConfigError when the checkpoint's weights are not this run's.
    """
    optimizer, model = _by_rank(source, "optim"), _by_rank(source, "model")
    states = [read(file)["optimizer_state_dict"] for file in optimizer]
    state = read(model[rank % len(model)])  # what is not cut is alike, but for the random state, of which every rank needs one
    lies = _Weights(states, state["param_shapes"])
    if lies.names != {name for group in shapes for name in group}:
        raise ConfigError(f"{source} trained other weights than this run does; restore model.*.tuning or choose another output_dir")
    new = lies.cut(rank, ranks, shapes, sizes)
    own = _RANK.sub(f"zero_pp_rank_{rank}_", optimizer[0].name)
    with create(target / own) as handle:
        torch.save({**read(optimizer[0]), "optimizer_state_dict": new}, handle)
    if lies.stage == 3:
        state = {**state, "frozen_param_fragments": _frozen([read(file) for file in model], state, rank, ranks)}
    elif rank:
        return
    with create(target / _RANK.sub(f"zero_pp_rank_{rank}_", model[0].name)) as handle:
        torch.save({**state, "dp_world_size": ranks}, handle)


def _by_rank(folder: Path, kind: str) -> list[Path]:
    files = list(folder.glob(f"*_{kind}_states.pt"))
    for file in files:
        refuse_foreign(file, folder)
    return sorted(files, key=lambda file: int(match[1]) if (match := _RANK.search(file.name)) else 0)


class _Weights:
    """The trained weights of a checkpoint, and their moments, by name, as pieces of the ranks' flat tensors."""

    def __init__(self, states: Sequence[dict[str, Any]], shapes: Shapes) -> None:
        self.states = states
        self.stage = int(states[0]["zero_stage"])
        self.base, self.flat = (
            ("optimizer_state_dict", "fp32_flat_groups") if self.stage == 3 else ("base_optimizer_state", "single_partition_of_fp32_groups")
        )
        if any(any(padding) for padding in states[0].get("param_alignment_paddings") or ()):
            raise ConfigError("zero_optimization.parameter_alignment ties a checkpoint to its number of ranks; start as many as wrote it")
        self.place: dict[str, tuple[int, int, int]] = {}  # group, offset in its flat tensor (ZeRO-3: in each rank's), elements
        for group, names in enumerate(shapes):
            offset = 0
            for name, shape in names.items():
                self.place[name] = group, offset, shape.numel()
                offset += -(-shape.numel() // len(states)) if self.stage == 3 else shape.numel()

    @property
    def names(self) -> set[str]:
        return set(self.place)

    def cut(self, rank: int, ranks: int, shapes: Shapes, sizes: Sequence[int]) -> dict[str, Any]:
        """The optimizer state of one of ``ranks`` ranks."""
        old = self.states[0]
        state, owners = {}, []
        for index, (names, size) in enumerate(zip(shapes, sizes, strict=True)):
            owners.append(group := self.place[next(iter(names))][0])
            entry = old[self.base]["state"][group]
            # Copies, because two sub-groups that were one would go on to count their steps in the same tensor.
            state[index] = {
                key: self._flat(rank, ranks, key, names, size) if torch.is_tensor(value) and value.dim() else copy.deepcopy(value)
                for key, value in entry.items()
            }
        # A sub-group of ZeRO-3 belongs to the optimizer's group of its weights, and how many there are depends on the number of ranks.
        groups = [
            {**group, "params": [index for index, owner in enumerate(owners) if owner in group["params"]]}
            for group in old[self.base]["param_groups"]
        ]
        weights = [self._flat(rank, ranks, None, names, size) for names, size in zip(shapes, sizes, strict=True)]
        count = old["partition_count"]
        count = [ranks] * len(count) if isinstance(count, list) else ranks
        return {**old, "partition_count": count, self.base: {"state": state, "param_groups": groups}, self.flat: weights}

    def _flat(self, rank: int, ranks: int, key: str | None, names: Mapping[str, torch.Size], size: int) -> Tensor:
        """This rank's flat tensor of the weights, or of the moments ``key``: what lies in its part of each of ``names``, or of them all."""
        flat, filled, before = torch.zeros(size), 0, 0
        for name in names:
            numel = self.place[name][2]
            if self.stage == 3:
                part = -(-numel // ranks)
                start, stop = min(part * rank, numel), min(part * (rank + 1), numel)
                room = part
            else:
                start, stop = max(size * rank - before, 0), min(size * (rank + 1) - before, numel)
                room = max(stop - start, 0)
            position = filled
            for piece in self._pieces(name, key, start, stop):
                flat[position : position + piece.numel()] = piece
                position += piece.numel()
            filled, before = filled + room, before + numel
        return flat

    def _pieces(self, name: str, key: str | None, start: int, stop: int) -> Iterator[Tensor]:
        """Elements ``start`` to ``stop`` of a weight, from the ranks that have them."""
        group, offset, numel = self.place[name]
        before = 0
        for state in self.states:
            tensor = state[self.flat][group] if key is None else state[self.base]["state"][group][key]
            if self.stage == 3:
                part = -(-numel // len(self.states))
                first, last, shift = max(start - before, 0), min(stop - before, part), offset
                before += part
            else:
                first, last, shift = max(start + offset - before, 0), min(stop + offset - before, tensor.numel()), 0
                before += tensor.numel()
            if first < last:
                yield tensor.detach()[shift + first : shift + last]


def _frozen(states: Sequence[Mapping[str, Any]], state: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Tensor] | None:
    """The parts of the frozen weights that ZeRO-3 gives to this rank."""
    if state["frozen_param_fragments"] is None:
        return None
    fragments = [each["frozen_param_fragments"] for each in states]
    parts = {}
    for name, shape in state["frozen_param_shapes"].items():
        part = -(-shape.numel() // ranks)
        whole = torch.cat([each[name].reshape(-1) for each in fragments])[: shape.numel()]
        own = whole[part * rank : part * (rank + 1)]
        parts[name] = torch.cat([own, own.new_zeros(part - own.numel())])
    return parts
