"""What a phrase of place or an action says in its caption, and where nothing else would do.

A cabinet above a stove is never below it, a man in front of a wall is not seen behind it, and who jumps in the air does not lie there.
"""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.caption import Caption


def is_place(caption: Caption, places: list[int], phrase: str) -> bool:
    """Whether a phrase says where something is, and its opposite would say something else."""
    after = [caption.word(places[-1] + k) for k in range(1, 6 if phrase in ("in front of", "inside", "outside") else 4)]
    if (v.NO_OPPOSITE.get(phrase, frozenset()) | v.OF_BODY) & set(after) or after[0] in ("turn", "lane", "field"):
        return False
    if phrase in ("left of", "right of"):  # "what is left of the cake"
        before = caption.word(places[0] - 1)
        return (caption.word(places[0] - 2) if before in ("is", "are") else before) in v.NOUNS
    subject = caption.word(places[0] - 1)
    if subject in v.FROM_THERE or {"from", "away"} & set(caption.words[max(0, places[0] - 6) : places[0]]):
        return False
    if phrase == "behind" and not after[0]:  # looking behind
        return False
    if phrase in ("above", "below", "under", "beneath", "underneath") and after[0] in v.FOLLOWING:  # it flies high above in the sky
        return False
    if subject in v.LIES_BELOW or (phrase in ("above", "below") and (subject in v.ABOVE_ALL | v.HANGING or "air" in caption.words)):
        return False
    return phrase not in ("inside", "outside") or _is_of_something(caption, after[0])


def _is_of_something(caption: Caption, after: str) -> bool:
    """Whether "inside" or "outside" is said of a thing, and not of all that is shown: "she eats outside at a table"."""
    return bool(after) and (after == "of" or after not in v.FOLLOWING) and not after.endswith("ing")


def is_action(caption: Caption, place: int, action: str, form: str) -> bool:
    """Whether a word says what somebody does, and a still picture shows it."""
    after, rest = caption.word(place + 1), set(caption.words[place:])
    if not caption.is_done_by_somebody(place) or (action in v.OF_PLACE and after and after not in v.AFTER_PLACE):
        return False
    if after == "at" and action in ("running", "jumping", "walking"):
        return False  # towards it
    if action == "walking" and {"that", "which", "whom"} & set(caption.words[:place]):
        return False  # a dog that a woman is walking
    if after == "by" and (not caption.word(place + 2) or caption.word(place + 2) in v.FOLLOWING):
        return False  # who walks by does not sit by
    if form != action and (not after or caption.word(place - 1) in ("is", "are", "was", "were")):
        return False
    if action in ("smiling", "laughing", "crying") and after not in ("", "at", "in", "on", "and", "while", "with"):
        return False
    if action in ("pushing", "pulling", "throwing", "catching") and _who(caption, place) not in v.PEOPLE:
        return False
    if action in ("pushing", "pulling"):
        return not rest & v.PULLED
    return not (action in ("throwing", "catching") and ({"to", "at", "from", "towards", "toward"} & rest or not rest & v.THROWN))


def done_there(caption: Caption, place: int, options: Sequence[str]) -> list[str]:
    """Without what those who do it cannot do, or not at such a place: birds sit or stand, horses do not sit, nobody lies at a desk."""
    somebody = _who(caption, place)
    one = v.NOUNS[somebody][1] if somebody in v.NOUNS else somebody
    after, rest = caption.word(place + 1), caption.words[place + 1 :]
    near = set(rest[:5])
    if one in ("bird", "duck") or "carrying" in rest or near & (v.OF_BODY | v.IN_MOTION) or (after == "on" and near & v.RIDDEN):
        return []
    never = set[str]()
    if one in ("horse", "cow", "sheep", "goat", "pig", "zebra", "giraffe", "elephant"):
        never |= _SIT
    if after == "at":
        never |= _LIE | _SLEEP
    if after in ("in", "inside") and near & v.SEATED_IN:
        never |= _STAND | _LIE
    if set(rest) & v.AWAKE:
        never |= _SLEEP
    if after == "on" and near & v.NARROW:
        never |= _SLEEP | _LIE
    if {"and", "while", "as"} & set(rest) or any(word.endswith("ing") and word not in v.NOT_VERBS for word in rest):
        never |= _SLEEP  # who sleeps does nothing else
    if "while" in rest:
        never |= _LIE
    return [option for option in options if option not in never]


_SIT, _STAND, _LIE, _SLEEP = (
    frozenset(forms.split()) for forms in ("sitting sits sit", "standing stands stand", "lying lies lie", "sleeping sleeps sleep")
)


def _who(caption: Caption, place: int) -> str:
    """Who does what a word at a place says."""
    return caption.word(place - 1) if caption.word(place - 1) not in ("is", "are", "was", "were") else caption.word(place - 2)
