"""Hard negatives: if a group has many counterfactuals, a step trains only on those that are hardest for the current model.

A forward pass without gradients scores all counterfactuals. The row of tokens is then packed again with only the hardest, so that the
training pass costs no more than for a group with few counterfactuals. Shapes: G groups, I images, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import MicroBatch
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.training.in_batch_negatives import look_ahead


@dataclass(frozen=True)
class Hardest:
    """The selected cells [G, I, C], and the number of counterfactuals that were scored (``proposed``) and kept (``entered``). The counts
    cover only groups with a single prompt.
    """

    cells: Tensor
    proposed: int
    entered: int


def cut_to_hardest(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    forwards: Sequence[int],
    device: torch.device,
    number: int,
    pack: Callable[[MicroBatch, Tensor], MicroBatch],
) -> tuple[list[MicroBatch], list[Hardest]]:
    """Keep only the ``number`` hardest counterfactuals of each group. Return the repacked micro-batches and the selections.

    Every rank must call this. ``pack`` is Collator.packed_again, which repacks a micro-batch with a subset of its cells.
    """
    engine.eval()
    chosen = [hardest(scores, number) for scores in look_ahead(engine, micro_batches, forwards, device)]
    engine.train()
    return [pack(micro_batch, each.cells) for micro_batch, each in zip(micro_batches, chosen, strict=True)], chosen


def hardest(scores: Scores, number: int) -> Hardest:
    """Select the ``number`` hardest counterfactuals of each group, and all cells that do not belong to any counterfactual.

    A counterfactual is a text that is not true of the factual image, together with the images that match this text but not the factual
    text. Any other image for which the factual text is false is also a counterfactual. The hardness of a counterfactual is the largest
    violation in a comparison with the factual pair (two texts on one image, or two images for one text). Of equally hard counterfactuals,
    the first is selected. A group with several prompts keeps all its cells.
    """
    layout, logp = scores.layout, scores.logp.detach().cpu()
    known = (layout.positive | layout.negative).cpu()
    kept = torch.ones_like(layout.valid)
    same = layout.same_prompt[:, 0].cpu()
    match, proposed, entered = layout.match.cpu(), 0, 0
    for g in range(len(kept)):
        if bool(((match[g] >= 0).any(0) & ~same[g]).any()):
            continue
        truth, values, known_cells = match[g].tolist(), logp[g].tolist(), known[g].tolist()
        units = _counterfactuals(truth)
        proposed, entered = proposed + len(units), entered + min(len(units), number)
        if len(units) <= number:
            continue
        hardness = [_hardness(unit, truth, values, known_cells) for unit in units]
        ranked = sorted(range(len(units)), key=lambda place: -hardness[place])
        images, texts = torch.ones(len(truth), dtype=torch.bool), torch.ones(len(truth[0]), dtype=torch.bool)
        for stays, places in ((False, ranked[number:]), (True, ranked[:number])):  # an image in both lists stays
            for text, own in (units[place] for place in places):
                images[list(own)] = stays
                texts[[] if text is None else [text]] = stays
        kept[g] = (images.unsqueeze(1) & texts).to(kept.device)
    return Hardest(kept, proposed, entered)


Counterfactual = tuple[int | None, tuple[int, ...]]
"""(index of the counterfactual's text or None, indices of its images)."""


def _counterfactuals(match: Sequence[Sequence[int]]) -> list[Counterfactual]:
    texts: list[Counterfactual] = []
    for c in range(1, len(match[0])):
        if match[0][c] != 1 and any(row[c] >= 0 for row in match):
            texts.append((c, tuple(i for i, row in enumerate(match) if i and row[c] == 1 and row[0] != 1)))
    owned = {i for _, images in texts for i in images}
    return [*texts, *((None, (i,)) for i, row in enumerate(match) if i and i not in owned and row[0] == 0)]


def _hardness(
    unit: Counterfactual, match: Sequence[Sequence[int]], logp: Sequence[Sequence[float]], known: Sequence[Sequence[bool]]
) -> float:
    """Return the largest S[false] - S[true] in comparisons of the counterfactual with the factual pair, or -inf if there are none."""
    text, images = unit
    cells = [(0, 0), *((i, 0) for i in images)]
    cells += [] if text is None else [(0, text), *((i, text) for i in images)]
    true = [(i, c) for i, c in cells if known[i][c] and match[i][c] == 1]
    false = [(i, c) for i, c in cells if known[i][c] and match[i][c] == 0]
    margins = (logp[i][c] - logp[j][d] for i, c in false for j, d in true if i == j or c == d)
    return max(margins, default=float("-inf"))
