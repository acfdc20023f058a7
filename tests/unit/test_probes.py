"""Probes against naive twins: what is asked, and what log-likelihoods say."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.groups import Candidate, Pictures
from cfvlm_ds.evaluation.asking import MOST_CELLS, plan, written
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Item, Outcome
from cfvlm_ds.evaluation.benchmarks.parsers import PARSERS, answer
from cfvlm_ds.evaluation.probes import PROBES, Answers, Caption, Generate, Letters, Match, Probe, log_share, orders, variants
from cfvlm_ds.evaluation.scoring import GroupScores

A, B = (Path("a.png"),), (Path("b.png"),)
Model = Callable[[Pictures | None, str, str], float]
"""log p(text | pictures, prompt); None: a blank picture."""


def model(pictures: Pictures | None, prompt: str, text: str) -> float:
    """A log-likelihood that depends on everything, the same in every run."""
    digest = hashlib.sha256(f"{pictures}|{prompt}|{text}".encode()).digest()
    return -6 * int.from_bytes(digest[:6], "big") / 2**48


def ask(items: list[Item], probe: Probe, said: Model = model, lengths: bool = False) -> list[Outcome]:
    asked = plan(items, probe)
    scores = []
    for group in asked.groups:
        rows = [[said(pictures, c.prompt, c.text) for c in group.candidates] for pictures in group.images]
        blank = [said(None, c.prompt, c.text) for c in group.candidates]
        scores.append(GroupScores(*(torch.tensor(each, dtype=torch.float64) for each in (rows, blank))))
    return asked.outcomes(scores, (lambda candidate: len(candidate.text.split())) if lengths else None)


def close(found: Outcome, naive: Callable[[Pictures | None], list[float]]) -> None:
    """An outcome's tables are what a few lines say of each picture."""
    assert [list(row) for row in found.seen] == [pytest.approx(naive(pictures)) for pictures in found.item.images]
    assert list(found.blank) == pytest.approx(naive(None))


PAIR = Item("pair", (A, B), ("a cat", "a large dog"), ((1, 0), (0, 1)))
QUESTION = Item("question", (A,), YES_NO, ((1, 0),), "Is it red?")
CHOICE = Item("choice", (A,), ("red", "blue", "green"), ((0, 1, 0),), "Which colour?")
FIVE = Item("five", (B,), ("1", "2", "3", "4", "5"), ((0, 1, 0, 0, 0),), "How many?")
LISTED = Item("listed", (A,), ("A", "B"), ((0, 1),), "Which? A: one B: two", listed=True)


def test_caption_is_the_sum_the_mean_or_the_sum_without_the_prior():
    prompt = "Describe the image."
    close(ask([PAIR], Caption())[0], lambda p: [model(p, prompt, text) for text in PAIR.texts])
    close(ask([PAIR], Caption("mean"), lengths=True)[0], lambda p: [model(p, prompt, t) / len(t.split()) for t in PAIR.texts])
    close(ask([PAIR], Caption("pmi"))[0], lambda p: [model(p, prompt, t) - model(None, prompt, t) for t in PAIR.texts])
    assert ask([PAIR], Caption("pmi"))[0].blank == (0, 0), "blind, all texts are tied"
    assert plan([CHOICE], Caption()).groups[0].candidates[0] == Candidate("Which colour?", "red"), "a question is asked with its own prompt"


def test_match_is_the_share_of_yes():
    def naive(pictures: Pictures | None) -> list[float]:
        found = []
        for text in PAIR.texts:
            prompt = f'Does this figure show "{text}"? Please answer Yes or No.'
            yes, no = (
                sum(math.exp(model(pictures, prompt, word)) for word in words) for words in (("Yes", "yes", "YES"), ("No", "no", "NO"))
            )
            found.append(math.log(yes / (yes + no)))
        return found

    close(ask([PAIR], Match())[0], naive)
    braces = Item("braces", (A,), ("a {x} and {text}", "b"), ((1, 0),))
    assert plan([braces], Match()).groups[0].candidates[0].prompt.startswith('Does this figure show "a {x} and {text}"?')


def test_a_share_near_one_still_tells_scores_apart():
    assert log_share(0.0, math.log(3)) == pytest.approx(math.log(1 / 4)) and log_share(2.0, 2.0) == pytest.approx(math.log(1 / 2))
    assert log_share(60.0, 0.0) > log_share(50.0, 0.0) > log_share(40.0, 0.0) and log_share(-900.0, 0.0) == -900


def test_answers_sum_over_ways_of_writing():
    close(
        ask([QUESTION], Answers())[0],
        lambda p: [
            math.log(sum(math.exp(model(p, "Is it red?", way)) for way in ways)) for ways in (("Yes", "yes", "YES"), ("No", "no", "NO"))
        ],
    )
    close(ask([LISTED], Answers())[0], lambda p: [model(p, LISTED.prompt, letter) for letter in "AB"])
    assert (
        variants("A") == ("A",)
        and variants("two dogs") == ("two dogs", "Two dogs")
        and variants("5") == ("5",)
        and variants("Red") == ("Red", "red", "RED")
    )
    with pytest.raises(ConfigError, match="not a question"):
        plan([PAIR], Answers())


