"""Numbers of things: which are counted, and what others they may have. One is left alone: what agrees with it would change too."""

from __future__ import annotations

from collections.abc import Iterator

from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Change, Choose
from cfvlm_ds.counterfactuals.propose.caption import Caption
from cfvlm_ds.counterfactuals.propose.grammar import is_finite, is_plural
from cfvlm_ds.counterfactuals.propose.siblings import word_set


def count(caption: Caption, choose: Choose) -> Iterator[Change]:
    for place, noun in _counted(caption):
        word = caption.words[place]
        for new in choose(_instead(caption, word, place, noun)):
            new = str(v.NUMBERS[new]) if word.isdecimal() else new
            yield {place: new}, f"Change the number of {caption.words[noun]} from {word} to {new}."
    for place, noun in _grouped(caption):
        for new in choose(["two"]):
            yield {place: new, place + 1: "", place + 2: ""}, f"Show {new} {caption.words[noun]} and not a group."


def _instead(caption: Caption, word: str, place: int, noun: int) -> list[str]:
    """Numbers that may stand in place of one: near ones, as a plate with two forks has no five. Several are three or more."""
    if word == "several":
        return ["two"]
    number = int(word) if word.isdecimal() else v.NUMBERS[word]
    fixed = caption.words[noun] in _FIXTURES
    most, step = 3 if fixed or caption.word(place - 1) in _HELD else 5, 1 if fixed else 2
    found = [
        each
        for each, n in v.NUMBERS.items()
        if 1 < n <= max(most, number, 2) and n <= 5 and n != number and (abs(n - number) <= step or number > n >= 4)
    ]
    if word != "two" or fixed:
        return found
    together = caption.words[noun] in v.PEOPLE | v.ANIMATE and not v.OF_TWO & set(caption.words) and _begins(caption, place, noun)
    return [*found, "several", *(["a group of"] if together else [])]


def _grouped(caption: Caption) -> Iterator[tuple[int, int]]:
    """Places of "a group of" and of the people or animals that it is of, where two could do the same and no verb says that it is one."""
    for place in range(len(caption.words) - 3):
        if caption.words[place : place + 3] == ["a", "group", "of"] and not v.OF_A_GROUP & set(caption.words):
            phrase = next((each for each in caption.phrases if each.start == place + 3), None)
            if phrase is None or caption.words[phrase.noun] not in v.PEOPLE | v.ANIMATE or not is_plural(caption.words[phrase.noun]):
                continue
            after = caption.word(phrase.noun + 1)
            if _begins(caption, place, phrase.noun) and (not is_finite(after, False) or after in v.FOLLOWING):
                yield place, phrase.noun


def _begins(caption: Caption, place: int, noun: int) -> bool:
    """Whether a caption begins here with those who are counted, and nobody else beside them."""
    known = any(phrase.noun == noun and phrase.start in (place, place + 3) for phrase in caption.phrases)
    return place == 0 and known and caption.word(noun + 1) != "and"


def _counted(caption: Caption) -> Iterator[tuple[int, int]]:
    """Places of a number and of the plural that it counts: of a phrase, or of several things of a kind that is not listed, such as three
    fire hydrants."""
    of_each = caption.words.count("one") > 1 or _tells_each(caption)  # two, one of them red and one blue
    if of_each or v.FIXING_A_NUMBER & set(caption.words):
        return
    phrases = {phrase.determiner: phrase for phrase in caption.phrases if phrase.determiner is not None}
    for place, word in enumerate(caption.words):
        number = word == "several" or (int(word) if word.isdecimal() and len(word) == 1 else v.NUMBERS.get(word, 0)) > 1
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
        ):
            continue
        if phrase is None and (not is_plural(said[-1]) or set(said) & (v.FOLLOWING | v.DETERMINERS)):
            continue
        if phrase is None or phrase.known is not None or said[-1].endswith(("s", "people", "children")):
            yield place, noun


_NO_COUNT = v.NUMBERED | word_set(
    """all every bus or back war least most than over twenty thirty forty fifty sixty seventy eighty ninety hundred nearly almost about
    around a an"""
)
"""Before a number: it is not counted, or belongs to an article."""
_FIXTURES = word_set(
    """sink sinks toilet toilets urinal urinals oven ovens stove stoves refrigerator refrigerators microwave microwaves bed beds couch
    couches sofa sofas television televisions tv tvs monitor monitors computer computers laptop laptops clock clocks tub tubs
    shower showers fireplace desk desks keyboard keyboards"""
)
"""Of which a place has hardly more: one more or one less."""
_HELD = word_set(
    "holding holds hold held carrying carries carry wearing using petting pet pets feeding feeds riding pushing walking washing"
)


def _tells_each(caption: Caption) -> bool:
    """Whether those who are counted are told one by one behind a mark: two people, a man and a woman."""
    words = caption.words
    marks = [k for k in range(len(words) - 2) if words[k] in (",", ":", "-", "(") and not v.NUMBERS.keys().isdisjoint(words[:k])]
    return any(words[k + 1] in _FIRST and words[k + 2] in _EACH for k in marks)


_FIRST = word_set("a an one the both two three four")
_EACH = v.PEOPLE | v.ANIMATE | {"in", "is", "has", "with", "of", "on", "wearing", "holding"}
