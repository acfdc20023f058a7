"""Items to groups and back: what is scored for a probe, and what the scores say of each item.

What shows the same pictures is put into one group, in which each text of a prompt stands once, so that the pictures are encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Pictures, Prompt
from cfvlm_ds.core.sequences import Lazy
from cfvlm_ds.evaluation.benchmarks.base import Item, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import Parser
from cfvlm_ds.evaluation.probes import Probe, Row
from cfvlm_ds.evaluation.scoring import GroupScores

Lengths = Callable[[Candidate], int]
"""Tokens of a candidate's text, as the model's own tokenizer has them."""

MOST_CELLS = 256
"""Texts of a group that several items share."""

Place = tuple[int, tuple[int, ...]]
"""Where cells are: a group, and columns of its scores."""


class Packing:
    """Groups under construction: pictures -> the group that still has room, and its texts by what the engine takes for the same."""

    def __init__(self) -> None:
        self._started: list[tuple[str, tuple[Pictures, ...], dict[tuple[Prompt, str], tuple[int, Candidate]]]] = []
        self._open: dict[tuple[Pictures, ...], int] = {}

    def add(self, name: str, images: tuple[Pictures, ...], cells: Sequence[Candidate]) -> Place:
        """Add texts that are scored on some images. They begin a new group where one of them differs from a text of the open one in white
        space alone: their tokens differ."""
        keys = [(normalised_prompt(cell.prompt), normalised(cell.text)) for cell in cells]
        keyed = dict(zip(keys, cells, strict=True))
        number = self._open.get(images, -1)
        known = self._started[number][2] if number >= 0 else {}
        alike = all(known.get(key, (0, cell))[1] == cell for key, cell in keyed.items())
        if number < 0 or not alike or len(known.keys() | keyed.keys()) > MOST_CELLS:
            number, known = len(self._started), {}
            self._open[images] = number
            self._started.append((name, images, known))
        for key, cell in keyed.items():
            known.setdefault(key, (len(known), cell))
        return number, tuple(known[key][0] for key in keys)

    def groups(self) -> tuple[CounterfactualGroup, ...]:
        """The truth of a cell is the item's affair: of a group only the first cell is marked, as every group needs one.

        Raises DataError for more cells than a group can have.
        """
        made = []
        for name, images, known in self._started:
            match = tuple(tuple(1 if (i, c) == (0, 0) else None for c in range(len(known))) for i in range(len(images)))
            made.append(CounterfactualGroup(name, images, tuple(cell for _, cell in known.values()), match))
        return tuple(made)


@dataclass(frozen=True)
class Plan:
    """The groups to score for some items, and the way back from their scores: the place of each item's cells, and of its options alone."""

    items: tuple[Item, ...]
    probe: Probe
    groups: tuple[CounterfactualGroup, ...]
    places: tuple[Place, ...]
    alone: tuple[Place | None, ...]

    def outcomes(self, scores: Sequence[GroupScores], lengths: Lengths | None = None) -> list[Outcome]:
        """What the scores of the groups, in their order, say of each item."""
        return [self._outcome(number, scores, lengths) for number in range(len(self.items))]

    def _outcome(self, number: int, scores: Sequence[GroupScores], lengths: Lengths | None) -> Outcome:
        item, (place, columns), alone = self.items[number], self.places[number], self.alone[number]
        found, candidates = scores[place], self.groups[place].candidates
        counts = Lazy(lambda place: lengths(candidates[columns[place]]), len(columns)) if lengths else ()
        blank = _taken(found.blank.tolist(), columns)
        seen = [_taken(line, columns) for line in found.logp.tolist()]
        shuffled = None if found.shuffled is None or not len(found.shuffled) else _taken(found.shuffled.tolist(), columns)

        def row(values: Row) -> Row:
            return self.probe.row(item, values, blank, counts)

        consistent = [value for values in seen if (value := self.probe.consistency(item, values)) is not None]
        return Outcome(
            item,
            tuple(map(row, seen)),
            row(blank),
            None if shuffled is None else row(shuffled),
            sum(consistent) / len(consistent) if consistent else None,
            None if alone is None else self.probe.row(item, _taken(scores[alone[0]].logp[0].tolist(), alone[1]), (), ()),
        )


def _taken(values: Sequence[float], columns: Sequence[int]) -> Row:
    return tuple(values[column] for column in columns)


def plan(items: Sequence[Item], probe: Probe) -> Plan:
    """Groups that hold the cells of all items. Items that show the same pictures share groups of at most MOST_CELLS texts.

    Raises DataError for an item with more cells than a group can have.
    """
    packing = Packing()
    places = [packing.add(item.id, item.images, probe.cells(item)) for item in items]
    alone = [packing.add(f"{item.id}, options alone", ((),), cells) if (cells := probe.alone(item)) else None for item in items]
    return Plan(tuple(items), probe, packing.groups(), tuple(places), tuple(alone))


def written(item: Item, said: Sequence[str], blank: str, shuffled: str | None, parse: Parser) -> Outcome:
    """The outcome of an item about which a model has written: about each image, a blank one and, if any, another item's. 1 for the text
    that was meant, 0 for the others, and 0 for all where it was none, which is wrong."""

    def row(text: str) -> Row:
        meant = parse(text.strip(), item)
        return tuple(float(place == meant) for place in range(len(item.texts)))

    plain = tuple(text.strip() for text in said)
    return Outcome(item, tuple(map(row, plain)), row(blank), None if shuffled is None else row(shuffled), said=plain)
