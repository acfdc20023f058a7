"""Numbers of things: which are counted, what others they may have, and what agrees with them."""

from __future__ import annotations

from collections.abc import Iterator

from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Change, Choose
from cfvlm_ds.counterfactuals.propose.caption import Caption, Phrase
from cfvlm_ds.counterfactuals.propose.grammar import agreeing, is_plural, renumbered
from cfvlm_ds.counterfactuals.propose.siblings import word_set


def count(caption: Caption, choose: Choose) -> Iterator[Change]:
    for determiner, nouns, known in _counted(caption):
        word, noun = caption.words[determiner], caption.words[nouns]
        number = int(word) if word.isdecimal() else v.NUMBERS[word]
        options = {v.NUMBER_WORDS[n]: n for n in _numbers(caption, number, determiner, noun)}
        for new in choose(list(options)):
            changes = {determiner: str(options[new]) if word.isdecimal() else new}
            if (number == 1) != (options[new] == 1):
                agreed = None if known is None else _agreement(caption, known, options[new] > 1)
                if agreed is None:
                    continue
                changes |= agreed
            many = renumbered(noun, True) or noun
            yield changes, f"Change the number of {many} from {number} to {options[new]}."


def _numbers(caption: Caption, number: int, determiner: int, noun: str) -> list[int]:
    """Numbers that may stand in place of one: near ones, as a plate with one fork has no five."""
    before, fixed = caption.word(determiner - 1), noun in _FIXTURES
    most = 3 if fixed or before in _HELD else 5
    step = 1 if fixed else 2
    found = [n for n in (1, 2, 3, 4, 5) if n != number and n <= max(most, number) and (abs(n - number) <= step or number > n >= 4)]
    return [n for n in found if n > 1 or not (before == "of" and caption.word(determiner - 2) in _GROUPS)]


def _counted(caption: Caption) -> Iterator[tuple[int, int, Phrase | None]]:
    """Places of a number and of the noun that it counts, with the noun's phrase; None for several things of a kind that is not listed,
    such as three fire hydrants."""
    if v.FIXING_A_NUMBER & set(caption.words) or caption.words.count("one") > 1:  # two, one of them red and one blue
        return
    phrases = {phrase.determiner: phrase for phrase in caption.phrases if phrase.determiner is not None}
    for place, word in enumerate(caption.words):
        number = int(word) if word.isdecimal() and len(word) == 1 else v.NUMBERS.get(word, 0)
        if (
            not number
            or "between" in (caption.word(place - 1), caption.word(place - 2))  # two things, and among more
            or caption.word(place - 1) in _NO_COUNT
            or caption.words.count(word) > 1
            or caption.is_named(place)
        ):
            continue
        phrase = phrases.get(place)
        further = [k for k in (place + 2, place + 3) if k < len(caption.words) and caption.ends(k + 1)]
        noun = phrase.noun if phrase is not None else next(iter(further), 0)
        said = caption.words[place + 1 : noun + 1]
        if (
            not noun
            or set(said) & (v.UNITS | v.OF_BODY)
            or (len(said) > 1 and said[0] in v.MEASURES)
            or said[-1].endswith("ss")
            or not all(each.isalpha() for each in said)
            or (said[-1] in v.PEOPLE and v.RIDDEN_BY_FEW & set(caption.words))
            or caption.is_aside(place)
            or _is_told(caption, noun + 1)
        ):
            continue
        if phrase is None and (number == 1 or not is_plural(said[-1]) or set(said) & (v.FOLLOWING | v.DETERMINERS)):
            continue
        many = phrase is None or phrase.known is not None or said[-1].endswith(("s", "people", "children"))
        if phrase is None or ((number > 1) == (phrase.plural is True) and (number == 1 or many)):
            yield place, noun, phrase


_NO_COUNT = v.NUMBERED | word_set("all every bus or back war least most than over nearly almost about around a an")
"""Before a number: it is not counted, or belongs to an article."""
_GROUPS = word_set("group groups couple pair set stack row rows bunch pile line herd team trio family collection crowd party")
_FIXTURES = word_set(
    """sink sinks toilet toilets urinal urinals oven ovens stove stoves refrigerator refrigerators microwave microwaves bed beds couch
    couches sofa sofas television televisions tv tvs monitor monitors computer computers laptop laptops clock clocks tub tubs
    shower showers fireplace desk desks keyboard keyboards"""
)
"""Of which a place has hardly more: one more or one less."""
_HELD = word_set(
    "holding holds hold held carrying carries carry wearing using petting pet pets feeding feeds riding pushing walking washing"
)


def _is_told(caption: Caption, place: int) -> bool:
    """Whether those who are counted are told one by one behind a mark: two people, a man and a woman."""
    return caption.words[place : place + 1] in ([","], [":"], ["-"]) and caption.word(place + 1) in ("a", "an", "one", "the", "both")


def _agreement(caption: Caption, phrase: Phrase, plural: bool) -> dict[int, str] | None:
    """What changes with the number of a noun: itself and its verb; None where that is not certain."""
    noun = renumbered(caption.words[phrase.noun], plural)
    after, before = caption.word(phrase.noun + 1), caption.word(phrase.start - 1)
    if noun is None or v.THEIR & set(caption.words) or (after == "and" and {"is", "are", "was", "were"} & set(caption.words)):
        return None
    if before == "the" or _shared(caption, phrase, plural):
        return None
    changes = {phrase.noun: noun}
    if before in ("is", "are", "was", "were") and caption.word(phrase.start - 2) == "there":
        changes[phrase.start - 1] = {"is": "are", "are": "is", "was": "were", "were": "was"}[before]
    if not after or after.endswith("ing") or (after.endswith("ed") and after not in v.NOT_VERBS):
        return changes
    if after in _PREPOSITIONS or after in ("left", "right"):  # "near" is a verb, too
        return changes
    if after in v.ADJECTIVES:
        return changes if after == "full" else None  # "two doors open" may be a verb
    verb = None if before == "and" else agreeing(after, plural)  # two customers and an employee interact
    return None if verb is None else changes if verb == after else changes | {phrase.noun + 1: verb}


def _shared(caption: Caption, phrase: Phrase, plural: bool) -> bool:
    """Whether one and many differ in what they have, too: two girls hold umbrellas, and one of them holds no umbrellas."""
    rest = caption.words[phrase.noun + 1 :]
    if any(word in _HAVING for word in rest[:2]):
        return True
    near = [word for word in rest[:4] if len(word) > 3 and word.endswith("s") and word not in v.FOLLOWING]
    return not plural and any(is_plural(word) for word in (*near, *(word for word in rest if word in v.NOUNS)))


_HAVING = v.FOLLOWING & {"has", "have", "with"} | {"wearing", "holding", "carrying", "riding", "wears", "wear", "hold", "holds", "throwing"}
_PREPOSITIONS = v.FOLLOWING - set(
    ["is", "are", "was", "were", "has", "have", "that", "which", "who", "sit", "sits", "stand", "stands", "lie", "lies", "like"]
)
