"""Caption grammar: claims, which are the contents of captions, their phrasings, and the check whether a claim is true of a scene.

A caption always mentions shape, colour and number of both things and their relation, and texture and size if they are not the default. An
anchor and its counterfactuals use the same phrasing and the same mention order, so they differ only in the words of the edited factor.
Numbers are exact ("a" is one); an unmentioned texture or size is left open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random

from cfvlm_ds.demo.scenes.world import OPPOSITE, Rule, Scene, Thing, draw_plan, draw_scene

_NUMBERS = {1: "a", 2: "two", 3: "three"}
OF = {"left": "left of", "right": "right of", "above": "above", "below": "below", "front": "in front of", "behind": "behind"}
_TO = OF | {"left": "to the left of", "right": "to the right of"}
_SIDE = {"left": "to the left", "right": "to the right", "above": "above", "below": "below", "front": "in front", "behind": "behind"}
_AT = _SIDE | {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}

PHRASINGS = (
    "{x} {of} {y}",
    "{x} {to} {y}",
    "we see {x} {of} {y}",
    "a picture of {x} {of} {y}",
    "{y} with {x} {side}",
    "{at} {x} and {at_other} {y}",
    "{of} {y} we see {x}",
)
"""Templates with two noun phrases x and y. The other fields are words for the relation of x to y, except ``at_other``, for that of y to x.
"{at} ..." keeps the bag of words when the relation is reversed."""


@dataclass(frozen=True)
class Description:
    """What a caption says about one thing. ``size`` and ``texture`` are None if the caption does not mention them."""

    count: int
    size: str | None
    texture: str | None
    colour: str
    shape: str

    def fits(self, thing: Thing) -> bool:
        """Return whether the description is true of ``thing``."""
        return (
            (self.count, self.colour, self.shape) == (thing.count, thing.colour, thing.shape)
            and self.size in (None, thing.size)
            and self.texture in (None, thing.texture)
        )


@dataclass(frozen=True)
class Claim:
    """Content of a caption: x is in ``relation`` to y."""

    x: Description
    relation: str
    y: Description


def describe(scene: Scene, a_first: bool) -> Claim:
    """Return the claim of a scene's caption, with thing A as x (``a_first``) or thing B."""
    a, b = (
        Description(
            thing.count,
            None if thing.size == "medium" else thing.size,
            None if thing.texture == "plain" else thing.texture,
            thing.colour,
            thing.shape,
        )
        for thing in scene.things
    )
    return Claim(a, scene.relation, b) if a_first else Claim(b, OPPOSITE[scene.relation], a)


def holds(claim: Claim, scene: Scene) -> bool:
    """Return whether a claim is true of a scene, with its things in either role."""
    a, b = scene.things
    as_is = claim.x.fits(a) and claim.y.fits(b) and claim.relation == scene.relation
    reversed_ = claim.x.fits(b) and claim.y.fits(a) and claim.relation == OPPOSITE[scene.relation]
    return as_is or reversed_


def key(claim: Claim) -> str:
    """Return a key of a claim that is independent of its phrasing and mention order."""
    if claim.relation not in ("left", "above", "front"):
        claim = Claim(claim.y, OPPOSITE[claim.relation], claim.x)
    return " ".join(word for word in (*noun_phrase(claim.x), *OF[claim.relation].split(), *noun_phrase(claim.y)) if word)


def true_keys(scene: Scene) -> list[str]:
    """Return the keys of all captions that are true of a scene, with and without each texture and size."""
    claim = describe(scene, True)
    things = [
        [replace(thing, size=size, texture=texture) for size in {thing.size, None} for texture in {thing.texture, None}]
        for thing in (claim.x, claim.y)
    ]
    return sorted(key(Claim(x, claim.relation, y)) for x, y in product(*things))


def parts(claim: Claim, phrasing: int) -> list[str]:
    """Return the pieces of a caption, with "" for unmentioned attributes. In one phrasing, pieces of two claims correspond by index."""
    relation = claim.relation
    words = {
        "{x}": noun_phrase(claim.x),
        "{y}": noun_phrase(claim.y),
        "{of}": [OF[relation]],
        "{to}": [_TO[relation]],
        "{side}": [_SIDE[relation]],
        "{at}": [_AT[relation]],
        "{at_other}": [_AT[OPPOSITE[relation]]],
    }
    return [piece for token in PHRASINGS[phrasing].split() for piece in words.get(token, [token])]


def say(claim: Claim, phrasing: int) -> str:
    """Format the caption in lower case, without a full stop."""
    return " ".join(piece for piece in parts(claim, phrasing) if piece)


def difference(before: Claim, after: Claim, phrasing: int) -> tuple[str, str]:
    """Return the words that differ between the captions of two claims, first those of ``before``, then those of ``after``."""
    pairs = [(p, q) for p, q in zip(parts(before, phrasing), parts(after, phrasing), strict=True) if p != q]
    return " ".join(p for p, _ in pairs), " ".join(q for _, q in pairs)


def all_claims(seed: int, num_claims: int) -> list[Claim]:
    """Draw claims from the whole grammar, including held-out combinations, without the planted correlation."""
    rng, rule = Random(f"{seed}/captions"), Rule(p=0.5, held_out="may")
    return [describe(draw_scene(rng, rule, draw_plan(rng, rule)), a_first=True) for _ in range(num_claims)]


def all_captions(seed: int, num_captions: int) -> list[str]:
    """Draw captions from the whole grammar."""
    rng = Random(f"{seed}/phrasings")
    return [say(claim, rng.randrange(len(PHRASINGS))) for claim in all_claims(seed, num_captions)]


def noun(shape: str, count: int) -> str:
    """Return the noun in the singular or plural, such as "star" or "crosses"."""
    return shape if count == 1 else shape + ("es" if shape.endswith("s") else "s")


def noun_phrase(what: Description) -> list[str]:
    """Return number, size, texture, colour and noun, with "" for unmentioned attributes."""
    return [_NUMBERS[what.count], what.size or "", what.texture or "", what.colour, noun(what.shape, what.count)]
