"""What texts score on images of other groups of the optimizer step: numbers that every rank needs before it can compute its gradients.

A loss that compares a text on images of several groups couples micro-batches and ranks. Every group has the gradient of its own scores if
it knows the others as constants, so scores travel and gradients do not. Shapes: G groups, I images, C texts, R scores elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.distributed import World, gather_objects, random_state, set_random_state
from cfvlm_ds.core.scores import Scores

Exchange = Callable[[Scores], Scores]
"""Adds to the scores of a micro-batch what its texts score elsewhere."""


def exchange(found: Sequence[Scores], world: World) -> Exchange:
    """What gives each micro-batch its scores elsewhere, from the scores of all micro-batches of the step; collective.

    ``found`` are those of this rank. A text whose own group was left out of the step has none elsewhere: it is compared with nothing.
    """
    mine = np.concatenate([_entries(scores) for scores in found])
    return _Elsewhere(np.concatenate(gather_objects(mine, world)))


def _entries(scores: Scores) -> npt.NDArray[np.float64]:
    """[M, 4]: of each score that other groups compare with, the text's home and number, the place of the group, nats."""
    layout = scores.layout
    if layout.guests is None:
        return np.zeros((0, 4))
    true = layout.positive & layout.same_prompt[:, :1]
    own = true & (true.cumsum(1) == 1)
    compared = own | (layout.negative & layout.same_prompt[:, :1] & own.any(1, keepdim=True))
    compared[:, :, layout.num_own :] = layout.valid[:, :, layout.num_own :]
    compared = compared.cpu()
    logp, names, place = scores.logp.detach().double().cpu()[compared], _names(scores), layout.guests.place.tolist()
    group, _, column = compared.nonzero().T.tolist()
    told = [(*names[g][c], place[g]) for g, c in zip(group, column, strict=True)]
    return np.column_stack([np.array(told, np.float64).reshape(-1, 3), logp.numpy()])


def _names(scores: Scores) -> list[list[tuple[int, int]]]:
    """[G][C] home and number of each text."""
    layout = scores.layout
    assert layout.guests is not None
    own = range(layout.num_own)
    places, homes = layout.guests.place.tolist(), layout.guests.home.tolist()
    return [[*((place, c) for c in own), *map(tuple, home)] for place, home in zip(places, homes, strict=True)]


class _Elsewhere:
    """The scores of a step by text."""

    def __init__(self, table: npt.NDArray[np.float64]) -> None:
        self._of: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for home, text, host, score in table.tolist():
            self._of.setdefault((int(home), int(text)), []).append((int(host), score))

    def __call__(self, scores: Scores) -> Scores:
        layout = scores.layout
        if layout.guests is None:
            return scores
        places, names = layout.guests.place.tolist(), _names(scores)
        found = [[list(self._scores(place, *name)) for name in line] for place, line in zip(places, names, strict=True)]
        most = max(len(each) for line in found for each in line)
        filled = [[[*each, *[float("-inf")] * (most - len(each))] for each in line] for line in found]
        elsewhere = torch.tensor(filled, dtype=scores.logp.dtype).view(len(found), len(names[0]), most)
        return replace(scores, elsewhere=elsewhere.to(scores.logp.device))

    def _scores(self, place: int, home: int, text: int) -> Iterator[float]:
        """Scores of a text on images of groups elsewhere than at ``place``."""
        entries = self._of.get((home, text), [])
        if any(host == home for host, _ in entries):
            yield from (score for host, score in entries if host != place)


def look_ahead(engine: Any, micro_batches: Sequence[MicroBatch], forwards: Sequence[int], device: torch.device) -> list[Scores]:
    """The scores of all micro-batches of this rank before the gradients of the first are computed.

    With the random numbers of the forwards that follow, so that dropout leaves out the same; every rank makes as many forwards.
    """
    state, found = random_state(device), []
    with torch.no_grad():
        for micro_batch, number in zip(micro_batches, forwards, strict=True):
            found.append(micro_batch.scores([engine(**batch.model_inputs) for batch in micro_batch.padded(number)]))
    set_random_state(state, device)
    return found
