"""Probes: how an item of a benchmark becomes prompts and texts that a model scores, and what their log-likelihoods say of the item.

Every probe gives one score per image and text, so that the same metrics serve all. What it reads on the item's pictures it also reads on a
blank one and on another item's. Items that show the same pictures are put into one group, in which each text of a prompt stands once, so
that the pictures are encoded once.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import MAX_CELLS, MAX_SIDE, Candidate, CounterfactualGroup, Pictures, normalised
from cfvlm_ds.evaluation.benchmarks.base import Item, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import Parser, answer
from cfvlm_ds.evaluation.scoring import GroupScores

Row = tuple[float, ...]
Lengths = Callable[[Candidate], int]
"""Tokens of a candidate's text, as the model's own tokenizer has them."""

ALL_ORDERS = 4
"""Options of which all orders are asked; more are asked in cyclic orders."""
MOST_CELLS = 256
"""Texts of a group that several items share."""


class Probe(ABC):
    """A way of asking. ``cells`` are scored with the item's pictures, ``alone`` without any; ``row`` makes one score per text of an item of
    the log-likelihoods of its cells on one picture."""

    name: ClassVar[str]

    @abstractmethod
    def cells(self, item: Item) -> tuple[Candidate, ...]: ...

    @abstractmethod
    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        """``blank`` are the same cells on a blank picture, ``lengths`` the tokens of each; empty where nothing was counted."""

    def alone(self, item: Item) -> tuple[Candidate, ...]:
        return ()

    def consistency(self, item: Item, values: Row) -> float | None:
        """Share of the orders of options that agree with all of them together."""
        return None


@dataclass(frozen=True)
class Caption(Probe):
    """The log-likelihood of each text as what the model says of the picture: ``sum`` over tokens, ``mean`` per token, or ``pmi``, the sum
    minus that on a blank picture, which takes the prior of the text away.

    Args:
        mode: sum, mean or pmi.
        prompt: what an item without a question is asked.
    """

    name: ClassVar[str] = "caption"
    mode: Literal["sum", "mean", "pmi"] = "sum"
    prompt: str = "Describe the image."

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        return tuple(Candidate(item.prompt or self.prompt, text) for text in item.texts)

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        if self.mode == "sum":
            return values
        if self.mode == "pmi":
            return tuple(value - prior for value, prior in zip(values, blank, strict=True))
        if not lengths:
            raise ConfigError("the probe caption with mode mean needs the number of tokens of each text; choose sum or pmi")
        return tuple(value / length for value, length in zip(values, lengths, strict=True))


@dataclass(frozen=True)
class Match(Probe):
    """VQAScore (Lin et al. 2024, arXiv 2404.01291): log of P(yes) / (P(yes) + P(no)) for each text, each summed over ways of writing.

    Args:
        template: the question, with {text} in it.
    """

    name: ClassVar[str] = "match"
    template: str = 'Does this figure show "{text}"? Please answer Yes or No.'

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        answers = (*variants("Yes"), *variants("No"))
        asked = [self.template.replace("{text}", text) for text in item.texts]
        return tuple(Candidate(prompt, text) for prompt in asked for text in answers)

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        yes, size = len(variants("Yes")), len(variants("Yes")) + len(variants("No"))
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        return tuple(log_share(_together(part[:yes]), _together(part[yes:])) for part in parts)


@dataclass(frozen=True)
class Answers(Probe):
    """The likelihood of each text of an item as the answer to its question, summed over ways of writing it: yes and no, or a letter."""

    name: ClassVar[str] = "yes_no"

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        _need_question(item, self.name)
        return tuple(Candidate(item.prompt, written) for text in item.texts for written in variants(text))

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        left, found = iter(values), []
        for text in item.texts:
            found.append(_together([next(left) for _ in variants(text)]))
        return tuple(found)


@dataclass(frozen=True)
class Letters(Probe):
    """Multiple choice by the letter of an option: the log of its probability among the letters, averaged over orders of the options.

    All orders of up to four options, cyclic ones of more: each option stands at each place equally often, so a liking for a place or a
    letter is no advantage. ``alone`` asks without question and picture: what the options themselves say.

    Args:
        question: what an item without a question, one of captions, is asked.
        instruction: what follows the options.
        prior: also ask for the options alone.
    """

    name: ClassVar[str] = "letters"
    question: str = "Which of these describes the image?"
    instruction: str = "Answer with the option's letter from the given choices directly."
    prior: bool = True

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        if item.listed:
            return tuple(Candidate(item.prompt, text) for text in item.texts)
        return self._asked(item, item.prompt or self.question)

    def alone(self, item: Item) -> tuple[Candidate, ...]:
        return self._asked(item, "") if self.prior and not item.listed else ()

    def _asked(self, item: Item, question: str) -> tuple[Candidate, ...]:
        return tuple(
            Candidate(self.asked(item, order, question), _letter(place))
            for order in orders(len(item.texts))
            for place in range(len(item.texts))
        )

    def asked(self, item: Item, order: Sequence[int], question: str) -> str:
        """The question with the options in an order."""
        listed = [f"{_letter(place)}. {item.texts[number]}" for place, number in enumerate(order)]
        return "\n".join([*filter(None, [question]), *listed, self.instruction])

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        if item.listed:
            return values
        per_order = self._per_order(item, values)
        return tuple(_together([row[number] for row in per_order]) - math.log(len(per_order)) for number in range(len(item.texts)))

    def consistency(self, item: Item, values: Row) -> float | None:
        if item.listed:
            return None
        chosen, per_order = _only_best(self.row(item, values, (), ())), self._per_order(item, values)
        return sum(chosen is not None and _only_best(row) == chosen for row in per_order) / len(per_order)

    def _per_order(self, item: Item, values: Row) -> list[Row]:
        """[order][option]: log-probability of the option among the letters."""
        size, found = len(item.texts), []
        for number, order in enumerate(orders(size)):
            part = values[number * size : (number + 1) * size]
            whole = _together(part)
            by_option = {option: value - whole for option, value in zip(order, part, strict=True)}
            found.append(tuple(by_option[option] for option in range(size)))
        return found


PROBES: dict[str, Probe] = {"caption": Caption(), "match": Match(), "letters": Letters(), "yes_no": Answers()}
"""Name -> probe with its defaults. ``generate`` needs a model that writes, and is the function of that name."""


def variants(text: str) -> tuple[str, ...]:
    """Ways of writing an answer that mean the same: its case. A single letter has one.

    White space before an answer is not among them: the chat template writes what stands there, and a text that brings more would not
    follow its prompt.
    """
    if len(text) == 1:
        return (text,)
    ways = (text, text.lower(), text[:1].upper() + text[1:], *([text.upper()] if len(text.split()) == 1 else []))
    return tuple(dict.fromkeys(ways))


def orders(size: int) -> list[tuple[int, ...]]:
    """Orders in which so many options are asked."""
    if size <= ALL_ORDERS:
        return list(itertools.permutations(range(size)))
    return [tuple((place + shift) % size for place in range(size)) for shift in range(size)]


def log_share(first: float, second: float) -> float:
    """log(exp(first) / (exp(first) + exp(second))), also where the share is 1 but for less than a float can say."""
    margin = first - second
    return -math.log1p(math.exp(-margin)) if margin > 0 else margin - math.log1p(math.exp(margin))


def _together(values: Sequence[float]) -> float:
    """log of the sum of exponentials."""
    most = max(values)
    if not math.isfinite(most):
        return most
    return most + math.log(sum(math.exp(value - most) for value in values))


def _only_best(row: Row) -> int | None:
    best = max(row)
    return row.index(best) if row.count(best) == 1 else None


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _need_question(item: Item, name: str) -> None:
    if not item.prompt:
        raise ConfigError(f"item {item.id!r} is a caption and no question; the probe {name} cannot ask it, choose match or caption")


# Items to groups and back ---------------------------------------------------------------------------------------------------------------


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
        self._started: list[tuple[str, tuple[Pictures, ...], dict[tuple[str, str], tuple[int, Candidate]]]] = []
        self._open: dict[tuple[Pictures, ...], int] = {}

    def add(self, name: str, images: tuple[Pictures, ...], cells: Sequence[Candidate]) -> _Place:
        keyed = {(normalised(cell.prompt), normalised(cell.text)): cell for cell in cells}
        if len(keyed) > MAX_SIDE or len(keyed) * len(images) > MAX_CELLS:
            raise DataError(f"item {name!r} needs {len(keyed)} texts on {len(images)} images, more than a group can have; ask it otherwise")
        number = self._open.get(images, -1)
        if number < 0 or len(self._started[number][2].keys() | keyed.keys()) > MOST_CELLS:
            number = self._open[images] = len(self._started)
            self._started.append((name, images, {}))
        known = self._started[number][2]
        for key, cell in keyed.items():
            known.setdefault(key, (len(known), cell))
        return _Place(number, tuple(known[normalised(cell.prompt), normalised(cell.text)][0] for cell in cells))

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
    letters: Letters | None = None,
) -> list[Outcome]:
    """Outcomes of generated text: 1 for the text that was meant, 0 for the others, and 0 for all where it was none, which is wrong.

    ``shuffled`` gives another item's pictures for each item. Options that a prompt does not list are listed by ``letters`` in the released
    order.
    """
    letters = letters or Letters()
    found = []
    for number, item in enumerate(items):
        asked = (
            item.prompt if item.listed or _is_yes_no(item) else letters.asked(item, range(len(item.texts)), item.prompt or letters.question)
        )

        def row(pictures: Pictures | None, item: Item = item, asked: str = asked) -> Row:
            meant = parse(say(pictures, asked), item)
            return tuple(float(place == meant) for place in range(len(item.texts)))

        donor = shuffled[number] if shuffled is not None else None
        found.append(Outcome(item, tuple(map(row, item.images)), row(None), None if donor is None else row(donor)))
    return found


def _is_yes_no(item: Item) -> bool:
    return [text.lower() for text in item.texts] == ["yes", "no"]
