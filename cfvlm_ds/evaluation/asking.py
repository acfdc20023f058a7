"""Items to groups and back: what is scored for a probe, and what the scores say of each item.

Items that show the same pictures are put into one group, in which each text of a prompt stands once, so that the pictures are encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cfvlm_ds.core.conversation import normalised, normalised_prompt
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import MAX_CELLS, MAX_SIDE, Candidate, CounterfactualGroup, Pictures, Prompt
from cfvlm_ds.evaluation.benchmarks.base import Item, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import Parser, answer
from cfvlm_ds.evaluation.probes import Generate, Probe, Row
from cfvlm_ds.evaluation.scoring import GroupScores

Lengths = Callable[[Candidate], int]
"""Tokens of a candidate's text, as the model's own tokenizer has them."""

MOST_CELLS = 256
"""Texts of a group that several items share."""


@dataclass(frozen=True)
class _Place:
    """Where an item's cells are: a group and columns of its scores."""

    group: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The groups to score for some items, and the way back from their scores."""

    items: tuple[Item, ...]
    probe: Probe
    groups: tuple[CounterfactualGroup, ...]
    places: tuple[_Place, ...]
    alone: tuple[_Place | None, ...]

    def outcomes(self, scores: Sequence[GroupScores], lengths: Lengths | None = None) -> list[Outcome]:
        """What the scores of the groups, in their order, say of each item."""
        if len(scores) != len(self.groups):
            raise ValueError(f"{len(self.groups)} groups and {len(scores)} scores")
        return [self._outcome(number, scores, lengths) for number in range(len(self.items))]

    def _outcome(self, number: int, scores: Sequence[GroupScores], lengths: Lengths | None) -> Outcome:
        item, place, alone = self.items[number], self.places[number], self.alone[number]
        found, candidates = scores[place.group], self.groups[place.group].candidates
        counts = [lengths(candidates[column]) for column in place.columns] if lengths else []
        blank = _taken(found.blank.tolist(), place)
        seen = [_taken(line, place) for line in found.logp.tolist()]
        shuffled = None if found.shuffled is None or not len(found.shuffled) else _taken(found.shuffled.tolist(), place)

        def row(values: Row) -> Row:
            return self.probe.row(item, values, blank, counts)

        consistent = [value for values in seen if (value := self.probe.consistency(item, values)) is not None]
        return Outcome(
            item,
            tuple(map(row, seen)),
            row(blank),
            None if shuffled is None else row(shuffled),
            sum(consistent) / len(consistent) if consistent else None,
            None if alone is None else self.probe.row(item, _taken(scores[alone.group].logp[0].tolist(), alone), (), ()),
        )


def _taken(values: Sequence[float], place: _Place) -> Row:
    return tuple(values[column] for column in place.columns)


def plan(items: Sequence[Item], probe: Probe) -> Plan:
    """Groups that hold the cells of all items. Items that show the same pictures share groups of at most MOST_CELLS texts.

    Raises DataError for an item with more cells than a group can have.
    """
    packing = _Packing()
    places = [packing.add(item.id, item.images, probe.cells(item)) for item in items]
    alone = [packing.add(f"{item.id}, options alone", ((),), cells) if (cells := probe.alone(item)) else None for item in items]
    return Plan(tuple(items), probe, packing.groups(), tuple(places), tuple(alone))


class _Packing:
    """Groups under construction: pictures -> the group that still has room, and its texts by what the engine takes for the same."""

    def __init__(self) -> None:
        self._started: list[tuple[str, tuple[Pictures, ...], dict[tuple[Prompt, str], tuple[int, Candidate]]]] = []
        self._open: dict[tuple[Pictures, ...], int] = {}

    def add(self, name: str, images: tuple[Pictures, ...], cells: Sequence[Candidate]) -> _Place:
        keyed = {(normalised_prompt(cell.prompt), normalised(cell.text)): cell for cell in cells}
        if len(keyed) > MAX_SIDE or len(keyed) * len(images) > MAX_CELLS:
            raise DataError(f"item {name!r} needs {len(keyed)} texts on {len(images)} images, more than a group can have; ask it otherwise")
        number = self._open.get(images, -1)
        if number < 0 or len(self._started[number][2].keys() | keyed.keys()) > MOST_CELLS:
            number = self._open[images] = len(self._started)
            self._started.append((name, images, {}))
        known = self._started[number][2]
        for key, cell in keyed.items():
            known.setdefault(key, (len(known), cell))
        return _Place(number, tuple(known[normalised_prompt(cell.prompt), normalised(cell.text)][0] for cell in cells))

    def groups(self) -> tuple[CounterfactualGroup, ...]:
        """The truth of a cell is the item's affair: of a group only the first cell is marked, as every group needs one."""
        made = []
        for name, images, known in self._started:
            match = tuple(tuple(1 if (i, c) == (0, 0) else None for c in range(len(known))) for i in range(len(images)))
            made.append(CounterfactualGroup(name, images, tuple(cell for _, cell in known.values()), match))
        return tuple(made)


# Generated text -------------------------------------------------------------------------------------------------------------------------

Say = Callable[[Pictures | None, str], str]
"""What a model writes, greedily, about pictures (None: a blank one) when it is asked a prompt."""


def generate(
    items: Sequence[Item],
    say: Say,
    parse: Parser = answer,
    shuffled: Sequence[Pictures | None] | None = None,
) -> list[Outcome]:
    """Outcomes of generated text: 1 for the text that was meant, 0 for the others, and 0 for all where it was none, which is wrong.

    ``shuffled`` gives another item's pictures for each item.
    """
    way = Generate()
    found = []
    for number, item in enumerate(items):
        asked, donor = way.asked(item), shuffled[number] if shuffled is not None else None
        said = tuple(say(pictures, asked) for pictures in item.images)
        found.append(written(item, said, say(None, asked), None if donor is None else say(donor, asked), parse))
    return found


def written(item: Item, said: Sequence[str], blank: str, shuffled: str | None, parse: Parser) -> Outcome:
    """The outcome of an item about which a model has written: about each image, a blank one and, if any, another item's."""

    def row(text: str) -> Row:
        meant = parse(text, item)
        return tuple(float(place == meant) for place in range(len(item.texts)))

    return Outcome(item, tuple(map(row, said)), row(blank), None if shuffled is None else row(shuffled), said=tuple(said))
