"""Which group goes to which rank and micro-batch: deterministic, resumable, and the same for every world size.

The stream of a run is one epoch after another, each a permutation of all groups that depends on (seed, epoch) alone. With
B = groups_per_micro_batch * gradient_accumulation_steps * world_size, an optimizer step takes the next B elements of the stream, across
epoch borders: no batch is short and no group is dropped. Element j of those B goes to

    micro-batch j // (groups_per_micro_batch * world_size)    of rank (j // groups_per_micro_batch) % world_size

so the groups of a step depend on B and the position only, not on how B is factorised.

PackedSampler fills micro-batches by tokens instead: the number of groups varies, the work of a micro-batch hardly varies.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.data.mixture import Order


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
        order: Order | None = None,
    ) -> None:
        """Raises DataError if there are no groups, ValueError on a size below 1 or a rank outside the world.

        ``order`` is that of a mixture's groups, or of rows of several groups; without it they are one data set, in an order by ``seed``.
        """
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
        self.order = order or Order((num_groups,), (), seed)
        self.samples_seen = 0

    @property
    def epoch(self) -> float:
        """Consumed passes over the data."""
        return self.samples_seen / self.order.length

    def epochs_by_source(self) -> list[float]:
        """Consumed passes over each source of a mixture."""
        return self.order.epochs(self.samples_seen)

    def advance(self) -> None:
        """Count one optimizer step as consumed."""
        self.samples_seen += self.groups_per_step

    def steps(self) -> Iterator[list[list[int]]]:
        """Of each step from the consumed position on the micro-batches of all ranks, of which ``self.rank`` has every ``world_size``-th.
        Never ends."""
        start, size = self.samples_seen, self.groups_per_micro_batch
        while True:
            step = self.order.at(start, self.groups_per_step)
            yield [step[first : first + size] for first in range(0, len(step), size)]
            start += len(step)

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches of this rank from the consumed position on: ``gradient_accumulation_steps`` of them make a step. Never ends."""
        for step in self.steps():
            yield from step[self.rank :: self.world_size]

    def num_steps(self, num_epochs: float, say: Callable[[str], object] = lambda line: None) -> int:
        """Optimizer steps until every group has been seen so many times."""
        return -(-_groups_in(num_epochs, self.order.length) // self.groups_per_step)

    def groups_in(self, num_steps: int) -> int:
        """Return how many groups so many optimizer steps take."""
        return num_steps * self.groups_per_step

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must be equal for it to mean the same place in the same stream."""
        return {"samples_seen": self.samples_seen, **self.order.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position. World size, accumulation and micro-batch may differ from those of the saved run: it counts groups.

        Raises DataError if the state is of other data (num_groups) or another order (seed).
        """
        for name, value in {"order": None, **self.order.identity()}.items():
            if state.get(name) != value:
                raise DataError(
                    f"the checkpoint's sampler has {name} {state.get(name)!r} and this run has {value!r}; resume with the data and seed of "
                    "the saved run, or start a new run"
                )
        self.samples_seen = state["samples_seen"]


@dataclass(frozen=True)
class _Position:
    """How far the stream has been read, and which of its groups wait for a micro-batch with room for them."""

    read: int = 0
    waiting: tuple[int, ...] = ()


class PackedSampler(GroupSampler):
    """Micro-batches of whole groups, as many as fit ``max_tokens``; every rank of a step has about as many tokens as every other.

    A step has one micro-batch per rank and accumulation step. Groups are taken in the order of the stream and put where they leave the
    least room (best fit). A group that fits nowhere waits for the next step, where it comes first. The step is full when ``_WINDOW`` groups
    wait, or when the stream comes to a group that already waits: in a small data set the others would otherwise be seen again and again
    meanwhile. Then the fullest and the emptiest micro-batch exchange groups until they are balanced. No group is lost or repeated, the
    numbers of times that two groups were seen differ by at most two, and the order depends only on data, seed, limit and the number of
    micro-batches of a step.
    """

    def __init__(
        self,
        *,
        tokens: Sequence[int] | npt.NDArray[np.int32],
        max_tokens: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        order: Order | None = None,
    ) -> None:
        """``tokens`` of every group. Raises ValueError if one is larger than ``max_tokens``, and as GroupSampler does."""
        super().__init__(
            num_groups=len(tokens),
            groups_per_micro_batch=1,
            gradient_accumulation_steps=gradient_accumulation_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
            order=order,
        )
        self.tokens: npt.NDArray[np.int32] = np.asarray(tokens, np.int32)
        if (most := int(self.tokens.max())) > max_tokens:
            raise ValueError(f"group {int(self.tokens.argmax())} has {most} tokens, over max_tokens ({max_tokens})")
        self.max_tokens = max_tokens
        self._position = _Position()

    def advance(self) -> None:
        """Count one optimizer step as consumed."""
        _, self._position = self._pack(self._position)
        self.samples_seen = self._position.read - len(self._position.waiting)

    def steps(self) -> Iterator[list[list[int]]]:
        """As GroupSampler's."""
        position = self._position
        while True:
            bins, position = self._pack(position)
            yield self._balance(bins)

    def num_steps(self, num_epochs: float, say: Callable[[str], object] = lambda line: None) -> int:
        """Optimizer steps until every group has been seen so many times.

        To see up to ``_COUNTED`` groups the steps are counted. For more than that, those of the first ``_TRIED`` are, and the others are
        taken to hold as many tokens each: packing keeps steps full, so that the number is off by less than one in a thousand. It is the
        same for every start, and nobody waits for a whole epoch to be packed before the first step.
        """
        wanted = _groups_in(num_epochs, self.order.length)
        counted = wanted if wanted <= _COUNTED else min(wanted, _TRIED)
        position, steps, tokens = _Position(), 0, 0
        progress = Progress(say, "packing, to count the steps", counted, "groups")
        while position.read - len(position.waiting) < counted:
            bins, position = self._pack(position)
            tokens, steps = tokens + sum(int(self.tokens[group]) for each in bins for group in each), steps + 1
            progress.advance(sum(map(len, bins)))
        if counted == wanted:
            return steps
        return math.ceil(Fraction(steps * wanted, tokens) * self.order.mean(self.tokens))

    def groups_in(self, num_steps: int) -> int:
        """Return about how many groups so many optimizer steps take, by the mean length of a group."""
        return int(num_steps * self.groups_per_step * self.max_tokens / self.tokens.mean())

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must be equal for it to mean the same place in the same stream."""
        return {**super().state_dict(), "waiting": list(self._position.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to a saved position; raises DataError as GroupSampler does, and for the state of a run that did not pack."""
        super().load_state_dict(state)
        if (waiting := state.get("waiting")) is None:
            raise DataError("the checkpoint's sampler did not pack; resume without data.max_tokens_per_micro_batch, or start a new run")
        self._position = _Position(self.samples_seen + len(waiting), tuple(waiting))

    def _pack(self, position: _Position) -> tuple[list[list[int]], _Position]:
        """The micro-batches of the step at ``position``, and the position after it."""
        bins: list[list[int]] = [[] for _ in range(self.groups_per_step)]
        room = [(self.max_tokens, b) for b in range(len(bins))]  # sorted
        read, waiting, queue = position.read, list[int](), list(reversed(position.waiting))
        ahead: list[int] = []
        while len(waiting) < _WINDOW:
            if queue:
                group = queue.pop()
            else:
                ahead = ahead or self.order.at(read, _AHEAD)[::-1]
                if (group := ahead.pop()) in waiting:
                    break
                read += 1
            tokens = int(self.tokens[group])
            best = bisect.bisect_left(room, (tokens, 0))
            if best == len(room):
                waiting.append(group)
                continue
            left, chosen = room.pop(best)
            bins[chosen].append(group)
            bisect.insort(room, (left - tokens, chosen))
        return bins, _Position(read, (*waiting, *reversed(queue)))

    def _balance(self, bins: list[list[int]]) -> list[list[int]]:
        """Exchange groups between the fullest and the emptiest micro-batch while that brings them closer; returns the fullest first."""
        ranked = sorted((int(self.tokens[each].sum()), b) for b, each in enumerate(bins))
        while True:
            (least, emptiest), (most, fullest) = ranked[0], ranked[-1]
            bins[emptiest].sort(key=self.tokens.__getitem__)
            given, taken = self.tokens[bins[fullest]].tolist(), [0, *self.tokens[bins[emptiest]].tolist()]
            if (swap := find_best_swap(given, taken, most - least)) is None:
                return [bins[b] for _, b in reversed(ranked)]
            i, j = swap
            back = [bins[emptiest].pop(j - 1)] if j else []
            bins[emptiest].append(bins[fullest].pop(i))
            bins[fullest] += back
            moved = given[i] - taken[j]
            ranked = ranked[1:-1]
            bisect.insort(ranked, (least + moved, emptiest))
            bisect.insort(ranked, (most - moved, fullest))


def find_best_swap(given: list[int], taken: list[int], gap: int) -> tuple[int, int] | None:
    """Find the places of the tokens whose exchange leaves the smallest ``gap``; None where no exchange makes it smaller.

    ``taken`` is sorted and starts with 0, the exchange for nothing. The best exchange moves half the gap.
    """
    best = gap, 0, 0
    for i, tokens in enumerate(given):
        at = bisect.bisect_left(taken, tokens - gap / 2)
        best = min(best, *((abs(gap - 2 * (tokens - taken[j])), i, j) for j in (at - 1, at) if 0 <= j < len(taken)))
    return None if best[0] == gap else best[1:]


_COUNTED, _TRIED = 1 << 18, 1 << 16  # groups whose steps are counted, or tried: seconds, or a fraction of one
_AHEAD = 64  # groups that are asked for at once
_WINDOW = 32  # groups that may wait: enough to fill gaps, few enough that the order stays that of the stream


def _groups_in(num_epochs: float, num_groups: int) -> int:
    """Groups that a run sees in so many epochs, rounded up. ``num_epochs`` is the decimal number that was written: 0.29 of 100 is 29,
    though the float is less; and n / num_groups, rounded as floats are, is n groups."""
    whole = round(num_epochs * num_groups)
    return whole if whole / num_groups == num_epochs else math.ceil(Fraction(repr(float(num_epochs))) * num_groups)
