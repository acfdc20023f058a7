"""Training loss on evaluation sets: means over a whole split. The terms have their final weights, even during warm-up.

A term is computed only if its inputs exist for the split. Reference scores are stored only for training groups, so a term that needs them
is computed only if the model without its adapters is the reference. A term that needs prior scores, scores on a blank image, or divergences
between next-token distributions is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.batching.batch_layout import wanted_cells
from cfvlm_ds.core.distributed import World, gather_objects
from cfvlm_ds.core.groups import Groups
from cfvlm_ds.core.scores import Scores
from cfvlm_ds.objectives import Objectives, denominators, required_cells, scores_of

Reference = Callable[[Batch], Tensor]
"""Function that maps a batch to log-likelihoods [G, I, C] under the reference model. All ranks must call it the same number of times."""


class EvaluationLoss:
    """Loss of one split, summed batch by batch. Each group must be added exactly once.

    Args:
        objectives: terms of the run.
        reference: function that computes reference scores; None without a reference model.
    """

    def __init__(self, objectives: Objectives, reference: Reference | None = None) -> None:
        self._objectives, self._cells = objectives, required_cells(objectives)
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # numerators and denominators
        self._lacking: dict[str, str] = {}
        self._likelihood = [0.0, 0]
        for name, term in objectives.items():
            if term.needs_prior:
                self._lacking[name] = "it needs the texts' prior likelihood, which is stored only for training groups"
            elif term.needs_blank:
                self._lacking[name] = "it needs scores of the blank picture, which are part of training rows only"
            elif term.divergence is not None:
                self._lacking[name] = "it needs divergences of distributions, which are part of training rows only"
            elif term.needs_reference and reference is None:
                self._lacking[name] = "it needs reference scores, which are stored only for training groups"
        has_reference_term = any(term.needs_reference and name not in self._lacking for name, term in objectives.items())
        self.reference = reference if has_reference_term else None

    def add(self, groups: Groups, scores: Scores) -> None:
        """Add the terms and the NLL of a batch. Every cell must be scored."""
        true = scores.layout.positive
        self._likelihood[0] -= float((scores.logp + scores.end_logp)[true].double().sum())
        self._likelihood[1] += int((scores.layout.num_tokens + scores.layout.num_end_tokens)[true].sum())
        layout = scores.layout  # restricted to the cells scored in training, because an objective may use every scored cell
        prompt = torch.zeros_like(layout.match[:, 0], dtype=torch.int64) if layout.prompt is None else layout.prompt
        layout = replace(layout, valid=layout.valid & wanted_cells(groups, layout.match, prompt, self._cells))
        logp, end_logp = (torch.where(layout.valid, each, 0) for each in (scores.logp, scores.end_logp))
        scores = replace(scores, layout=layout, logp=logp, end_logp=end_logp)
        for name, term in self._objectives.items():
            if name in self._lacking:
                continue
            try:
                numerator, denominator = (
                    torch.atleast_1d(term.numerator(scores_of(name, term, scores))),
                    denominators({name: term}, scores.layout)[name],
                )
                before = self._sums.get(name, (0, 0))
                self._sums[name] = before[0] + numerator.detach().double(), before[1] + denominator.double()
            except Exception as error:  # a user's own term must not stop the evaluation
                self._lacking[name] = f"it raises {type(error).__name__}: {' '.join(str(error).split())}"

    def reduce(self, world: World) -> dict[str, Any]:
        """Return two fields of ``Accuracy``, computed over the groups of all ranks: ``nll`` (None without true texts) and ``losses``, which
        contains an entry for each term. All ranks must call this.

        An entry's ``value`` is the term's unweighted mean, or None. ``lacking`` is the reason why it could not be computed, or "".
        ``parts`` counts the term's parts, and ``without`` those that have no comparison in the split. ``value`` does not include them.
        """
        gathered = gather_objects((self._likelihood, self._lacking, self._sums), world)
        likelihoods, lacking, sums = zip(*gathered, strict=True)
        nats, tokens = (sum(each[part] for each in likelihoods) for part in (0, 1))
        terms = {}
        for name, term in self._objectives.items():
            reasons = [each[name] for each in lacking if name in each]
            parts = [each[name] for each in sums if name in each]
            numerators, counts = [torch.as_tensor(sum(each)) for each in zip(*parts, strict=True)] or [torch.zeros(0)] * 2
            value = _mean(numerators, counts)
            if value is not None and not math.isfinite(value):
                reasons.append("scores of some groups are not finite")
            terms[name] = {
                "weight": term.weight,
                "value": None if reasons else value,
                "lacking": reasons[0] if reasons else "",
                "parts": len(counts),
                "without": int((counts == 0).sum()),
            }
        return {"losses": terms, "nll": nats / tokens if tokens and math.isfinite(nats) else None}


def _mean(numerators: Tensor, denominators: Tensor) -> float | None:
    """Return a term's mean, or None if all denominators are 0. If the term is a sum of several fractions, those with denominator 0 are
    skipped, as in training.
    """
    if not bool((denominators > 0).any()):
        return None
    return float(torch.where(denominators > 0, numerators / denominators.clamp(min=torch.finfo(denominators.dtype).tiny), 0).sum())
