"""Probes: ways to query a model about a benchmark item. A probe converts the item into prompts, and the model's log-likelihoods or
generated texts into item scores.

Every probe returns one score per image and text, so the same metrics apply to all probes. An item is scored on its own images and on a
blank image (cfvlm_ds.evaluation.asking).
"""

from __future__ import annotations

import itertools
import math
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.groups import Candidate
from cfvlm_ds.evaluation.benchmarks.base import Item

Row = tuple[float, ...]
LETTERS = string.ascii_uppercase
ALL_ORDERS = 4
"""Maximum number of options for which all orders are used. If there are more, only cyclic orders are used."""


class Probe(ABC):
    """Base class of probes that score texts by likelihood. ``cells`` returns the prompts and texts to score on the item's images."""

    name: ClassVar[str]

    @abstractmethod
    def cells(self, item: Item) -> tuple[Candidate, ...]: ...

    @abstractmethod
    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        """Return one score per text of an item. ``values`` holds the log-likelihoods of the item's ``cells`` on one image.

        ``blank`` holds the log-likelihoods of the same texts on a blank image. ``lengths`` gives each text's number of tokens, or is empty
        if tokens were not counted.
        """

    def consistency(self, item: Item, values: Row) -> float | None:
        """Return the share of option orders in which the model chooses the option with the highest mean probability over all orders; None
        if the order is fixed.
        """
        return None


@dataclass(frozen=True)
class Caption(Probe):
    """Log-likelihood of each text as a description of the picture.

    Args:
        mode: ``sum`` over tokens, ``mean`` over tokens, or ``pmi``: the sum minus the sum on a blank image, which removes the prior.
        prompt: prompt for items without a question.
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
        return tuple(value / length for value, length in zip(values, lengths, strict=True))


@dataclass(frozen=True)
class Match(Probe):
    """VQAScore (Lin et al. 2024, arXiv 2404.01291): the log of P(yes) / (P(yes) + P(no)) for each text. P(yes) and P(no) are summed over
    spellings.

    Args:
        template: question with the placeholder {text}.
    """

    name: ClassVar[str] = "match"
    template: str = 'Does this figure show "{text}"? Please answer Yes or No.'

    def __post_init__(self) -> None:
        if "{text}" not in self.template:
            raise ConfigError(f"template must be a text with {{text}} in it, not {self.template!r}")

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        answers = (*variants("Yes"), *variants("No"))
        prompts = [self.template.replace("{text}", text) for text in item.texts]
        return tuple(Candidate(prompt, text) for prompt in prompts for text in answers)

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        yes, size = len(variants("Yes")), len(variants("Yes")) + len(variants("No"))
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        return tuple(log_share(_log_sum_exp(part[:yes]), _log_sum_exp(part[yes:])) for part in parts)


@dataclass(frozen=True)
class Answers(Probe):
    """Log-likelihood of each text (such as yes, no or a letter), in any of its spellings, as the answer to the item's question."""

    name: ClassVar[str] = "yes_no"

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        if not item.prompt:
            raise ConfigError(
                f"item {item.id!r} is a caption, not a question, so the probe {self.name} cannot be used; choose match or caption"
            )
        return tuple(Candidate(item.prompt, written) for text in item.texts for written in variants(text))

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        remaining, scores = iter(values), []
        for text in item.texts:
            scores.append(_log_sum_exp([next(remaining) for _ in variants(text)]))
        return tuple(scores)