@pytest.mark.parametrize("item", [CHOICE, FIVE, PAIR], ids=lambda item: item.id)
def test_letters_average_over_orders(item):
    size = len(item.texts)
    asked = list(itertools.permutations(range(size))) if size <= 4 else [tuple((p + s) % size for p in range(size)) for s in range(size)]
    instruction = "Answer with the option's letter from the given choices directly."

    def shares(pictures: Pictures | None, order: tuple[int, ...]) -> dict[int, float]:
        listed = [f"{'ABCDE'[place]}. {item.texts[option]}" for place, option in enumerate(order)]
        prompt = "\n".join([item.prompt or "Which of these describes the image?", *listed, instruction])
        p = [math.exp(model(pictures, prompt, letter)) for letter in "ABCDE"[:size]]
        return {option: value / sum(p) for option, value in zip(order, p, strict=True)}

    def naive(pictures: Pictures | None) -> list[float]:
        rows = [shares(pictures, order) for order in asked]
        return [math.log(sum(row[option] for row in rows) / len(rows)) for option in range(size)]

    found = ask([item], Letters())[0]
    close(found, naive)
    agree = []
    for pictures in item.images:
        chosen = max(range(size), key=naive(pictures).__getitem__)
        rows = [shares(pictures, order) for order in asked]
        agree.append(sum(max(row, key=lambda option: row[option]) == chosen for row in rows) / len(rows))
    assert found.consistency == pytest.approx(sum(agree) / len(agree))
    assert orders(size) == asked


def test_letters_that_the_prompt_lists_keep_their_order():
    found = ask([LISTED], Letters())[0]
    close(found, lambda p: [model(p, LISTED.prompt, letter) for letter in "AB"])
    assert found.consistency is None


def test_questions_on_one_picture_share_a_group_and_equal_texts_a_cell():
    items = [Item(str(k), (A if k < 8 else B,), YES_NO, ((1, 0),), f"Is it {k % 4}?") for k in range(12)]
    asked = plan(items, Answers())
    assert [len(group.candidates) for group in asked.groups] == [4 * 6, 4 * 6], "questions 4 to 7 repeat 0 to 3"
    assert [group.images for group in asked.groups] == [(A,), (B,)] and len({group.id for group in asked.groups}) == 2
    together, apart = ask(items, Answers()), [ask([item], Answers())[0] for item in items]
    assert together == apart and together == list(reversed(ask(items[::-1], Answers())))


def test_groups_stay_within_bounds():
    many = [Item(str(k), (A,), YES_NO, ((1, 0),), f"Is it {k}?") for k in range(100)]
    asked = plan(many, Answers())
    assert max(len(group.candidates) for group in asked.groups) <= MOST_CELLS and sum(len(g.candidates) for g in asked.groups) == 600
    assert ask(many, Answers()) == [ask([item], Answers())[0] for item in many]
    huge = Item("huge", (A,), tuple(f"text {k}" for k in range(1025)), ((1, *[0] * 1024),), "Which?")
    with pytest.raises(DataError, match="group 'huge' has 1 images and 1025 texts"):
        plan([huge], Caption())
    with pytest.raises(ConfigError, match="26 letters"):
        plan([huge], Letters())


def test_a_question_without_a_picture_has_a_group_of_its_own():
    alone = Item("alone", ((),), YES_NO, ((1, 0),), "Is ice cold?")
    assert plan([alone, QUESTION], Answers()).groups[0].images == ((),)
    assert set(PROBES) == {"caption", "match", "letters", "yes_no", "generate", "write"}


# Generated text -------------------------------------------------------------------------------------------------------------------------


def test_generated_answers_are_scores():
    found = written(QUESTION, ["Yes, it is."], "I cannot tell", answer)
    assert (found.seen, found.blank) == (((1.0, 0.0),), (0.0, 0.0)), "what cannot be read is a tie, and wrong"
    asked = Generate().asked
    assert asked(LISTED) == LISTED.prompt and asked(CHOICE).startswith("Which colour?\nA. red\nB. blue\nC. green\n")
    assert written(CHOICE, ["(B) blue"], "", answer).seen == ((0.0, 1.0, 0.0),)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("B", 1),
        ("(b)", 1),
        ("B. blue", 1),
        ("The answer is B", 1),
        ("Answer: (C)", 2),
        ("A red one", None),
        ("The first", None),
        ("", None),
        ("D", None),
        ("a", 0),
    ],
)
def test_letters_are_parsed_strictly(said, meant):
    """An article is no option A, and The no T: both are faults of public evaluators."""
    assert answer(said, CHOICE) == meant


@pytest.mark.parametrize(
    ("rule", "said", "meant"),
    [
        ("", "yes", 0), ("", "No, there is not", 1), ("", "There is no cup", None), ("", "Nothing", None), ("", "", None),
        ("", '"Yes."', 0),
        ("pope", "There is no cup", 1), ("pope", "", 0), ("pope", "Yes. No doubt", 0), ("pope", "It is not, sadly", 1), ("pope", "none", 0),
        ("mme", "Yes.", 0), ("mme", "n", 1), ("mme", "x", None), ("mme", "Not so", 1), ("mme", "I see none", None),
        ("amber", "Yes", 0), ("amber", "yes", None), ("amber", "No.", None),
        ("naturalbench", "The answer is yes.", 0), ("naturalbench", "I see no cup. Yes, a bowl", 1), ("naturalbench", "Nothing", None),
        ("naturalbench", "", None),
    ],
)  # fmt: skip
def test_rules_of_the_authors(rule, said, meant):
    assert PARSERS.get(rule, answer)(said, QUESTION) == meant


@pytest.mark.parametrize(
    ("rule", "said", "meant"),
    [
        ("mmstar", "B", 1), ("mmstar", "(b) two", 1), ("mmstar", "Option A", 0), ("mmstar", "The answer is B", 1), ("mmstar", "C", None),
        ("mmstar", "", None),
        ("naturalbench", "The correct option is B.", 1), ("naturalbench", "B, not A", 1), ("naturalbench", "It shows a bus: B", 0),
        ("naturalbench", "Both", None),
    ],
)  # fmt: skip
def test_rules_of_the_authors_for_letters(rule, said, meant):
    assert PARSERS[rule](said, LISTED) == meant
