"""Questions whose answer differs between a scene and its edited version.

Both answers to a question are texts of one group, which has both pictures. A model that ignores the pictures is therefore right on exactly
one picture. In pretraining, a group has only the first picture.
"""

from __future__ import annotations

import re
from itertools import product
from random import Random

from cfvlm_ds.core.groups import Candidate
from cfvlm_ds.demo.habits.grammar import NUMBERS, Statement, about, form, holds, noun, phrase, read
from cfvlm_ds.demo.habits.world import Scene, Thing

QUESTIONS = {
    "yes_no": ("colour", "kind", "count", "row", "background", "presence", "colour_swap"),
    "choice": ("colour", "kind", "count", "row", "background", "colour_swap"),
    "count": ("count",),
    "colour": ("colour", "colour_swap"),
}
"""Kind of question -> edit types that change the answer."""
DESCRIBE = (
    "Describe the image.",
    "What do you see?",
    "What is in this picture?",
    "Write a caption for the image.",
    "Say what the picture shows.",
)
THERE = "Is there a {} in the image?"
"""Wording of POPE's questions."""
_SHORT = "\nAnswer the question using a single word or phrase."
_YES_NO = ("{}", "{}", f"{{}}{_SHORT}", "{} Answer yes or no.")
_CHOICE = ("Which is true? A: {} B: {}", "A: {} B: {} Which one fits the image?", "Does A or B describe the image? A: {} B: {}")
_COUNT = ("How many {n} are there?", f"How many {{n}} are there?{_SHORT}", "Count the {n}.")
_COLOUR = ("What colour {is} the {x}?", f"What colour {{is}} the {{x}}?{_SHORT}", "Name the colour of the {x}.")
_FACTORS = {"colour_swap": "colour", "kind": "thing", "presence": "thing", "count": "number"}
"""Edit type -> form of the statements that it changes, if the names differ."""

Asked = tuple[tuple[Candidate, ...], list[list[int]]]
"""Two answers to a prompt, and a truth table [scene][answer] with entries 0 and 1. Answer 0 is true of scene 0, and answer 1 of scene 1."""


def asking(kind: str, edit: str, scenes: tuple[Scene, ...], rng: Random) -> Asked | None:
    """Build a question about what an edit of type ``edit`` changed between scenes 0 and 1. Return None if no question of this kind has
    different answers for the two scenes.
    """
    factor = _FACTORS.get(edit, edit)
    answers: tuple[str, ...]
    own = [[fact for fact in _facts(scene, factor) if not holds(fact, other)] for scene, other in (scenes[:2], scenes[1::-1])]
    if kind == "yes_no":
        if not any(own):
            return None
        claim = rng.choice(own[0] if not own[1] or (own[0] and rng.random() < 0.5) else own[1])
        prompt = rng.choice(_YES_NO).format(_asked(claim, scenes[0]))
        answers, truths = ("Yes", "No"), [[int(holds(claim, scene)), int(not holds(claim, scene))] for scene in scenes]
    else:
        same = slice(0) if factor in ("thing", "background") else slice(1, None, 2)  # words that the two claims must share
        pairs = [(one, two) for one, two in product(own[0], own[1]) if one[same] == two[same]]
        if not pairs:
            return None
        claims = rng.choice(pairs)
        if kind == "choice":
            order, phrasing = rng.sample((0, 1), 2), rng.randrange(2)
            options = [_stated(claims[i], scenes[i], phrasing) for i in order]
            prompt, answers = rng.choice(_CHOICE).format(*(option.capitalize() + "." for option in options)), ("A", "B")
            truths = [[int(all(holds(fact, scene) for fact in read(option) or ())) for option in options] for scene in scenes]
        else:
            thing = _thing(claims[0], scenes[0])
            slots = {"n": noun(thing.kind, 2), "x": noun(thing.kind, thing.number), "is": "is" if thing.number == 1 else "are"}
            prompt, answers = rng.choice(_COUNT if kind == "count" else _COLOUR).format(**slots), (claims[0][2], claims[1][2])
            truths = [[int(holds(claim, scene)) for claim in claims] for scene in scenes]
    if not truths[0][0]:
        answers, truths = answers[::-1], [line[::-1] for line in truths]
    return (Candidate(prompt, answers[0]), Candidate(prompt, answers[1])), truths


def _facts(scene: Scene, factor: str) -> list[Statement]:
    """Return all true statements about one factor of a scene, such as "colour"."""
    if factor == "background":
        return [(factor, scene.background)]
    if factor == "thing":
        return [(factor, thing.kind) for thing in scene.things]
    return [about(thing, factor) for thing in scene.things]


def _thing(fact: Statement, scene: Scene) -> Thing:
    thing = scene.find(fact[1])
    assert thing is not None, "questions about colours, numbers and rows are about things in both scenes"
    return thing


def _asked(claim: Statement, scene: Scene) -> str:
    """Phrase a claim as a yes/no question. Nouns are singular or plural as in ``scene``."""
    name, *words = claim
    if name == "background":
        return f"Is this a {words[0]} scene?"
    if name == "thing":
        return THERE.format(words[0])
    if name == "number":
        number = NUMBERS.index(words[1])
        return f"{'Is' if number == 1 else 'Are'} there exactly {words[1]} {noun(words[0], number)}?"
    statement = _stated(claim, scene, 0)
    subject, verb, rest = re.split(r" (is|are) ", statement, maxsplit=1)
    return f"{verb.capitalize()} {subject} {rest}?"


def _stated(claim: Statement, scene: Scene, phrasing: int) -> str:
    """Phrase a claim as a sentence. A claim about the presence or number of a thing must be true of ``scene``."""
    name, *words = claim
    if name == "background":
        return form(name, phrasing, background=words[0])
    thing = _thing(claim, scene)
    if name in ("thing", "number"):
        return form("things", phrasing, things=phrase(thing, with_colour=False))
    return form(name, phrasing, x=noun(thing.kind, thing.number), **{name: words[1]})
