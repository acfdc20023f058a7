"""Grammar of texts about a scene: sentences, the statements that they make, and a judge of arbitrary texts.

A statement is a tuple of words, such as ``("colour", "cup", "red")``. It is either true or false of a scene. ``read`` returns the
statements of a sentence, or None if the grammar does not produce the sentence. Errors are not corrected: for "there is two cup", it returns
None.

A noun phrase states that a kind of thing is present, its number ("a" is one) and, if mentioned, its colour. "the cups" states no number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from random import Random

from cfvlm_ds.demo.habits.world import BACKGROUNDS, COLOURS, KINDS, MOST, ROWS, Scene, Thing

Statement = tuple[str, ...]
NUMBERS = ("no", "one", "two", "three", "four", "five")

SENTENCES = {
    "things": ("there {is} {things}", "we see {things}", "the picture shows {things}"),
    "row": (
        "the {x} {is} {at} the {row}",
        "the {x} {is} in the {row} row",
        "the {x} can be seen {at} the {row}",
        "the {x} can be seen in the {row} row",
        "we see the {x} {at} the {row}",
        "we see the {x} in the {row} row",
    ),
    "colour": ("the {x} {is} {colour}", "the colour of the {x} is {colour}"),
    "total": ("there are {total} things", "we see {total} things"),
    "background": ("this is a {background} scene", "it is a {background} scene"),
}
"""Form -> phrasings. ``is`` agrees with ``x``, or with the first noun phrase in ``things``. ``at`` is "in" before "the middle"."""


def noun(kind: str, number: int) -> str:
    """Return the noun for a kind of thing: singular if ``number`` is 1, else plural."""
    return kind if number == 1 else kind + ("es" if kind.endswith(("s", "sh")) else "s")


def phrase(thing: Thing, with_colour: bool = True) -> str:
    """Return the noun phrase for a thing, such as "two red cups", or "two cups" if ``with_colour`` is False."""
    number = "a" if thing.number == 1 else NUMBERS[thing.number]
    return " ".join([number, *[thing.colour] * with_colour, noun(thing.kind, thing.number)])


def listed(phrases: Sequence[str]) -> str:
    """Join noun phrases as in "a, b and c"."""
    return " and ".join([*[", ".join(phrases[:-1])] * (len(phrases) > 1), phrases[-1]])


def form(name: str, phrasing: int, **slots: str) -> str:
    """Return a sentence in one of the phrasings in SENTENCES, without a capital letter or a full stop."""
    plural = slots["x"] not in KINDS if "x" in slots else not slots.get("things", "").startswith("a ")
    at = "in" if slots.get("row") == "middle" else "at"
    return SENTENCES[name][phrasing % len(SENTENCES[name])].format(**slots, **{"is": "are" if plural else "is", "at": at})


# Reading -----------------------------------------------------------------------------------------------------------------------------

_KIND = {noun(kind, number): kind for kind in KINDS for number in (1, 2)}


def _one_of(name: str, words: Sequence[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_SLOTS = {
    "things": "(?P<things>.+)",
    "is": _one_of("is", ("is", "are")),
    "at": _one_of("at", ("at", "in")),
    "x": _one_of("x", tuple(_KIND)),
    "row": _one_of("row", ROWS),
    "colour": _one_of("colour", COLOURS),
    "total": _one_of("total", NUMBERS[2 : MOST + 1]),
    "background": _one_of("background", BACKGROUNDS),
}
_PATTERNS = [
    (name, i, re.compile(phrasing.format(**_SLOTS))) for name, phrasings in SENTENCES.items() for i, phrasing in enumerate(phrasings)
]
_PHRASE = re.compile(rf"(?P<number>a|two|three) (?:{_one_of('colour', COLOURS)} )?{_one_of('noun', tuple(_KIND))}")


def read(sentence: str) -> list[Statement] | None:
    """Return the statements of a sentence (without its full stop), or None if the grammar does not produce it."""
    for name, phrasing, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            slots = match.groupdict()
            one: Statement = (name, _KIND[slots["x"]], slots[name]) if "x" in slots else (name, slots[name])
            statements = _things(slots["things"]) if name == "things" else [one]
            if statements and form(name, phrasing, **{key: value for key, value in slots.items() if key not in ("is", "at")}) == sentence:
                return statements
    return None


def _things(text: str) -> list[Statement] | None:
    phrases, statements = re.split(", | and ", text), list[Statement]()
    for each in phrases:
        match = _PHRASE.fullmatch(each)
        if match is None or (match["number"] == "a") != (match["noun"] in KINDS):
            return None
        kind = _KIND[match["noun"]]
        statements += [("thing", kind), ("number", kind, "one" if match["number"] == "a" else match["number"])]
        statements += [("colour", kind, match["colour"])] * (match["colour"] is not None)
    return statements if listed(phrases) == text else None


def holds(statement: Statement, scene: Scene) -> bool:
    """Return whether a statement is true of a scene. A statement about an absent thing is false."""
    name, *words = statement
    if name == "background":
        return scene.background == words[0]
    if name == "total":
        return NUMBERS[scene.total] == words[0]
    thing = scene.find(words[0])
    if thing is None or name == "thing":
        return thing is not None
    return statement == about(thing, name)


def about(thing: Thing, name: str) -> Statement:
    """Return the true statement about a thing's "colour", "number" or "row"."""
    return name, thing.kind, {"colour": thing.colour, "number": NUMBERS[thing.number], "row": ROWS[thing.row]}[name]