@dataclass(frozen=True)
class Letters(Probe):
    """Multiple choice by letter. In each order of the options, the probability of an option's letter is normalised over the letters of all
    options. The option's score is the log of the mean of these probabilities over the orders.

    Up to four options are presented in all orders, and more than four only in cyclic orders. Each option takes each position equally
    often, so a bias of the model towards a position or a letter favours no option.

    Args:
        question: question for items that have none, such as captions.
        instruction: text that follows the options.
    """

    name: ClassVar[str] = "letters"
    question: str = "Which of these describes the image?"
    instruction: str = "Answer with the option's letter from the given choices directly."

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        if item.listed:
            return tuple(Candidate(item.prompt, text) for text in item.texts)
        if len(item.texts) > len(LETTERS):
            raise ConfigError(
                f"item {item.id!r} has {len(item.texts)} options, but there are only {len(LETTERS)} letters; choose another probe"
            )
        return tuple(
            Candidate(self.asked(item, order), LETTERS[place]) for order in orders(len(item.texts)) for place in range(len(item.texts))
        )

    def asked(self, item: Item, order: Sequence[int]) -> str:
        """Return the prompt: the question, the options in the given order, and the instruction."""
        listed = [f"{LETTERS[place]}. {item.texts[number]}" for place, number in enumerate(order)]
        return "\n".join([item.prompt or self.question, *listed, self.instruction])

    def row(self, item: Item, values: Row, blank: Row, lengths: Sequence[int]) -> Row:
        if item.listed:
            return values
        per_order = self._per_order(item, values)
        return tuple(_log_sum_exp([row[number] for row in per_order]) - math.log(len(per_order)) for number in range(len(item.texts)))

    def consistency(self, item: Item, values: Row) -> float | None:
        if item.listed:
            return None
        chosen, per_order = _only_best(self.row(item, values, (), ())), self._per_order(item, values)
        return sum(chosen is not None and _only_best(row) == chosen for row in per_order) / len(per_order)

    def _per_order(self, item: Item, values: Row) -> list[Row]:
        """Return the log-probability of each option's letter among all letters, indexed [order][option]."""
        size, rows = len(item.texts), []
        for number, order in enumerate(orders(size)):
            part = values[number * size : (number + 1) * size]
            total = _log_sum_exp(part)
            by_option = {option: value - total for option, value in zip(order, part, strict=True)}
            rows.append(tuple(by_option[option] for option in range(size)))
        return rows


@dataclass(frozen=True)
class Generate:
    """Greedy generation of an answer, which is parsed by the benchmark authors' rule if they published one. No cells are scored.

    Args:
        max_new_tokens: maximum length of an answer in tokens.
    """

    name: ClassVar[str] = "generate"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"the probe {self.name} must generate at least 1 token, not {self.max_new_tokens}; correct max_new_tokens")

    def asked(self, item: Item) -> str:
        """Return the prompt of an item. The options are appended in the benchmark's order, unless the prompt already lists them or they are
        yes and no.
        """
        if item.listed or [text.lower() for text in item.texts] == ["yes", "no"]:
            return item.prompt
        return Letters().asked(item, range(len(item.texts)))

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        """Return the prompt with an arbitrary answer as the only cell, because the item check and the scoring plan need one."""
        return (Candidate(self.asked(item), item.texts[0]),)


@dataclass(frozen=True)
class Write(Generate):
    """Greedy generation of a description, in which the benchmark counts the objects mentioned.

    Args:
        prompt: prompt for items that have none.
        max_new_tokens: maximum length of a description in tokens.
    """

    name: ClassVar[str] = "write"
    max_new_tokens: int = 512
    prompt: str = "Please describe this image in detail."

    def asked(self, item: Item) -> str:
        return item.prompt or self.prompt

    def cells(self, item: Item) -> tuple[Candidate, ...]:
        return (Candidate(self.asked(item), "A"),)


PROBES: dict[str, Probe | Generate] = {
    "caption": Caption(), "match": Match(), "letters": Letters(), "yes_no": Answers(), "generate": Generate(), "write": Write(),
}  # fmt: skip
"""Name -> probe with default options."""


def variants(text: str) -> tuple[str, ...]:
    """Return the spellings of an answer, which differ in case. A single letter has only one spelling.

    White space before an answer does not vary, because the chat template determines it.
    """
    if len(text) == 1:
        return (text,)
    ways = (text, text.lower(), text[:1].upper() + text[1:], *([text.upper()] if len(text.split()) == 1 else []))
    return tuple(dict.fromkeys(ways))


def orders(size: int) -> list[tuple[int, ...]]:
    """Return the orders in which ``size`` options are presented, each as a tuple of option indices."""
    if size <= ALL_ORDERS:
        return list(itertools.permutations(range(size)))
    return [tuple((place + shift) % size for place in range(size)) for shift in range(size)]


def log_share(first: float, second: float) -> float:
    """Return log(exp(first) / (exp(first) + exp(second))), computed accurately even for shares that round to 1."""
    margin = first - second
    return -math.log1p(math.exp(-margin)) if margin > 0 else margin - math.log1p(math.exp(margin))


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    if not math.isfinite(most):
        return most
    return most + math.log(sum(math.exp(value - most) for value in values))


def _only_best(row: Row) -> int | None:
    best = max(row)
    return row.index(best) if row.count(best) == 1 else None
