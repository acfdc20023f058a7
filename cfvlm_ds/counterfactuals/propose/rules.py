"""Edits of captions by closed lists and whole words: few are proposed, and those are meant to be right.

"man" never meets "woman", "left" is no verb, a "hot dog" is no dog: a word is changed only where the words around it say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source, drawn
from cfvlm_ds.counterfactuals.propose.caption import OF_KIND, Caption, Phrase
from cfvlm_ds.counterfactuals.propose.grammar import absent, agreeing, article, renumbered, versions
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, SYNONYMS, defect, difference

VERSION = 1
"""Raised when the same caption gets other edits than before."""

Change = tuple[dict[int, str], str]
"""New words by place, and what an editor of pictures is told."""

_RELATION = re.compile(
    r"\b(?:" + "|".join(sorted({re.escape(p) for pair in v.RELATIONS for p in pair}, key=len, reverse=True)) + r")\b", re.IGNORECASE
)
_OPPOSITE: dict[str, str] = {}
for _first, _second in v.RELATIONS:
    _OPPOSITE.setdefault(_first, _second)
    _OPPOSITE.setdefault(_second, _first)
_NEAR = {word: frozenset().union(*(group for group in v.NEAR_COLOURS if word in group)) for word in v.COLOURS_READ}
_ALIKE = {word: frozenset().union(*(group for group in v.ALIKE if word in group)) for _, word, _ in v.NOUNS.values()}


class Rules:
    """The back end ``rules``."""

    threads = 1

    def __init__(self, context: Context) -> None:
        options = context.options
        self._types, self._per_type, self._seed, self._words = options.wanted, options.per_type, options.seed, context.words
        for kind, words in self._words.items():
            if kind not in _KINDS:
                raise ConfigError(f"--words: {kind!r} has no list of words; there are {', '.join(_KINDS)}")
            if kind == "object" and (unknown := [word for word in words if word not in v.NOUNS]):
                raise ConfigError(f"--words: the forms of {unknown[0]!r} are not known; name listed nouns")

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION, "words": {kind: list(words) for kind, words in self._words.items()}, **versions()}

    def notice(self) -> str:
        """What is not proposed because something is not installed."""
        return absent()

    def propose(self, source: Source) -> Found:
        """Proposals of each type, and why there is none where one reason is true of the whole caption."""
        if len(source.caption) > MOST_CHARACTERS or printable(source.caption) != source.caption:
            return [Rejected("rules", "no caption of one printable line")]
        caption = Caption(source.caption)
        if any(word in v.NEGATIONS or word.endswith("n't") for word in caption.words):
            return [Rejected("rules", "a negation")]
        found: list[Proposal | Rejected] = []
        for kind in self._types:
            made = 0
            for changes, told in self._changes(kind, caption, source.id):
                if made >= self._per_type:
                    break
                proposal = self._proposal(kind, caption, changes, told)
                if proposal is not None and all(proposal.text != other.text for other in found):
                    found.append(proposal)
                    made += 1
        return found or [Rejected("rules", "nothing to edit")]

    def _proposal(self, kind: str, caption: Caption, changes: dict[int, str], told: str) -> Proposal | None:
        text = caption.with_words(changes)
        if defect(caption.text, text, kind) is not None:
            return None
        differs = difference(caption.text, text)
        return Proposal(kind, text, " ".join(differs.before), " ".join(differs.after), told or f"Make the picture show: {text}", "rules")

    def _changes(self, kind: str, caption: Caption, name: str) -> Iterator[Change]:
        if kind not in _MAKERS:
            return iter(())

        def choose(options: Sequence[str]) -> list[str]:
            allowed = self._words.get(kind)
            said = {SYNONYMS.get(word, word) for word in caption.words}
            kept = [option for option in options if (allowed is None or option in allowed) and SYNONYMS.get(option, option) not in said]
            return drawn(self._seed, f"{name}/{kind}", kept)

        return _MAKERS[kind](caption, choose)


Choose = Callable[[Sequence[str]], list[str]]


def _colour(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "colour"):
        (place,) = caption.said_of(phrase, "colour")
        old = caption.words[place]
        for new in choose([colour for colour in v.COLOURS if colour not in _NEAR[old]]):
            yield {place: new}, f"Change the colour of the {caption.words[phrase.noun]} from {old} to {new}."


def _size(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "size"):
        (place,) = caption.said_of(phrase, "size")
        old = caption.words[place]
        for new in choose([v.SIZES[old]]):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {old}."


def _material(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "material"):
        (place,) = caption.said_of(phrase, "material")
        for new in choose([each for each in v.MATERIALS if {each, caption.words[place]} != {"stone", "brick"}]):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {caption.words[place]}."


def _texture(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "texture"):
        (place,) = caption.said_of(phrase, "texture")
        old, of_shape = caption.words[place], phrase.known is not None and phrase.known[0] == "shape"
        options = [each for each in v.TEXTURES if each not in v.TEXTURES_AGAINST.get(old, ())]
        for new in choose(
            [each for each in options if each in (("striped", "dotted", "hollow") if of_shape else ("striped", "dotted", "plaid"))]
        ):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {old}."


def _describable(caption: Caption, kind: str) -> Iterator[Phrase]:
    """Phrases with one adjective of a kind, whose noun can be one way or another."""
    for phrase in caption.phrases:
        noun = caption.words[phrase.noun]
        if len(caption.said_of(phrase, kind)) != 1 or noun in v.PEOPLE:
            continue
        fixed = {
            "colour": noun in v.FIXED_COLOUR,
            "size": noun in v.NOT_SIZED or caption.word(phrase.noun + 1) == "of",
            "material": noun not in v.TOUCHABLE,
            "texture": phrase.known is not None and phrase.known[0] == "animal",
        }
        if not fixed[kind]:
            yield phrase


def _count(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in caption.phrases:
        if phrase.determiner is None:
            continue
        word, noun = caption.words[phrase.determiner], caption.words[phrase.noun]
        number = int(word) if word.isdecimal() and len(word) == 1 else v.NUMBERS.get(word, 0)
        before = caption.word(phrase.determiner - 1)
        if (
            not number
            or noun in v.UNITS
            or before in ("number", "route", "all", "every", "channel", "flight", "bus")
            or noun.endswith("ss")
        ):
            continue
        if (number > 1) != (phrase.plural is True) or (
            number > 1 and phrase.known is None and not noun.endswith(("s", "people", "children"))
        ):
            continue
        options = {v.NUMBER_WORDS[n]: n for n in (1, 2, 3, 4, 5) if n != number}
        for new in choose(list(options)):
            changes = {phrase.determiner: str(options[new]) if word.isdecimal() else new}
            if (number == 1) != (options[new] == 1):
                agreed = _agreement(caption, phrase, options[new] > 1)
                if agreed is None:
                    continue
                changes |= agreed
            many = renumbered(noun, True) or noun
            yield changes, f"Change the number of {many} from {number} to {options[new]}."


def _agreement(caption: Caption, phrase: Phrase, plural: bool) -> dict[int, str] | None:
    """What changes with the number of a noun: itself and its verb; None where that is not certain."""
    noun = renumbered(caption.words[phrase.noun], plural)
    after, before = caption.word(phrase.noun + 1), caption.word(phrase.start - 1)
    if noun is None or v.THEIR & set(caption.words) or (after == "and" and {"is", "are", "was", "were"} & set(caption.words)):
        return None
    changes = {phrase.noun: noun}
    if before in ("is", "are", "was", "were") and caption.word(phrase.start - 2) == "there":
        changes[phrase.start - 1] = {"is": "are", "are": "is", "was": "were", "were": "was"}[before]
    if not after or after.endswith("ing") or (after.endswith("ed") and after not in v.NOT_VERBS):
        return changes
    if after in _PREPOSITIONS:  # "near" is a verb, too
        return changes
    verb = agreeing(after, plural)
    return None if verb is None else changes if verb == after else changes | {phrase.noun + 1: verb}


_PREPOSITIONS = v.FOLLOWING - set(
    ["is", "are", "was", "were", "has", "have", "that", "which", "who", "sit", "sits", "stand", "stands", "lie", "lies", "like"]
)


def _relation(caption: Caption, choose: Choose) -> Iterator[Change]:
    found = [(match.start(), match.end(), match[0].lower()) for match in _RELATION.finditer(caption.text)]
    places = [_places(caption, start, end) for start, end, _ in found]
    if len(found) == 2 and _OPPOSITE[found[0][2]] == found[1][2]:  # each said of its own thing: both change
        yield _phrase_in(places[0], found[1][2]) | _phrase_in(places[1], found[0][2]), ""
    elif len(found) == 1 and _is_place(caption, places[0], old := found[0][2]):
        after = caption.word(places[0][-1] + 1)
        yield _phrase_in(places[0], "in front" if old == "behind" and after in ("", "and") else _OPPOSITE[old]), ""


def _is_place(caption: Caption, places: list[int], phrase: str) -> bool:
    """Whether a phrase says where something is, and its opposite would say something else."""
    after = [caption.word(places[-1] + k) for k in (1, 2, 3)]
    if v.NO_OPPOSITE.get(phrase, frozenset()) & set(after):
        return False
    if phrase in ("left of", "right of"):  # "what is left of the cake"
        before = caption.word(places[0] - 1)
        return (caption.word(places[0] - 2) if before in ("is", "are") else before) in v.NOUNS
    of_body = after[0] in ("hand", "arm", "foot", "leg", "turn", "lane", "field", "shoulder", "eye")
    return not of_body and not (phrase in ("inside", "outside") and not after[0])


def _places(caption: Caption, start: int, end: int) -> list[int]:
    return [place for place, (a, b) in enumerate(caption.spans) if start <= a and b <= end]


def _phrase_in(places: list[int], phrase: str) -> dict[int, str]:
    """A phrase in the place of another one, which may have more words or fewer."""
    words = phrase.split()
    if len(words) > len(places):
        words = [*words[: len(places) - 1], " ".join(words[len(places) - 1 :])]
    return {place: words[k] if k < len(words) else "" for k, place in enumerate(places)}


def _object(caption: Caption, choose: Choose) -> Iterator[Change]:
    forms = [v.NOUNS[word][1] for word in caption.words if word in v.NOUNS]
    for phrase in caption.phrases:
        if phrase.known is None or phrase.plural is None:
            continue
        category, one, _many = phrase.known
        if forms.count(one) > 1 or (category == "person" and v.GENDERED & set(caption.words)):
            continue
        if one in v.NEVER_PROPOSED and category != "shape" and not caption.words[phrase.noun].endswith("s"):
            continue
        before, holds = caption.word(phrase.start - 1), caption.word(phrase.noun + 1) == "of"
        if holds and one not in v.HOLDING:  # a coat of paint
            continue
        if (before == "of" and phrase.determiner is None and not phrase.plural) or (one == "camera" and before in ("at", "for", "to")):
            continue  # a slice of pizza; smiling at the camera
        unfit = frozenset(s for s, _ in v.SIBLINGS[category]) - v.HOLDING if holds else v.UTENSILS if before in _PLACES else frozenset()
        never = frozenset[str]() if category == "shape" else v.NEVER_PROPOSED
        unfit |= {one, *forms} | _ALIKE[one] | never
        others = [(s, p) for s, p in v.SIBLINGS[category] if s not in unfit]
        by_form = {(p if phrase.plural else s): (s, p) for s, p in others}
        for new in choose(list(by_form)):
            told = f"Replace the {caption.words[phrase.noun]} with {'' if phrase.plural else f'{article(new)} '}{new}."
            yield {phrase.noun: new}, told


_PLACES = ("in", "inside", "into", "from", "on", "onto")


def _action(caption: Caption, choose: Choose) -> Iterator[Change]:
    for old, *others in v.ACTIONS:
        if caption.words.count(old) != 1:
            continue
        place = caption.words.index(old)
        after = caption.word(place + 1)
        if not caption.is_done_by_somebody(place) or (old in v.OF_PLACE and after and after not in v.AFTER_PLACE):
            continue
        if old in ("smiling", "laughing", "crying") and after not in ("", "at", "in", "on", "and", "while", "with"):
            continue
        if old in ("throwing", "catching") and {"to", "at", "from", "towards"} & set(caption.words[place:]):
            continue
        for new in choose(others):
            yield {place: new}, f"Make the one who is {old} be {new}: {caption.with_words({place: new})}"


def _swap_attribute(caption: Caption, choose: Choose) -> Iterator[Change]:
    for kind in OF_KIND:
        if sum(word in OF_KIND[kind] for word in caption.words) != 2:
            continue
        found = list(_describable(caption, kind))
        if len(found) == 2 and caption.words[found[0].noun] != caption.words[found[1].noun]:
            (first,), (second,) = (caption.said_of(phrase, kind) for phrase in found)
            old, new = caption.words[first], caption.words[second]
            if old != new and SYNONYMS.get(old, old) != SYNONYMS.get(new, new) and new not in _NEAR.get(old, ()):
                yield {first: new, second: old}, ""


def _swap_object(caption: Caption, choose: Choose) -> Iterator[Change]:
    forms = [v.NOUNS[word][1] for word in caption.words if word in v.NOUNS]
    for first, second in combinations(caption.phrases, 2):
        if first.known is None or second.known is None or first.known[0] != second.known[0] or first.known == second.known:
            continue
        between = " ".join(caption.words[first.noun + 1 : second.start])
        if between.removeprefix("is ").removeprefix("are ") not in v.ASYMMETRIC or first.plural is None or first.plural != second.plural:
            continue
        if max(forms.count(first.known[1]), forms.count(second.known[1])) == 1 and not v.GENDERED & set(caption.words):
            yield {first.noun: caption.words[second.noun], second.noun: caption.words[first.noun]}, ""


_MAKERS: dict[str, Callable[[Caption, Choose], Iterator[Change]]] = {
    "colour": _colour,
    "size": _size,
    "material": _material,
    "texture": _texture,
    "count": _count,
    "relation": _relation,
    "object": _object,
    "action": _action,
    "swap_attribute": _swap_attribute,
    "swap_object": _swap_object,
}
_KINDS = ("colour", "size", "material", "texture", "count", "object", "action")