@dataclass(frozen=True)
class Verdict:
    """Verdict on a text about a scene.

    ``statements`` maps each distinct statement to its truth. ``unparsed`` lists the sentences that the grammar does not produce, and
    ``sentences`` is the total number of sentences. ``mentioned`` and ``present`` are the kinds of things in the text and in the scene.
    """

    statements: dict[Statement, bool]
    unparsed: tuple[str, ...]
    sentences: int
    mentioned: frozenset[str]
    present: frozenset[str]


def judge(text: str, scene: Scene) -> Verdict:
    """Judge any text about a scene. Sentences end with a full stop. Capital letters and extra spaces are ignored."""
    sentences = [" ".join(sentence.split()) for sentence in text.lower().split(".") if sentence.strip()]
    parsed = [(sentence, read(sentence)) for sentence in sentences]
    statements = {statement: holds(statement, scene) for _, found in parsed for statement in found or ()}
    return Verdict(
        statements,
        tuple(sentence for sentence, found in parsed if found is None),
        len(sentences),
        frozenset(word for statement in statements for word in statement if word in KINDS),
        frozenset(thing.kind for thing in scene.things),
    )


# Describing --------------------------------------------------------------------------------------------------------------------------


def describe(scenes: Sequence[Scene], seed: str) -> list[str]:
    """Return a description of each scene. The descriptions differ only where the scenes differ.

    All things are listed with number and colour, but one colour can be moved to a separate sentence. If none is, a sentence states the row
    of a thing instead. A row or background that differs between scenes is always mentioned. If a thing was added or removed, the total
    number of things is mentioned, because the shorter list would otherwise be true of both scenes.
    """
    rng = Random(seed)
    lengths = {len(scene.things) for scene in scenes}
    shared = range(min(lengths))
    moved = [i for i in shared if len({scene.things[i].row for scene in scenes}) > 1]
    placed = rng.choice(moved or shared)
    apart = None if moved or rng.random() < 0.75 else rng.choice(shared)
    mentions_total = rng.random() < 0.2 or len(lengths) > 1
    mentions_background = rng.random() < 0.5 or len({scene.background for scene in scenes}) > 1
    phrasings = [rng.randrange(6) for _ in range(4)]
    background_first = rng.random() < 0.3
    texts = []
    for scene in scenes:
        phrases = [phrase(thing, i != apart) for i, thing in enumerate(scene.things)]
        sentences = [form("things", phrasings[0], things=listed(phrases))]
        thing = scene.things[placed if apart is None else apart]
        x = noun(thing.kind, thing.number)
        if apart is None:
            sentences.append(form("row", phrasings[1], x=x, row=ROWS[thing.row]))
        else:
            sentences.append(form("colour", phrasings[1], x=x, colour=thing.colour))
        if mentions_total:
            sentences.append(form("total", phrasings[2], total=NUMBERS[scene.total]))
        if mentions_background:
            sentences.insert(0 if background_first else len(sentences), form("background", phrasings[3], background=scene.background))
        texts.append(written(sentences))
    return texts


def written(sentences: Sequence[str]) -> str:
    """Join sentences into a text, with an initial capital and a full stop for each."""
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def difference(before: str, after: str) -> tuple[str, str]:
    """Return the words of ``before`` that change, and the words of ``after`` that replace them."""
    old, new = re.findall(r"\w+", before), re.findall(r"\w+", after)
    parts = [part for part in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if part[0] != "equal"]
    return " ".join(word for _, i, j, _, _ in parts for word in old[i:j]), " ".join(word for *_, i, j in parts for word in new[i:j])


def key(things: Sequence[Thing]) -> str:
    """Return a key that is equal for all descriptions of these things, whatever their positions and background."""
    return ", ".join(sorted(map(phrase, things)))


def true_keys(scene: Scene) -> list[str]:
    """Return the keys of all descriptions that list at least two of a scene's things and can be true of it."""
    return [key(things) for size in range(2, len(scene.things) + 1) for things in combinations(scene.things, size)]
