"""Which group goes to which rank and micro-batch: deterministic, resumable, and the same for every world size.

The stream of a run is one epoch after another, each a permutation of all groups that depends on (seed, epoch) alone. With
B = groups_per_micro_batch * gradient_accumulation_steps * world_size, an optimizer step takes the next B elements of the stream, across
epoch borders: no batch is short and no group is dropped. Element j of those B goes to

    micro-batch j // (groups_per_micro_batch * world_size)    of rank (j // groups_per_micro_batch) % world_size

so the groups of a step depend on B and the position only, not on how B is factorised.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cfvlm_ds.groups import DataError


class GroupSampler:
    """Endless micro-batches of group indices for one rank; usable as a DataLoader's ``batch_sampler``.

    A DataLoader fetches ahead of the loop, so the position is not what was yielded but what was consumed: the loop calls advance() once
    per optimizer step, and a new iteration starts at the consumed position. There, ``samples_seen`` counts groups over all ranks.
    """

    def __init__(
        self,
        *,
        num_groups: int,
        groups_per_micro_batch: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Raises DataError if there are no groups, ValueError on a size below 1 or a rank outside the world."""
        if num_groups < 1:
            raise DataError("the data has no groups to sample; check the manifest")
        if min(groups_per_micro_batch, gradient_accumulation_steps, world_size) < 1:
            raise ValueError(
                f"groups_per_micro_batch ({groups_per_micro_batch}), gradient_accumulation_steps ({gradient_accumulation_steps}) and "
                f"world_size ({world_size}) must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        self.num_groups = num_groups
        self.groups_per_micro_batch = groups_per_micro_batch
        self.groups_per_step = groups_per_micro_batch * gradient_accumulation_steps * world_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.samples_seen = 0

    @property
    def epoch(self) -> float:
        """Consumed passes over the data."""
        return self.samples_seen / self.num_groups

    def advance(self) -> None:
        """Count one optimizer step as consumed."""
        self.samples_seen += self.groups_per_step

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches of this rank from the consumed position on: ``gradient_accumulation_steps`` of them make a step. Never ends."""
        start = self.samples_seen + self.rank * self.groups_per_micro_batch
        while True:
            yield self._stream(start, self.groups_per_micro_batch)
            # Steps are whole multiples of this stride, so one stride serves within a step and from one step to the next.
            start += self.groups_per_micro_batch * self.world_size

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must be equal for it to mean the same place in the same stream."""
        return {"samples_seen": self.samples_seen, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position. World size, accumulation and micro-batch may differ from those of the saved run: it counts groups.

        Raises DataError if the state is of other data (num_groups) or another order (seed, shuffle), or is not a sampler's state.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"the checkpoint's sampler has {name} {state.get(name)!r} and this run has {value!r}; resume with the data and seed of "
                    "the saved run, or start a new run"
                )
        position = state.get("samples_seen")
        if type(position) is not int or position < 0:
            raise DataError(
                f"the checkpoint's sampler has samples_seen {position!r}, not a count of groups; resume from another checkpoint"
            )
        self.samples_seen = position

    def _identity(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "seed": self.seed, "shuffle": self.shuffle}

    def _stream(self, start: int, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(start + len(indices), self.num_groups)
            stop = offset + count - len(indices)
            if self.shuffle:
                indices += _permutation(self.num_groups, self.seed, epoch)[offset:stop].tolist()
            else:
                indices += range(offset, min(stop, self.num_groups))
        return indices


@functools.lru_cache(maxsize=2)  # the epoch in progress and the one that prefetching has reached
def _permutation(num_groups: int, seed: int, epoch: int) -> torch.Tensor:
    """[num_groups] int64. CPU generator whatever the default device, and seeds hashed so that (0, 1) and (1, 0) are unrelated."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randperm(num_groups, generator=generator, device="cpu")
