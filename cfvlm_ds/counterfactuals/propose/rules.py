"""Edits of captions by closed lists and whole words: few are proposed, and those are meant to be right.

"man" never meets "woman", "left" is no verb, a "hot dog" is no dog: a word is changed only where the words around it say what it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import printable
from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.attributes import MADE_OF, PATTERNED, can_be
from cfvlm_ds.counterfactuals.propose.balance import Prices, drawn, prices_of
from cfvlm_ds.counterfactuals.propose.base import Change, Choose, Context, Found, Proposal, Rejected, Source, sources
from cfvlm_ds.counterfactuals.propose.caption import OF_KIND, Caption, Phrase
from cfvlm_ds.counterfactuals.propose.counting import count
from cfvlm_ds.counterfactuals.propose.grammar import absent, article, versions
from cfvlm_ds.counterfactuals.propose.once import made_once
from cfvlm_ds.counterfactuals.propose.plausible import instead, is_compared
from cfvlm_ds.counterfactuals.propose.situation import done_there, is_action, is_place
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, SYNONYMS, defect, difference

VERSION = 7
"""Raised when the same caption gets other edits than before."""
_LOOKED_AT = 10_000
"""Rows whose words are counted."""

_RELATION = re.compile(
    r"\b(?:" + "|".join(sorted({re.escape(p) for pair in v.RELATIONS for p in pair}, key=len, reverse=True)) + r")\b", re.IGNORECASE
)
_OPPOSITE: dict[str, str] = {}
for _first, _second in v.RELATIONS:
    _OPPOSITE.setdefault(_first, _second)
    _OPPOSITE.setdefault(_second, _first)
_NEAR = {word: frozenset().union(*(group for group in v.NEAR_COLOURS if word in group)) for word in v.COLOURS}


class Rules:
    """The back end ``rules``, for English. Which of the possible edits of a caption are proposed depends on all captions at hand: the words
    of the proposals are balanced."""

    threads = 1

    def __init__(self, context: Context) -> None:
        options = context.options
        self._types, self._per_type, self._seed, self._words = options.wanted, options.per_type, options.seed, context.words
        for kind, words in self._words.items():
            if kind not in _KINDS:
                raise ConfigError(f"--words: {kind!r} has no list of words; there are {', '.join(_KINDS)}")
            if kind == "object" and (unknown := [word for word in words if word not in v.NOUNS]):
                raise ConfigError(f"--words: the forms of {unknown[0]!r} are not known; name listed nouns")
        self._prices = self._read(context)

    def settings(self) -> Mapping[str, Any]:
        return {"version": VERSION, "words": {kind: list(words) for kind, words in self._words.items()}, **versions()}

    def notice(self) -> str:
        """What is not proposed because something is not installed."""
        return absent()

    def propose(self, source: Source) -> Found:
        """Proposals of each type, and why there is none where one reason is true of the whole caption."""
        edits = edits_of(source.caption, self._types, self._words)
        if isinstance(edits, Rejected):
            return [edits]
        found: list[Proposal] = []
        for kind in self._types:
            same = [edit for edit in edits if edit.type == kind]
            kept = drawn(same, self._prices, self._per_type, self._seed, source.id, kind)
            found += [proposal for edit in kept if (proposal := edit.proposal()) is not None]
        return found or [Rejected("rules", "each word that may come comes oftener than it goes")]

    def _read(self, context: Context) -> Prices:
        """The prices of words, which the first shard of a work folder writes for all. At most so many captions are looked at, evenly over
        the data, that they fit in memory."""
        path, store = context.work.path / "prices.json", context.store
        said = {"per_type": self._per_type, "types": list(self._types), **self.settings()}

        def write() -> None:
            count = min(len(store), _LOOKED_AT)
            progress = Progress(context.say, "rules: words", count, "rows")
            edits = (
                [] if isinstance(found := edits_of(source.caption, self._types, self._words), Rejected) else found
                for source in progress.over(sources(store, [k * len(store) // count for k in range(count)]))
                if not isinstance(source, DataError)
            )
            prices = prices_of(edits, [kind for kind in self._types if kind not in self._words], self._per_type)
            replace(path, json.dumps({"settings": said, "prices": prices}, indent=1).encode(), shared=True)

        return parse_json(made_once(path, write, lambda file: parse_json(file.read_text())["settings"] == said).read_text())["prices"]


@dataclass(frozen=True)
class Edit:
    """An edit that rules allow: new words by place, what goes and comes by them (nothing where words change places), and what an editor of
    pictures is told."""

    type: str
    caption: Caption
    changes: Mapping[int, str]
    told: str
    gone: str
    come: str

    def proposal(self) -> Proposal | None:
        """As it is written down; None where its text is no counterfactual."""
        text = self.caption.with_words(self.changes)
        if defect(self.caption.text, text, self.type) is not None:
            return None
        differs = difference(self.caption.text, text)
        told = self.told or f"Make the picture show: {text}"
        return Proposal(self.type, text, " ".join(differs.before), " ".join(differs.after), told, "rules")


def edits_of(text: str, types: Sequence[str], words: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[Edit] | Rejected:
    """All the edits of a caption that rules allow, by type, or why there is none. ``words`` are those that edits of a type may lead to."""
    if len(text) > MOST_CHARACTERS or printable(text) != text:
        return Rejected("rules", "no caption of one printable line")
    caption = Caption(text)
    if any(word in v.NEGATIONS or word.endswith("n't") for word in caption.words):
        return Rejected("rules", "a negation")
    if "?" in caption.words:
        return Rejected("rules", "a question")
    if v.UNCERTAIN & set(caption.words):
        return Rejected("rules", "not certain")
    if caption.is_definition:
        return Rejected("rules", "a sentence that says what a thing is")
    said = {SYNONYMS.get(word, word) for word in caption.words}
    explained = caption.first_sentence < len(caption.words)
    found: dict[tuple[tuple[int, str], ...], Edit] = {}
    for kind in types:

        def choose(options: Sequence[str], allowed: Sequence[str] | None = words.get(kind)) -> list[str]:
            return [each for each in options if (allowed is None or each in allowed) and SYNONYMS.get(each, each) not in said]

        for changes, told in _MAKERS[kind](caption, choose) if kind in _MAKERS else ():
            later = explained and (max(changes) >= caption.first_sentence or kind in ("object", "swap_object"))
            if later or caption.lettering & changes.keys():
                continue
            gone, come = [caption.words[place] for place in changes], [word for word in changes.values() if word]
            if sorted(gone) == sorted(come):
                gone, come = [], []
            found.setdefault(tuple(changes.items()), Edit(kind, caption, changes, told, " ".join(gone), " ".join(come)))
    return list(found.values()) or Rejected("rules", "nothing to edit")


def _colour(caption: Caption, choose: Choose) -> Iterator[Change]:
    for place, noun in _coloured(caption):
        old, beside = caption.words[place], caption.words[place - 2 : place + 3]
        never = _NEAR[old].union(*(_NEAR[word] for word in beside if word in _NEAR and "and" in beside))
        if noun == "hair" and v.YOUNG & set(caption.words):
            never |= {"gray", "grey", "white"}
        for new in choose([colour for colour in v.COLOURS if colour not in never and can_be(noun, colour)]):
            yield {place: new}, f"Change the colour of the {noun} from {old} to {new}."


def _coloured(caption: Caption) -> Iterator[tuple[int, str]]:
    """Places of colours, each with the noun that has it: a red hat, a red and blue hat, somebody in red."""
    for phrase in _describable(caption, "colour"):
        yield caption.said_of(phrase, "colour")[0], caption.words[phrase.noun]
    for place, word in enumerate(caption.words):
        if word not in v.COLOURS or caption.is_named(place):
            continue
        after, then = caption.word(place + 1), caption.word(place + 2)
        noun = caption.word(place + 3)
        if after == "and" and then in v.COLOURS and caption.word(place - 1) in v.DETERMINERS and noun.isalpha():
            if caption.ends(place + 4) and not caption.ends(place + 3) and not _has_a_fixed_colour(caption, noun):
                yield from ((each, noun) for each in (place, place + 2))
        elif caption.word(place - 1) in ("in", "wearing") and caption.ends(place + 1) and not (after == "and" and then in v.COLOURS):
            yield place, "clothes"


def _has_a_fixed_colour(caption: Caption, noun: str) -> bool:
    return noun in v.FIXED_COLOUR or "ripe" in caption.words


def _size(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "size"):
        (place,) = caption.said_of(phrase, "size")
        old = caption.words[place]
        said, after = set(caption.words), set(caption.words[phrase.noun + 1 : phrase.noun + 4])
        fixed = caption.word(phrase.start - 1) in ("under", "underneath", "beneath") or after & {"inside", "bottom"}
        if fixed or v.COMPARED & said or (old == "long" and v.CROWDS & said):
            continue  # an umbrella that people sit under, a doughnut in a cup, a table with lots of seats
        opposites = v.SIZES[old] if old != "short" else ("long",) if caption.words[phrase.noun] in v.LENGTHY else ("tall",)
        for new in choose(opposites):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {old}."


def _material(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "material"):
        (place,) = caption.said_of(phrase, "material")
        made_of = MADE_OF[caption.words[phrase.noun]]
        if caption.words[phrase.noun] == "floor" and any(v.NOUNS[word][0] == "vehicle" for word in caption.words if word in v.NOUNS):
            made_of -= {"stone"}
        for new in choose([each for each in v.MATERIALS if each in made_of and {each, caption.words[place]} != {"stone", "brick"}]):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {caption.words[place]}."


def _texture(caption: Caption, choose: Choose) -> Iterator[Change]:
    for phrase in _describable(caption, "texture"):
        (place,) = caption.said_of(phrase, "texture")
        old, of_shape = caption.words[place], phrase.known is not None and phrase.known[0] == "shape"
        if old == "hollow" and not of_shape:
            continue  # a tree
        options = [each for each in v.TEXTURES if each not in v.TEXTURES_AGAINST.get(old, ())]
        for new in choose(
            [each for each in options if each in (("striped", "dotted", "hollow") if of_shape else ("striped", "dotted", "plaid"))]
        ):
            yield {place: new}, f"Make the {caption.words[phrase.noun]} {new} and not {old}."


def _describable(caption: Caption, kind: str) -> Iterator[Phrase]:
    """Phrases with one adjective of a kind, whose noun can be one way or another."""
    animals = any(v.NOUNS[word][0] == "animal" for word in caption.words if word in v.NOUNS)
    for phrase in caption.phrases:
        noun, said = caption.words[phrase.noun], caption.words[phrase.start : phrase.noun]
        if len(caption.said_of(phrase, kind)) != 1 or noun in v.PEOPLE:
            continue
        fixed = {
            "colour": _has_a_fixed_colour(caption, noun) or "brick" in said or (noun == "coat" and animals),
            "size": noun in v.NOT_SIZED
            or (noun in v.FOOD and {"tall", "short", "long"} & set(said))
            or caption.word(phrase.noun + 1) == "of"
            or not is_compared(caption, phrase),
            "material": noun not in MADE_OF,
            "texture": noun not in PATTERNED and (phrase.known is None or phrase.known[0] != "shape"),
        }
        if not fixed[kind]:
            yield phrase


def _relation(caption: Caption, choose: Choose) -> Iterator[Change]:
    found = [(match.start(), match.end(), match[0].lower()) for match in _RELATION.finditer(caption.text)]
    places = [_places(caption, start, end) for start, end, _ in found]
    if len(found) == 2 and _OPPOSITE[found[0][2]] == found[1][2]:
        # each said of its own thing, as "on the left a cup and on the right a plate": both change. In front of a wall and with a man
        # behind him are two things, of which either could change alone.
        if not places[0][0] and any(said in v.OF_THE_PICTURE for _, _, said in found):
            yield _phrase_in(places[0], found[1][2]) | _phrase_in(places[1], found[0][2]), ""
    elif len(found) == 1 and is_place(caption, places[0], old := found[0][2]):
        yield _phrase_in(places[0], _OPPOSITE[old]), ""


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
        if forms.count(one) > 1 or (one in v.NEVER_PROPOSED and category != "shape" and not caption.words[phrase.noun].endswith("s")):
            continue
        if caption.word(phrase.start - 1) == "of" and phrase.determiner is None and not phrase.plural:
            continue  # a slice of pizza
        fit = instead(caption, phrase).difference(forms)
        by_form = [p if phrase.plural else s for s, p in v.SIBLINGS[category] if s in fit]
        for new in choose(by_form):
            told = f"Replace the {caption.words[phrase.noun]} with {'' if phrase.plural else f'{article(new)} '}{new}."
            yield {phrase.noun: new}, told


def _action(caption: Caption, choose: Choose) -> Iterator[Change]:
    for place, form in enumerate(caption.words):
        action, options = _DONE.get(form, ("", ()))
        if action and caption.words.count(form) == 1 and is_action(caption, place, action, form):
            for new in choose(done_there(caption, place, options)):
                yield {place: new}, f"Make the picture show this instead of {form}: {caption.with_words({place: new})}"


_DONE = dict[str, tuple[str, list[str]]]()
"""Form of an action -> the action, and what may be done instead in the same form."""
for _doing, _others in v.ACTIONS.items():
    _DONE[_doing] = _doing, list(_others)
    for _many, _form in enumerate(v.FINITE.get(_doing, ())):
        _DONE[_form] = _doing, [v.FINITE[each][_many] for each in _others if each in v.FINITE]


def _swap_attribute(caption: Caption, choose: Choose) -> Iterator[Change]:
    for kind in OF_KIND:
        if sum(word in OF_KIND[kind] for word in caption.words) != 2:
            continue
        found = list(_describable(caption, kind))
        if len(found) == 2 and caption.words[found[0].noun] != caption.words[found[1].noun]:
            (first,), (second,) = (caption.said_of(phrase, kind) for phrase in found)
            old, new = caption.words[first], caption.words[second]
            nouns = [caption.words[phrase.noun] for phrase in found]
            if kind == "colour" and not (can_be(nouns[0], new) and can_be(nouns[1], old)):
                continue
            if kind == "material" and not (new in MADE_OF[nouns[0]] and old in MADE_OF[nouns[1]]):
                continue
            if kind == "size" and new not in v.SIZES[old]:
                continue
            if old != new and SYNONYMS.get(old, old) != SYNONYMS.get(new, new) and new not in _NEAR.get(old, ()):
                yield {first: new, second: old}, ""


def _swap_object(caption: Caption, choose: Choose) -> Iterator[Change]:
    forms = [v.NOUNS[word][1] for word in caption.words if word in v.NOUNS]
    for first, second in combinations(caption.phrases, 2):
        if first.known is None or second.known is None or first.known[0] != second.known[0] or first.known == second.known:
            continue
        between = " ".join(caption.words[first.noun + 1 : second.start])
        if first.known[0] not in ("person", "animal", "shape") and v.HELD_UP & set(between.split()[:2]):
            continue  # no umbrella is under a backpack
        if between.removeprefix("is ").removeprefix("are ") not in v.ASYMMETRIC or first.plural is None or first.plural != second.plural:
            continue
        if max(forms.count(first.known[1]), forms.count(second.known[1])) == 1 and not v.GENDERED & set(caption.words):
            yield {first.noun: caption.words[second.noun], second.noun: caption.words[first.noun]}, ""


_MAKERS: dict[str, Callable[[Caption, Choose], Iterator[Change]]] = {
    "colour": _colour,
    "size": _size,
    "material": _material,
    "texture": _texture,
    "count": count,
    "relation": _relation,
    "object": _object,
    "action": _action,
    "swap_attribute": _swap_attribute,
    "swap_object": _swap_object,
}
_KINDS = ("colour", "size", "material", "texture", "count", "object", "action")
