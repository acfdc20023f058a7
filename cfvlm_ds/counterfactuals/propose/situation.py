"""What a phrase of place or an action says in its caption, and where nothing else would do.

A cabinet above a stove is never below it, a man in front of a wall is not seen behind it, and who jumps in the air does not lie there.
"""

from __future__ import annotations

from collections.abc import Sequence

from cfvlm_ds.counterfactuals.propose import vocabulary as v
from cfvlm_ds.counterfactuals.propose.caption import Caption
from cfvlm_ds.counterfactuals.propose.grammar import is_plural
from cfvlm_ds.counterfactuals.propose.siblings import word_set


def is_place(caption: Caption, places: list[int], phrase: str) -> bool:
    """Whether a phrase says where something is, and its opposite would say something else."""
    after = [caption.word(places[-1] + k) for k in range(1, 6 if phrase == "in front of" else 4)]
    if (v.NO_OPPOSITE.get(phrase, frozenset()) | v.OF_BODY) & set(after) or after[0] in ("turn", "lane", "field"):
        return False
    if phrase in ("left of", "right of"):  # "what is left of the cake"
        before = caption.word(places[0] - 1)
        return (caption.word(places[0] - 2) if before in ("is", "are") else before) in v.NOUNS
    subject = caption.word(places[0] - 1)
    if subject in v.FROM_THERE or {"from", "away"} & set(caption.words[max(0, places[0] - 6) : places[0]]):
        return False
    if phrase == "in front" or (phrase in ("behind", "above", "below", "under") and not after[0]):  # looking behind
        return False
    if phrase in _OF_AN_OBJECT and after[0] in v.FOLLOWING:  # it flies high above in the sky
        return False
    said, own = set(caption.words), set(_phrase_from(caption, places[-1] + 1))
    if own & v.NO_OPPOSITE.get(phrase, frozenset()) or subject in v.LIES_BELOW:
        return False
    if phrase in ("above", "below"):
        known = subject == "plane" or v.NOUNS.get(subject, ("appliance",))[0] not in ("appliance", "building")
        return known and not (subject in v.ABOVE_ALL | v.HANGING or said & v.OFF_THE_GROUND or own & _PRONOUNS)
    who = _subject(caption, places[0])
    kind = v.NOUNS.get(who, ("",))[0]
    if phrase in ("on top of", "under", "underneath", "beneath"):
        moved = kind in ("animal", "sport", "shape", "bag") and not said & v.FOOD and not said & v.SKATED
        hidden = phrase == "on top of" and own & {"bed", "couch", "sofa", "desk"}
        return moved and not hidden and bool(own & (v.SUPPORTS | _SHAPES))
    if phrase in ("in front of", "behind"):
        if own & v.AREAS or said & (v.ORDERED | v.IN_A_GAME | v.FAR):
            return False
        earlier = set(caption.words[max(0, places[0] - 4) : places[0]])
        moves = kind in ("person", "animal", "vehicle") or "with" in earlier
        if own & _PRONOUNS and (earlier & (v.SCENERY | v.BACKDROPS) or not moves):
            return False  # the scenery, or what somebody works at
        return phrase == "behind" or bool(own & (v.SEEN_BEHIND | _PRONOUNS) and not own & v.HIDING)
    if phrase in ("inside", "outside"):
        return bool(own & v.CONTAINERS) and not said & v.FOOD and (kind in ("animal", "sport", "bag", "shape") or who in v.PEOPLE)
    return True


def _phrase_from(caption: Caption, place: int) -> list[str]:
    """The words of the phrase that begins at a place."""
    end = next((k for k in range(place + 1, len(caption.words) + 1) if not caption.word(k) or caption.word(k) in v.FOLLOWING), place)
    return caption.words[place:end]


