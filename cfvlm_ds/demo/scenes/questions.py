"""Prompts about a scene: the request for a description, in several wordings, or a question that anchor and counterfactual answer
differently.

Both answers to a question are texts of one group that contains both pictures. A model that ignores the pictures is therefore right on
exactly one of them, whatever the question, its wording or the order of its options suggest.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cfvlm_ds.core.groups import Candidate
from cfvlm_ds.demo.scenes.grammar import (
    OF,
    Claim,
    Description,
    all_captions,
    all_claims,
    describe,
    holds,
    key,
    noun,
    noun_phrase,
    say,
    true_keys,
)
from cfvlm_ds.demo.scenes.world import Scene

QUESTIONS = ("yes_no", "choice", "count")
"""Kinds of questions. ``count`` is asked only about edits of type ``count``."""

_DESCRIBE = (
    "Describe the image.",
    "What do you see?",
    "What is in this picture?",
    "Write a caption for the image.",
    "Say what the picture shows.",
)
_YES_NO = ("{q}?", "{q}? Answer yes or no.", "Yes or no: {q}?", "Look at the image: {q}?")
_CHOICE = ("Which is true? A: {a} B: {b}", "A: {a} B: {b} Which one fits the image?", "Does A or B describe the image? A: {a} B: {b}")
_COUNT = ("How many {n} are there?", "Count the {n}.", "How many {n} do you see?")
_NUMBERS = {1: "one", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Asked:
    """A prompt with its texts, and the truth of each text about each scene (scenes x texts). Text 0 is true of scene 0.

    ``keys`` and ``exclude`` are those of the group: the key of each text, and the keys of all texts that are true of one of its scenes.
    """

    candidates: tuple[Candidate, ...]
    match: tuple[tuple[int, ...], ...]
    keys: tuple[str, ...]
    exclude: tuple[str, ...]


def describing(scenes: tuple[Scene, ...], num_texts: int, phrasing: int, a_first: bool, rng: Random) -> Asked:
    """Return the captions of the first ``num_texts`` scenes, requested in one of several wordings."""
    claims = [describe(scene, a_first) for scene in scenes[:num_texts]]
    prompt = rng.choice(_DESCRIBE)
    return Asked(
        tuple(Candidate(prompt, say(claim, phrasing)) for claim in claims),
        tuple(tuple(int(holds(claim, scene)) for claim in claims) for scene in scenes),
        tuple(map(key, claims)),
        tuple(sorted({caption_key for scene in scenes for caption_key in true_keys(scene)})),
    )


def asking(kind: str, scenes: tuple[Scene, ...], phrasing: int, a_first: bool, rng: Random) -> Asked:
    """Return a question of ``kind`` whose answer is text 0 for scene 0 and text 1 for scene 1. For other scenes, both may be false.

    Answers have no keys, so each answer is its own key.
    """
    exclude = set[str]()
    if kind == "yes_no":
        prompt, truth = _yes_no(scenes, a_first, rng)
        answers, truths = ("yes", "no"), [[int(fits), int(not fits)] for fits in truth]
    elif kind == "choice":
        claims = [describe(scene, a_first) for scene in rng.sample(scenes[:2], 2)]
        texts, truths = _options(scenes, claims, phrasing, rng)
        prompt, answers = rng.choice(_CHOICE).format(a=texts[0], b=texts[1]), ("A", "B")
    else:
        shape, numbers = _counted(scenes[0], scenes[1])
        prompt = rng.choice(_COUNT).format(n=noun(shape, 2))
        answers = (_NUMBERS[numbers[0]], _NUMBERS[numbers[1]])
        truths = [[int(_number_of(shape, scene) == number) for number in numbers] for scene in scenes]
        exclude = {_NUMBERS[number] for scene in scenes if (number := _number_of(shape, scene)) in _NUMBERS}
    if not truths[0][0]:
        answers, truths = answers[::-1], [line[::-1] for line in truths]
    candidates = tuple(Candidate(prompt, answer) for answer in answers)
    return Asked(candidates, tuple(tuple(line) for line in truths), (), tuple(sorted(exclude.difference(answers))))


def _yes_no(scenes: tuple[Scene, ...], a_first: bool, rng: Random) -> tuple[str, list[bool]]:
    """Return a yes/no question, and its answer for each scene.

    The question is about the claim of one of the first two scenes. If a thing differs between them, half of the questions are about that
    thing; the others are about the whole claim.
    """
    claim, other = (describe(scene, a_first) for scene in rng.sample(scenes[:2], 2))
    wording = rng.choice(_YES_NO)
    own = [thing for thing, instead in ((claim.x, other.x), (claim.y, other.y)) if thing != instead]
    if own and rng.random() < 0.5:
        thing = rng.choice(own)
        present = [_is_there(thing, scene) for scene in scenes]
        if present[0] != present[1]:
            return wording.format(q=f"{_be(thing)} there {phrase(thing)}"), present
    question = f"{_be(claim.x)} {phrase(claim.x)} {OF[claim.relation]} {phrase(claim.y)}"
    return wording.format(q=question), [holds(claim, scene) for scene in scenes]


def _options(scenes: tuple[Scene, ...], claims: list[Claim], phrasing: int, rng: Random) -> tuple[list[str], list[list[int]]]:
    """Return two options, and for each scene whether each of them is true (1 or 0).

    The options are the two captions. If the scenes differ in only one thing, they are in half of the cases its two descriptions.
    """
    pairs = [(one, two) for one, two in zip((claims[0].x, claims[0].y), (claims[1].x, claims[1].y), strict=True) if one != two]
    if len(pairs) == 1 and rng.random() < 0.5:
        present = [[int(_is_there(thing, scene)) for thing in pairs[0]] for scene in scenes]
        if sorted(present[:2]) == [[0, 1], [1, 0]]:
            return [phrase(thing) for thing in pairs[0]], present
    return [say(claim, phrasing) for claim in claims], [[int(holds(claim, scene)) for claim in claims] for scene in scenes]


def phrase(thing: Description) -> str:
    """Format a description, such as "two small red circles"."""
    return " ".join(word for word in noun_phrase(thing) if word)


def _is_there(thing: Description, scene: Scene) -> bool:
    return any(thing.fits(seen) for seen in scene.things)


def _be(thing: Description) -> str:
    return "is" if thing.count == 1 else "are"


def _counted(before: Scene, after: Scene) -> tuple[str, tuple[int, int]]:
    """Return the shape whose number differs between two scenes, and its two numbers."""
    old, new = next(pair for pair in zip(before.things, after.things, strict=True) if pair[0].count != pair[1].count)
    return old.shape, (old.count, new.count)


def _number_of(shape: str, scene: Scene) -> int:
    return sum(thing.count for thing in scene.things if thing.shape == shape)


def all_texts(seed: int, number: int) -> list[str]:
    """Draw captions, prompts and answers from the whole grammar, on which a tokenizer should be trained."""
    rng = Random(f"{seed}/prompts")
    texts = [*all_captions(seed, number), *_DESCRIBE, "yes", "no", "A", "B", *_NUMBERS.values()]
    claims = all_claims(seed, number)
    for claim, other in zip(claims, claims[::-1], strict=True):
        relation_question = f"{_be(claim.x)} {phrase(claim.x)} {OF[claim.relation]} {phrase(claim.y)}"
        texts.append(rng.choice(_YES_NO).format(q=rng.choice((relation_question, f"{_be(claim.x)} there {phrase(claim.x)}"))))
        texts.append(rng.choice(_CHOICE).format(a=say(claim, 0), b=say(other, 0)))
        texts.append(rng.choice(_COUNT).format(n=noun(claim.x.shape, 2)))
    return texts
