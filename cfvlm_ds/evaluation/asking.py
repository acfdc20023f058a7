"""Scoring plan: converts benchmark items into groups for a model to score, and the groups' scores back into item outcomes.

Items with the same pictures share a group, so that the pictures are encoded once. No pair of prompt and text occurs twice in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures, Prompt
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.evaluation.benchmarks.base import Item, Mentions, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import Parser
from cfvlm_ds.evaluation.probes import Generate, Probe, Row
from cfvlm_ds.evaluation.scoring import GroupScores

Lengths = Callable[[Candidate], int]
"""Function that returns the number of tokens in a candidate's text under the model's tokenizer."""

MOST_CELLS = 256
"""Maximum number of texts in a group that several items share."""

Place = tuple[int, tuple[int, ...]]
"""Location of an item's texts: the index of their group, and their columns in its score matrix."""


class Packing:
    """Builder of groups. Texts go to the newest group with the same images, or to a new one if that group cannot accept them."""

    def __init__(self) -> None:
        self._started: list[tuple[str, tuple[Pictures, ...], dict[tuple[Prompt, str], tuple[int, Candidate]]]] = []
        self._open: dict[tuple[Pictures, ...], int] = {}

    def add(self, name: str, images: tuple[Pictures, ...], cells: Sequence[Candidate]) -> Place:
        """Add texts to score on ``images``. Return the index of their group, and the texts' columns in its score matrix.

        Texts that differ only in white space or Unicode form have different tokens, so each is scored, but they cannot share a group. If an
        added text conflicts with the group in this way, all the added texts go to a new group.
        """
        keys = [(normalised_prompt(cell.prompt), normalised(cell.text)) for cell in cells]
        keyed = dict(zip(keys, cells, strict=True))
        number = self._open.get(images, -1)
        known = self._started[number][2] if number >= 0 else {}
        is_consistent = all(known.get(key, (0, cell))[1] == cell for key, cell in keyed.items())
        if number < 0 or not is_consistent or len(known.keys() | keyed.keys()) > MOST_CELLS:
            number, known = len(self._started), {}
            self._open[images] = number
            self._started.append((name, images, known))
        for key, cell in keyed.items():
            known.setdefault(key, (len(known), cell))
        return number, tuple(known[key][0] for key in keys)

    def groups(self) -> tuple[CounterfactualGroup, ...]:
        """Return the groups. Metrics use the items' truth tables instead of the groups' own. Raises DataError if a group has too many
        cells.
        """
        return tuple(
            CounterfactualGroup.to_score(name, images, tuple(cell for _, cell in known.values())) for name, images, known in self._started
        )


@dataclass(frozen=True)
class Plan:
    """Groups to score for a list of items. ``places`` lists, for each item, the index of its group and the columns of its texts.

    If the probe generates text, the groups contain only the prompts, with arbitrary answers, and are not scored.
    """

    items: tuple[Item, ...]
    probe: Probe | Generate
    groups: tuple[CounterfactualGroup, ...]
    places: tuple[Place, ...]

    def outcomes(self, scores: Sequence[GroupScores], lengths: Lengths | None = None) -> list[Outcome]:
        """Return the outcome of each item. ``scores`` holds the scores of ``groups``, in the same order."""
        return [self._outcome(number, scores, lengths) for number in range(len(self.items))]

    def _outcome(self, number: int, scores: Sequence[GroupScores], lengths: Lengths | None) -> Outcome:
        assert isinstance(self.probe, Probe)
        probe, item, (place, columns) = self.probe, self.items[number], self.places[number]
        scored, candidates = scores[place], self.groups[place].candidates
        counts = Lazy(lambda place: lengths(candidates[columns[place]]), len(columns)) if lengths else ()
        blank = _taken(scored.blank.tolist(), columns)
        seen = [_taken(row_values, columns) for row_values in scored.logp.tolist()]

        def row(values: Row) -> Row:
            return probe.row(item, values, blank, counts)

        consistent = [value for values in seen if (value := probe.consistency(item, values)) is not None]
        return Outcome(
            item,
            tuple(map(row, seen)),
            row(blank),
            sum(consistent) / len(consistent) if consistent else None,
        )


def _taken(values: Sequence[float], columns: Sequence[int]) -> Row:
    return tuple(values[column] for column in columns)


def plan(items: Sequence[Item], probe: Probe | Generate) -> Plan:
    """Build groups that contain the texts of all items. Items with the same pictures share groups of at most ``MOST_CELLS`` texts.

    Raises DataError if an item has too many texts or images for one group.
    """
    packing = Packing()
    places = [packing.add(item.id, item.images, probe.cells(item)) for item in items]
    return Plan(tuple(items), probe, packing.groups(), tuple(places))


def written(item: Item, answers: Sequence[str], blank: str, read: Parser | Mentions) -> Outcome:
    """Return an item's outcome, computed from texts generated for its images and for a blank image.

    If the model generates an answer, the item text that the parser selects scores 1 and all others 0. An answer that cannot be parsed
    counts as wrong. If the model generates a description, each text's score is the number of times the description mentions it.
    """

    def row(text: str) -> Row:
        meant = read(text.strip(), item)
        return meant if isinstance(meant, tuple) else tuple(float(place == meant) for place in range(len(item.texts)))

    plain = tuple(text.strip() for text in answers)
    return Outcome(item, tuple(map(row, plain)), row(blank), said=plain)
