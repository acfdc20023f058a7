"""Scoring plan: converts items into groups that a model scores, and the groups' scores into outcomes of the items.

Items with the same pictures share a group, so that the pictures are encoded once. Each text of a prompt occurs once in a group.
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
"""Index of a group, and columns of its scores."""


class Packing:
    """Groups under construction. Each set of pictures has at most one open group, whose texts are keyed by their normalised form."""

    def __init__(self) -> None:
        self._started: list[tuple[str, tuple[Pictures, ...], dict[tuple[Prompt, str], tuple[int, Candidate]]]] = []
        self._open: dict[tuple[Pictures, ...], int] = {}

    def add(self, name: str, images: tuple[Pictures, ...], cells: Sequence[Candidate]) -> Place:
        """Add texts that are scored on the given images, and return the index of their group and their columns in it.

        The texts start a new group if one of them differs from a text of the open group only in white space, because their tokens differ.
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
        """Return the groups. A group needs one true cell, so its first cell is marked as true; the items have the truth of all cells.

        Raises DataError for more cells than a group can have.
        """
        groups = []
        for name, images, known in self._started:
            match = tuple(tuple(1 if (i, c) == (0, 0) else None for c in range(len(known))) for i in range(len(images)))
            groups.append(CounterfactualGroup(name, images, tuple(cell for _, cell in known.values()), match))
        return tuple(groups)


@dataclass(frozen=True)
class Plan:
    """Groups to score for a list of items. ``places`` locates each item's cells in the groups. ``alone`` locates its options without the
    question and the picture, and is None if they are not scored. The groups of a probe that generates text only show what is asked.
    """

    items: tuple[Item, ...]
    probe: Probe | Generate
    groups: tuple[CounterfactualGroup, ...]
    places: tuple[Place, ...]
    alone: tuple[Place | None, ...]

    def outcomes(self, scores: Sequence[GroupScores], lengths: Lengths | None = None) -> list[Outcome]:
        """Return the outcome of each item from the scores of the groups, which are in the groups' order."""
        return [self._outcome(number, scores, lengths) for number in range(len(self.items))]

    def _outcome(self, number: int, scores: Sequence[GroupScores], lengths: Lengths | None) -> Outcome:
        assert isinstance(self.probe, Probe)
        probe, item, (place, columns), alone = self.probe, self.items[number], self.places[number], self.alone[number]
        scored, candidates = scores[place], self.groups[place].candidates
        counts = Lazy(lambda place: lengths(candidates[columns[place]]), len(columns)) if lengths else ()
        blank = _taken(scored.blank.tolist(), columns)
        seen = [_taken(row_values, columns) for row_values in scored.logp.tolist()]
        shuffled = None if scored.shuffled is None or not len(scored.shuffled) else _taken(scored.shuffled.tolist(), columns)

        def row(values: Row) -> Row:
            return probe.row(item, values, blank, counts)

        consistent = [value for values in seen if (value := probe.consistency(item, values)) is not None]
        return Outcome(
            item,
            tuple(map(row, seen)),
            row(blank),
            None if shuffled is None else row(shuffled),
            sum(consistent) / len(consistent) if consistent else None,
            None if alone is None else probe.row(item, _taken(scores[alone[0]].logp[0].tolist(), alone[1]), (), ()),
        )


def _taken(values: Sequence[float], columns: Sequence[int]) -> Row:
    return tuple(values[column] for column in columns)


def plan(items: Sequence[Item], probe: Probe | Generate) -> Plan:
    """Build the groups that contain the cells of all items. Items with the same pictures share groups of at most MOST_CELLS texts.

    Raises DataError for an item with more cells than a group can have.
    """
    packing = Packing()
    places = [packing.add(item.id, item.images, probe.cells(item)) for item in items]
    alone = [packing.add(f"{item.id}, options alone", ((),), cells) if (cells := probe.alone(item)) else None for item in items]
    return Plan(tuple(items), probe, packing.groups(), tuple(places), tuple(alone))


def written(item: Item, answers: Sequence[str], blank: str, shuffled: str | None, read: Parser | Mentions) -> Outcome:
    """Return the outcome of an item from texts that were generated about each image, a blank image and, optionally, another item's image.

    The text that a parser selects has the score 1, all others 0. An answer that cannot be parsed is wrong. In a description, the score of a
    text is the number of its mentions.
    """

    def row(text: str) -> Row:
        meant = read(text.strip(), item)
        return meant if isinstance(meant, tuple) else tuple(float(place == meant) for place in range(len(item.texts)))

    plain = tuple(text.strip() for text in answers)
    return Outcome(item, tuple(map(row, plain)), row(blank), None if shuffled is None else row(shuffled), said=plain)
