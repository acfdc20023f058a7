"""Edit rules for captions, based on a parse and on word lists. The rules favour precision over recall."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from cfvlm_ds.counterfactuals.propose.base import Proposal
from cfvlm_ds.counterfactuals.propose.english import Caption, article, described, doer, governor, modifiers, objects
from cfvlm_ds.counterfactuals.propose.vocabulary import (
    ACTIONS,
    COLOURS,
    LISTS,
    MATERIALS,
    NOUNS,
    NUMBERS,
    SIZES,
    TEXTURES,
    by_word,
    word_set,
)
from cfvlm_ds.counterfactuals.propose.word_difference import defect, difference

Change = tuple[dict[int, str], str]
"""A mapping from the indices of old words to their replacements, and an instruction for a picture editor."""


@dataclass(frozen=True)
class Edit:
    """An edit that the rules allow.

    ``changes`` maps the indices of old words to their replacements. ``gone`` and ``come`` are the words that the edit removes and
    introduces; both are empty if the edit only reorders words. ``instruction`` is for a picture editor.
    """

    type: str
    caption: Caption
    changes: Mapping[int, str]
    instruction: str
    gone: str
    come: str

    def proposal(self) -> Proposal | None:
        """Return the proposal, or None if the new text is not a counterfactual of the caption."""
        text = self.caption.with_words(self.changes)
        if defect(self.caption.text, text, self.type) is not None:
            return None
        differs = difference(self.caption.text, text)
        instruction = self.instruction or f"Make the picture show: {text}"
        return Proposal(self.type, text, " ".join(differs.before), " ".join(differs.after), instruction, "rules")


_KINDS = {"colour": COLOURS, "size": tuple(SIZES), "material": MATERIALS, "texture": TEXTURES}
_ALIKE = {word: {other for group in LISTS["colours_alike"] if word in group.split() for other in group.split()} for word in COLOURS}
_PEOPLE = word_set("people")
_ACTING = _PEOPLE | word_set("acting_animals")


def _singular(noun: Any) -> str:
    return NOUNS[noun.lower_][1] if noun.lower_ in NOUNS else str(noun.lemma_).lower()


def others(kind: str, word: str, noun: str) -> list[str]:
    """Return the adjectives of type ``kind`` that can replace ``word`` before ``noun``."""
    if kind == "colour":
        can = () if noun in word_set("one_colour") | _PEOPLE else by_word("colours_of").get(noun, COLOURS)
        return [new for new in can if new not in _ALIKE[word]]
    if kind == "size":
        return [] if noun in word_set("not_sized") | _PEOPLE else [*SIZES[word]]
    if kind == "material":
        return [new for new in by_word("made_of").get(noun, ()) if new != word and {new, word} != {"stone", "brick"}]
    is_shape = NOUNS.get(noun, ("",))[0] == "shape"
    can = ("striped", "dotted", "hollow") if is_shape else ("striped", "dotted", "plaid") if noun in word_set("patterned") else ()
    return [new for new in can if {new, word} not in ({word}, {"dotted", "spotted"}, {"plaid", "checkered"})]


def _described(caption: Caption, kind: str) -> Iterator[tuple[Any, str]]:
    """Yield each adjective of type ``kind`` with the singular form of the noun that it describes."""
    for token in caption.doc:
        before, after = caption.word(token.i - 1), caption.word(token.i + 1)
        beside = {"pale", "hot", *_ALIKE} if kind == "colour" else ()
        if token.lower_ not in _KINDS[kind] or before in beside or after in beside:
            continue
        noun = described(token)
        if noun is None:
            ends = not after or caption.doc[token.i + 1].pos_ in ("PUNCT", "VERB", "ADP", "AUX", "SCONJ", "ADV", "PRON")
            if kind == "colour" and before in ("in", "wearing") and ends:
                yield token, "clothes"
        elif caption.word(noun.i + 1) != "of" and not word_set("before_one_colour") & modifiers(noun):
            yield token, _singular(noun)


def _attribute(kind: str) -> Callable[[Caption], Iterator[Change]]:
    def edits(caption: Caption) -> Iterator[Change]:
        for token, noun in _described(caption, kind):
            if kind == "size" and not _is_compared(caption, token):
                continue
            never = {other for word in caption.words[max(0, token.i - 3) : token.i + 4] for other in _ALIKE.get(word, ())}
            if caption.word(token.i - 1) in ("light", "dark"):
                never |= set(COLOURS) - word_set("shaded_colours")
            if noun == "hair" and caption.distinct & word_set("young"):
                never |= {"gray", "white", "grey"}
            for new in others(kind, token.lower_, noun):
                if new not in never:
                    yield {token.i: new}, f"Change the {kind} of the {noun} from {token.lower_} to {new}."

    return edits


def _is_compared(caption: Caption, size: Any) -> bool:
    """Return whether the caption mentions another thing to compare sizes with. A picture of a single ball does not show its size."""
    if caption.distinct & word_set("fixed_size") or any(child.dep_ == "advmod" for child in size.children):
        return False
    return any(noun != described(size) and _singular(noun) not in word_set("scenery") for noun in caption.nouns())


def _count(caption: Caption) -> Iterator[Change]:
    if caption.distinct & word_set("fixed_number"):
        return
    if caption.words[:3] == ["a", "group", "of"]:
        people = objects(caption.doc[2])
        if (
            len(people) == 1
            and people[0].tag_ == "NNS"
            and _singular(people[0]) in _PEOPLE
            and not caption.distinct & word_set("of_a_group")
        ):
            yield {0: "two", 1: "", 2: ""}, f"Show two {people[0].lower_} and not a group."
    for token in caption.doc:
        word, noun = token.lower_, token.head
        number = 3 if word == "several" else int(word) if word.isdecimal() and len(word) == 1 else NUMBERS.get(word, 0)
        counts = token.dep_ in ("nummod", "amod") and noun.tag_ == "NNS" and noun.i > token.i
        if number < 2 or not counts or caption.words.count(word) > 1:
            continue
        noun_words = {_singular(noun)} | modifiers(noun)
        bounded = any(child.dep_ in ("quantmod", "advmod") for child in token.children)
        is_enumerated = any(child.dep_ == "appos" for child in noun.children)
        ridden = noun_words & _PEOPLE and caption.distinct & word_set("ridden_by_few")
        if (
            noun_words & word_set("not_counted")
            or caption.word(token.i - 1) in word_set("before_number")
            or bounded
            or is_enumerated
            or ridden
        ):
            continue
        most = max(number, 3 if noun.dep_ == "dobj" else 5)
        options = ["two"] if word == "several" else [new for new, n in NUMBERS.items() if 1 < n <= min(most, 5) and 0 < abs(n - number) < 3]
        if word == "two":
            of_a_group = token.i == 0 and noun_words & _PEOPLE and not caption.distinct & word_set("of_two") and not any(noun.conjuncts)
            options += ["several", "a group of"] if of_a_group else ["several"]
        for new in options:
            new = str(NUMBERS[new]) if word.isdecimal() else new
            yield {token.i: new}, f"Change the number of {noun.lower_} from {word} to {new}."


def _object(caption: Caption) -> Iterator[Change]:
    ones = [NOUNS[word][1] for word in caption.words if word in NOUNS]
    for token in caption.nouns():
        category, one, many = NOUNS.get(token.lower_, ("", "", ""))
        plural = token.lower_ == many and (one == many or token.tag_ != "NN")
        of_stuff = not plural and (
            0 < token.i == token.left_edge.i or any(child.dep_ == "nummod" and child.lower_ != "one" for child in token.children)
        )
        if of_stuff or ones.count(one) > (caption.words.count(token.lower_) if category == "person" else 1):
            continue  # for example "eating pizza", "two woman", or "two guys, and the guy in red"
        if not _may_change(caption, token, category, one):
            continue
        for new in by_word("instead").get(one, ()):
            unfit = caption.distinct.intersection(by_word("never_beside").get(new, ())) or new in ones
            if not unfit and all(_fits(child, category, new) for child in token.children):
                form = NOUNS[new][1 + plural]
                yield {token.i: form}, f"Replace the {token.lower_} with {'' if plural else article(form) + ' '}{form}."


def _may_change(caption: Caption, token: Any, category: str, one: str) -> bool:
    """Return whether the words around a noun allow its replacement by another noun."""
    kept = {*by_word("kept_beside").get(category, ()), *by_word("kept_beside").get(one, ())} - {*NOUNS.get(one, ())}
    if caption.distinct & kept or (category != "person" and caption.distinct & {"it", "its", "them"}):
        return False
    if category in by_word("only_beside") and not caption.distinct.intersection(by_word("only_beside")[category]):
        return False
    return category not in by_word("governed") or governor(token) in by_word("governed")[category]


def _fits(child: Any, category: str, new: str) -> bool:
    """Return whether ``child``, a dependent of a noun, also fits the noun ``new``."""
    word = child.lower_
    if category == "person":
        return child.dep_ != "poss" and (child.dep_, word) != ("prep", "of")
    if child.dep_ == "amod":
        kind = next((kind for kind, listed in _KINDS.items() if word in listed), "")
        if kind in ("material", "texture"):
            return bool(others(kind, word, new))
        return word in (by_word("colours_of").get(new, COLOURS) if kind == "colour" else word_set("said_of_things"))
    if child.dep_ == "acl":  # an action that any animal can do
        return category in ("pet", "farm_animal", "wild_animal") and child.tag_ == "VBG"
    owned = child.dep_ == "poss" and category not in ("top", "legwear")
    return not (owned or child.dep_ in ("compound", "nmod") or (child.dep_ == "prep" and word in ("of", "with")))


def _action(caption: Caption) -> Iterator[Change]:
    for token in caption.doc:
        who = doer(token) if token.lower_ in ACTIONS and token.pos_ == "VERB" else None
        if who is None or _singular(who) not in _ACTING or caption.distinct.intersection(by_word("kept_action").get(token.lemma_, ())):
            continue
        of_mood = token.lemma_ in ("smile", "cry")
        busy = token.dep_ == "conj" or any(child.dep_ in ("conj", "prt", "dobj", "ccomp") for child in token.children if not of_mood)
        if busy or caption.word(token.i + 1) not in word_set("after_a_mood" if of_mood else "after_an_action") | (
            {""} if of_mood else set()
        ):
            continue
        for new in ACTIONS[token.lower_]:
            yield {token.i: new}, f"Make the picture show this instead of {token.lower_}: {caption.with_words({token.i: new})}"


_OPPOSITE = dict[str, str]()
for _one, _other in (pair.split(" / ") for pair in LISTS["relations"]):
    _OPPOSITE.setdefault(_one, _other)
    _OPPOSITE.setdefault(_other, _one)
_BESIDE_A_THING = ("behind", "in front of", "above", "below", "inside", "outside", "underneath", "on top of")
_RELATION = re.compile(rf"\b({'|'.join(sorted(_OPPOSITE, key=len, reverse=True))})\b", re.IGNORECASE)


def _relation(caption: Caption) -> Iterator[Change]:
    phrases = [match[0].lower() for match in _RELATION.finditer(caption.text)]
    places = [caption.places(*match.span()) for match in _RELATION.finditer(caption.text)]
    if len(phrases) == 1 and _says_where(caption, places[0], phrases[0]):
        yield _instead(places[0], _OPPOSITE[phrases[0]]), ""
    elif len(phrases) == 2 and phrases[0] == _OPPOSITE[phrases[1]] and not places[0][0]:
        # both change, as in "on the left a cup and on the right a plate"
        yield _instead(places[0], phrases[1]) | _instead(places[1], phrases[0]), ""


def _says_where(caption: Caption, places: list[int], phrase: str) -> bool:
    """Return True if ``phrase`` describes a position and the opposite phrase would be false of the same picture."""
    where, subject = [_singular(noun) for noun in objects(caption.doc[places[-1]])], caption.doc[places[0]].head
    while subject.pos_ in ("VERB", "AUX", "ADP") and doer(subject) is not None:
        subject = doer(subject)
    if not {"left", "right"} & set(phrase.split()) and caption.distinct & word_set("fixed_place"):
        return False
    if phrase in _BESIDE_A_THING:
        of_a_thing = len(where) == 1 and (_singular(subject) in NOUNS or _singular(subject) in _ACTING)
        seen = word_set("seen_behind" if phrase in ("behind", "in front of") else "supports")
        return of_a_thing and where[0] in seen
    if phrase in ("left of", "right of"):  # not "what is left of the cake"
        return bool(subject.pos_ == "NOUN")
    after = next(iter(caption.doc[places[-1] + 1 :]), None)
    return phrase.endswith("of") or after is None or after.pos_ not in ("NOUN", "PROPN")  # not "to the right lane"


def _instead(places: list[int], phrase: str) -> dict[int, str]:
    """Return the changes that replace the words at the indices ``places`` with ``phrase``, which can have a different number of words."""
    words = phrase.split()
    words = [*words[: len(places) - 1], " ".join(words[len(places) - 1 :])]
    return {place: words[k] if k < len(words) else "" for k, place in enumerate(places)}


def _swap_attribute(caption: Caption) -> Iterator[Change]:
    for kind in _KINDS:
        adjectives = list(_described(caption, kind))
        if len(adjectives) == 2 and adjectives[0][1] != adjectives[1][1]:
            (first, one), (second, other) = adjectives
            if second.lower_ in others(kind, first.lower_, one) and first.lower_ in others(kind, second.lower_, other):
                yield {first.i: second.lower_, second.i: first.lower_}, ""


def _swap_object(caption: Caption) -> Iterator[Change]:
    for first, second in combinations(caption.nouns(), 2):
        one, other = (NOUNS.get(noun.lower_, ("", "", "")) for noun in (first, second))
        between = " ".join(caption.words[first.i + 1 : second.left_edge.i]).removeprefix("is ").removeprefix("are ")
        if one[0] and one[0] == other[0] and one != other and between in LISTS["asymmetric"] and first.tag_ == second.tag_:
            yield {first.i: second.lower_, second.i: first.lower_}, ""


MAKERS: dict[str, Callable[[Caption], Iterator[Change]]] = {
    **{kind: _attribute(kind) for kind in _KINDS},
    "count": _count,
    "relation": _relation,
    "object": _object,
    "action": _action,
    "swap_attribute": _swap_attribute,
    "swap_object": _swap_object,
}
"""Edit type -> function that yields the edits of a caption. A new type needs a function and an entry here."""