def is_action(caption: Caption, place: int, action: str, form: str) -> bool:
    """Whether a word says what somebody does, and a still picture shows it."""
    after, rest = caption.word(place + 1), set(caption.words[place:])
    if not caption.is_done_by_somebody(place):
        return False
    if action in v.OF_PLACE and after and after not in (v.AFTER_MOTION if action in v.MOTION else v.AFTER_PLACE):
        return False
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
    options = [each for each in options if _moves_there(caption, place, each)]
    somebody = _who(caption, place)
    one = v.NOUNS[somebody][1] if somebody in v.NOUNS else somebody
    after, rest = caption.word(place + 1), caption.words[place + 1 :]
    near = set(rest[:5])
    if after == "and" or (caption.words[place] in _LYING and set(rest) & {"under", "underneath", "beneath", "top"}):
        return []  # running and playing, or with something on top
    if one in ("bird", "duck") or "carrying" in rest or near & (v.OF_BODY | v.IN_MOTION) or (after == "on" and near & v.RIDDEN):
        return []
    never = set[str]()
    if one in ("horse", "cow", "sheep", "goat", "pig", "zebra", "giraffe", "elephant"):
        never |= _SIT | (_SLEEP if caption.words[place] in _STAND else set()) | (_STAND if caption.words[place] in _SLEEP else set())
    if after == "at":
        never |= _LYING | _SLEEP
    if after in ("in", "inside") and near & v.SEATED_IN:
        never |= _STAND | _LYING
    if set(rest) & (v.AWAKE | v.FOOD) or set(caption.words) & (v.BUSY | v.MADE_LIKE):
        never |= _SLEEP
    if caption.words[place] in v.MOTION and (set(caption.words) - {caption.words[place]}) & (v.ALONG | _MOVING):
        return []  # beside who moves
    if after == "on" and near & v.NARROW:
        never |= _SLEEP | _LYING
    doing = {word for word in rest if word.endswith("ing") and word not in v.NOT_VERBS}
    if {"and", "while", "as"} & set(rest) or doing:
        never |= _SLEEP  # who sleeps does nothing else
    if "while" in rest or doing - _LOOKING or (after in ("in", "inside") and near & v.WATERS):
        never |= _LYING
    if one not in v.PEOPLE and somebody not in v.PEOPLE:
        never |= _KNEEL
    else:
        never |= _never_of_people(caption, somebody, after, near, bool(doing or "and" in rest))
    return [option for option in options if option not in never]


def _moves_there(caption: Caption, place: int, option: str) -> bool:
    """Whether who moves may move otherwise, or stand still, and who stands may move: on the ground, and without a direction."""
    rest, said = set(caption.words[place + 1 :]), set(caption.words)
    if caption.words[place] in v.MOTION and option in v.MOTION:
        return not said & (v.IN_A_RUN | v.IN_A_WALK | v.IN_PLAY)
    if caption.words[place] in v.MOTION or option in v.MOTION:
        near = set(caption.words[place + 2 : place + 6])
        return caption.word(place + 1) in ("on", "in") and bool(near & v.GROUNDS) and not rest & v.DIRECTIONS and not said & v.IN_PLAY
    return True


def _never_of_people(caption: Caption, somebody: str, after: str, near: set[str], busy: bool) -> set[str]:
    """Animals lie anywhere. People lie on a bed, and not beside a bus; several lie on no bench."""
    if (v.IN_PLAY | v.AT_WORK) & set(caption.words):
        return {*_SIT, *_STAND, *_LYING, *_SLEEP}
    several = (somebody in v.NOUNS and v.NOUNS[somebody][2] == somebody) or is_plural(somebody)
    never = set[str]()
    if (after in ("on", "in", "across") and near & v.WET) or near & v.STOOD_AT:
        never |= _SIT | _LYING | _KNEEL
    if after not in ("on", "in") or not near & v.LAIN_ON or (several and near & (v.SEATS | {"bench"})):
        never |= _LYING | _SLEEP  # who sits in a seat may be asleep
    if near & word_set("desk table bar sidewalk water pool ladder stairs"):
        never |= _KNEEL
    if near & v.SEATS or (busy and "bench" in caption.words):
        never |= _STAND
    return never


_LYING = word_set("lying lies lie laying lays lay")
_SIT, _STAND, _SLEEP, _KNEEL = (
    word_set(forms) for forms in ("sitting sits sit", "standing stands stand", "sleeping sleeps sleep", "kneeling kneels kneel")
)
_OF_AN_OBJECT = ("above", "below", "under", "beneath", "underneath", "behind", "in front of")
_PRONOUNS = word_set("it him her them itself")
_BEING = word_set("is are was were that which who laying parked placed sits stands lies sit stand lie just right")
_MOVING = word_set(
    "running runs run walking walks walk jogging riding rides ride skating skateboarding boarding driving drives pulling flying"
)
_SHAPES = frozenset(form for form, (category, _, _) in v.NOUNS.items() if category == "shape")
_LOOKING = word_set("looking reading watching staring")


def _subject(caption: Caption, place: int) -> str:
    """Of whom or what a phrase of place is said: the noun before it, or before the verb that is there."""
    place -= 1
    while caption.word(place) in v.OF_PLACE | _BEING:
        place -= 1
    return caption.word(place)


def _who(caption: Caption, place: int) -> str:
    """Who does what a word at a place says."""
    return caption.word(place - 1) if caption.word(place - 1) not in ("is", "are", "was", "were") else caption.word(place - 2)
