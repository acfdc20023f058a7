"""Samplers: assignment of groups to ranks and micro-batches. The assignment is deterministic, resumable and independent of the world size.

The stream of a run is a sequence of epochs. Each epoch is a permutation of all groups that depends only on (seed, epoch). With B =
groups_per_micro_batch * gradient_accumulation_steps * world_size, an optimizer step takes the next B elements of the stream, even across
epochs, so no batch is short and no group is dropped. Element j of a step goes to

    micro-batch j // (groups_per_micro_batch * world_size)    of rank (j // groups_per_micro_batch) % world_size

The groups of a step therefore depend only on B and the position, not on the factors of B.

PackedSampler instead fills each micro-batch up to a token limit. Its micro-batches have different numbers of groups but similar numbers of
tokens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.progress import Progress, Say, no_op
from cfvlm_ds.data.mixture import Order


class GroupSampler:
    """Sampler that endlessly yields one rank's micro-batches of group indices. It can serve as a DataLoader's ``batch_sampler``.

    Because a DataLoader prefetches, the position counts consumed groups, not yielded groups. The training loop calls advance() once per
    optimizer step, and a new iteration starts at the consumed position. ``samples_seen`` is the number of groups consumed by all ranks
    together.
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
        """Create the sampler of one rank.

        ``order`` is needed for a mixture, and for a data set whose rows have several groups. If it is None, the groups form one data set,
        permuted with ``seed``.
        """
        self.num_groups = num_groups
        self.groups_per_micro_batch = groups_per_micro_batch
        self.groups_per_step = groups_per_micro_batch * gradient_accumulation_steps * world_size
        self.rank = rank
        self.world_size = world_size
        self.order = order or Order((num_groups,), (), seed)
        self.samples_seen = 0

    @property
    def epoch(self) -> float:
        """Number of passes over the data so far."""
        return self.samples_seen / self.order.length

    def advance(self) -> None:
        """Advance the consumed position by one optimizer step."""
        self.samples_seen += self.groups_per_step

    def steps(self) -> Iterator[list[list[int]]]:
        """Endlessly yield the micro-batches of all ranks, step by step, from the consumed position on. In a step, micro-batch k belongs to
        rank k % ``world_size``.
        """
        start, size = self.samples_seen, self.groups_per_micro_batch
        while True:
            step = self.order.at(start, self.groups_per_step)
            yield [step[first : first + size] for first in range(0, len(step), size)]
            start += len(step)

    def __iter__(self) -> Iterator[list[int]]:
        """Endlessly yield this rank's micro-batches, ``gradient_accumulation_steps`` per step, from the consumed position on."""
        for step in self.steps():
            yield from step[self.rank :: self.world_size]

    def num_steps(self, num_epochs: float, say: Say = no_op) -> int:
        """Return the number of optimizer steps in ``num_epochs`` epochs, rounded up."""
        return -(-_groups_in(num_epochs, self.order.length) // self.groups_per_step)

    def groups_in(self, num_steps: int) -> int:
        """Return the number of groups in ``num_steps`` optimizer steps."""
        return num_steps * self.groups_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return the consumed position and everything that determines the stream of groups."""
        return {"samples_seen": self.samples_seen, **self.order.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position. World size, accumulation and micro-batch size may have changed, because the position counts groups.

        Raises DataError if the state belongs to different data (such as another ``num_groups``) or a different order (such as another
        ``seed``).
        """
        for name, value in {"order": None, **self.order.identity()}.items():
            if state.get(name) != value:
                raise DataError(
                    f"the checkpoint's sampler has {name} {state.get(name)!r}, but this run has {value!r}; resume with the data and seed "
                    "of the saved run, or start a new run"
                )
        self.samples_seen = state["samples_seen"]


@dataclass(frozen=True)
class _Position:
    """Position in the stream: the number of groups read so far, and the groups that still wait for a micro-batch with enough room."""

    read: int = 0
    waiting: tuple[int, ...] = ()


class PackedSampler(GroupSampler):
    """Sampler that fills each micro-batch with whole groups up to ``max_tokens``, so that all ranks process similar numbers of tokens per
    step.

    A step has one micro-batch per rank and accumulation step. Groups are taken in stream order. Each group is added to the micro-batch in
    which it leaves the least room (best fit). A group that fits nowhere waits, and is placed first in the next step. The step is full when
    ``_WINDOW`` groups are waiting, or when the stream repeats a group that is still waiting; a small data set would otherwise repeat its
    other groups many times before the waiting group is used. Groups are then exchanged between the fullest and the emptiest micro-batch
    until the two are balanced. No group of the stream is lost or repeated. At any time, the use counts of any two groups differ by at most
    two. The order depends only on the data, the seed, ``max_tokens`` and the number of micro-batches per step.
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
        """Create the sampler of one rank. Raises ValueError if a group has more than ``max_tokens`` tokens."""
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
        if (most := int(np.max(self.tokens))) > max_tokens:
            raise ValueError(f"group {int(np.argmax(self.tokens))} has {most} tokens, over max_tokens ({max_tokens})")
        self.max_tokens = max_tokens
        self._position = _Position()

    def advance(self) -> None:
        _, self._position = self._pack(self._position)
        self.samples_seen = self._position.read - len(self._position.waiting)

    def steps(self) -> Iterator[list[list[int]]]:
        position = self._position
        while True:
            bins, position = self._pack(position)
            yield self._balance(bins)

    def num_steps(self, num_epochs: float, say: Say = no_op) -> int:
        """Return the number of optimizer steps until the groups of ``num_epochs`` epochs have been used.

        For up to ``_COUNTED`` groups, the steps are counted. For more groups, only the steps of the first ``_TRIED`` groups are counted,
        and the result is extrapolated to all groups in proportion to their token counts. Because steps are nearly full, the error is below
        one in a thousand. A resumed run gets the same result as a new one.
        """
        wanted = _groups_in(num_epochs, self.order.length)
        counted = wanted if wanted <= _COUNTED else min(wanted, _TRIED)
        position, steps, tokens = _Position(), 0, 0
        progress = Progress(say, "counting steps", counted, "groups")
        while position.read - len(position.waiting) < counted:
            bins, position = self._pack(position)
            tokens, steps = tokens + sum(int(self.tokens[group]) for micro_batch in bins for group in micro_batch), steps + 1
            progress.advance(sum(map(len, bins)))
        if counted == wanted:
            return steps
        return math.ceil(Fraction(steps * wanted, tokens) * self.order.mean(self.tokens))

    def groups_in(self, num_steps: int) -> int:
        """Estimate the number of groups in ``num_steps`` optimizer steps from the mean number of tokens per group."""
        return int(num_steps * self.groups_per_step * self.max_tokens / self.tokens.mean())

    def state_dict(self) -> dict[str, Any]:
        """Return the consumed position, the waiting groups, and everything that determines the stream of groups."""
        return {**super().state_dict(), "waiting": list(self._position.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position. Raises the same errors as GroupSampler, and DataError for a state saved by another kind of sampler."""
        super().load_state_dict(state)
        if (waiting := state.get("waiting")) is None:
            raise DataError("the checkpoint's sampler did not pack; resume without data.max_tokens_per_micro_batch, or start a new run")
        self._position = _Position(self.samples_seen + len(waiting), tuple(waiting))

    def _pack(self, position: _Position) -> tuple[list[list[int]], _Position]:
        """Fill the micro-batches of the step that starts at ``position``. Return them and the position after the step."""
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
        """Exchange groups between the fullest and the emptiest micro-batch as long as this reduces the difference between their token
        counts. Return the micro-batches, fullest first.
        """
        ranked = sorted((int(self.tokens[groups].sum()), b) for b, groups in enumerate(bins))
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
    """Find the exchange of two groups between two micro-batches that best balances their token counts. Return the indices (i, j) of the
    groups in ``given`` and ``taken``, or None if no exchange improves the balance.

    ``given`` contains the token counts of the groups in the fuller micro-batch, and ``taken`` those in the emptier one; ``gap`` is the
    difference between their sums. ``taken`` is sorted and starts with 0, so j = 0 moves group i without an exchange. An ideal exchange
    moves half of ``gap``.
    """
    best = gap, 0, 0
    for i, tokens in enumerate(given):
        at = bisect.bisect_left(taken, tokens - gap / 2)
        best = min(best, *((abs(gap - 2 * (tokens - taken[j])), i, j) for j in (at - 1, at) if 0 <= j < len(taken)))
    return None if best[0] == gap else best[1:]


_COUNTED, _TRIED = 1 << 18, 1 << 16  # counting takes seconds and a fraction of a second, respectively
_AHEAD = 64  # number of groups read from the order at a time
_WINDOW = 32  # maximum number of waiting groups: enough to fill gaps, few enough to stay close to the stream order


def _groups_in(num_epochs: float, num_groups: int) -> int:
    """Return the number of groups in ``num_epochs`` epochs of ``num_groups`` groups, rounded up.

    ``num_epochs`` is treated as a decimal number: 0.29 epochs of 100 groups are 29 groups, although the float is below 0.29. The float
    nearest to n / num_groups gives n groups.
    """
    nearest = round(num_epochs * num_groups)
    return nearest if nearest / num_groups == num_epochs else math.ceil(Fraction(repr(float(num_epochs))) * num_groups)
