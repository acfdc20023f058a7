"""The likelihood of texts that somebody else asks for one by one: those of the same pictures are scored together, as groups are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from cfvlm_ds.batching.batch import Batch
from cfvlm_ds.batching.collator import Collator
from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures
from cfvlm_ds.evaluation.asking import MOST_CELLS
from cfvlm_ds.evaluation.scoring import scored_batches
from cfvlm_ds.models import Scorer
from cfvlm_ds.models.chunked_logprobs import likeliest


class Question(NamedTuple):
    """A text whose likelihood is asked for, as the answer to a prompt about some pictures."""

    pictures: Pictures
    candidate: Candidate
    name: str
    """By which an error names it."""


@dataclass(frozen=True)
class Likelihood:
    """log p of a text in nats, without the end of the turn; its tokens; whether each of them is the likeliest one in its place."""

    logp: float
    tokens: int
    greedy: bool


def likelihoods(
    scorer: Scorer, collator: Collator, questions: Sequence[Question], world: World, batch_size: int = 16, max_tokens: int | None = None
) -> list[Likelihood]:
    """What the model gives each text, in the order of the questions; this process alone, whatever others there are.

    ``batch_size`` counts groups of texts that share their pictures; a forward has at most ``max_tokens`` tokens.

    Raises DataError for a text or a picture that cannot be scored, OutOfMemory where memory runs out.
    """
    groups, places = _grouped(questions)
    found: dict[tuple[int, int], Likelihood] = {}
    for pictured in (True, False):
        mine = [number for number, group in enumerate(groups) if bool(group.num_pictures) == pictured]
        batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        with _misses(scorer) as missed:
            options: dict[str, Any] = {"max_tokens": max_tokens, "remedy": f"lower the batch size ({batch_size})", "reference": missed}
            for indices, (scores,) in scored_batches(scorer, collator, groups, [groups], batches, world, 0, "scoring", **options):
                assert scores.reference is not None
                for j, number in enumerate(indices):
                    for c in range(len(groups[number].candidates)):
                        wrong, tokens = scores.reference[j, 0, c].item(), int(scores.layout.num_tokens[j, 0, c])
                        found[number, c] = Likelihood(scores.logp[j, 0, c].item(), tokens, wrong == 0)
    return [found[place] for place in places]


def _grouped(questions: Sequence[Question]) -> tuple[list[CounterfactualGroup], list[tuple[int, int]]]:
    """Groups that hold every question, and the group and text of each. A text that a group would take for another one of its own, because
    they differ in white space alone, begins a new group: their tokens differ."""
    started: list[tuple[str, Pictures, dict[Any, Candidate]]] = []
    last: dict[Pictures, int] = {}
    places: list[tuple[int, int]] = []
    for pictures, candidate, name in questions:
        key = (normalised_prompt(candidate.prompt), normalised(candidate.text))
        number = last.get(pictures, -1)
        texts = started[number][2] if number >= 0 else {}
        if number < 0 or texts.get(key, candidate) != candidate or (key not in texts and len(texts) >= MOST_CELLS):
            number = last[pictures] = len(started)
            started.append((name, pictures, texts := {}))
        texts.setdefault(key, candidate)
        places.append((number, list(texts).index(key)))
    groups = [
        CounterfactualGroup(name, (pictures,), tuple(texts.values()), ((1, *[None] * (len(texts) - 1)),))
        for name, pictures, texts in started
    ]
    return groups, places


@contextmanager
def _misses(scorer: Scorer) -> Iterator[Callable[[Batch], Tensor]]:
    """A function that says of the batch that was scored last how many tokens of each cell are not the likeliest in their places."""
    head: Any = scorer.model.get_output_embeddings()
    wrong: list[Tensor] = []

    def compare(module: Any, given: tuple[Tensor, Tensor, Tensor], result: Tensor) -> None:
        hidden, predicted_by, targets = given
        wrong[:] = [(likeliest(hidden, module.weight)[predicted_by] != targets).float()]

    hook = head.register_forward_hook(compare)
    try:
        yield lambda batch: batch.scores(wrong[0]).logp
    finally:
        hook.remove()
