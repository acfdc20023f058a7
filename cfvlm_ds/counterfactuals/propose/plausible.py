"""What may stand in the place of a noun.

A picture of the edited caption must be thinkable: a giraffe on a wire is told from a photograph by its words alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from cfvlm_ds.counterfactuals.propose.attributes import MADE_OF, PATTERNED, can_be
from cfvlm_ds.counterfactuals.propose.caption import Caption, Phrase
from cfvlm_ds.counterfactuals.propose.siblings import BESIDE, INSTEAD
from cfvlm_ds.counterfactuals.propose.vocabulary import (
    ALIKE,
    ANIMATE,
    FLAT,
    FOLLOWING,
    FOOD,
    GENDERED,
    NEVER_PROPOSED,
    NOT_VERBS,
    NOUNS,
    PEOPLE,
    SCENERY,
)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


OF_ONE_SEX = _set(
    """dress dresses skirt skirts bikini bikinis beard beards bearded mustache moustache bald pregnant bra gown heels shirtless bride groom
    wedding makeup lipstick nun monk king queen husband wife father mother son daughter pigtail pigtails ponytail ponytails braids tutu sari
    topless ballerina ballerinas cheerleader cheerleaders hijab purse"""
)
OUTSIDE = _set(
    """park street road beach garden yard field grass river lake forest hill sidewalk parking lawn meadow snow sea ocean water city
    mountains sand sandy grassy snowy patio deck trees sunny outdoors outside woods wooded trail path nature bridge desert jungle zoo curb
    pavement hillside pasture pier porch outdoor court mountain"""
)
GRAZERS = _set("zebra elephant horse cow sheep goat")
WORN = _set("wearing wears wear dressed worn")

_ALIKE = {word: frozenset().union(*(group for group in ALIKE if word in group)) for _, word, _ in NOUNS.values()}


def is_compared(caption: Caption, phrase: Phrase) -> bool:
    """Whether there is something else that tells the size of a thing: a picture of a lone ball shows no size."""
    return any(each.noun != phrase.noun and caption.words[each.noun] not in SCENERY for each in caption.phrases)


def instead(caption: Caption, phrase: Phrase) -> frozenset[str]:
    """Singulars of what may stand in the place of a noun; none where it is what the rest of the caption needs."""
    at = _At(caption, phrase)
    if at.said & BESIDE.get(at.one, frozenset()) or (at.category == "person" and at.said & (GENDERED | OF_ONE_SEX)) or _is_held(at):
        return frozenset()
    found = INSTEAD.get(at.one, frozenset()) - _ALIKE[at.one] - {at.one}
    found -= frozenset() if at.category == "shape" else NEVER_PROPOSED
    if at.category in _FITTING:
        found = _FITTING[at.category](at, found)
    if at.before in INTO:
        found -= _set("plate fork knife spoon umbrella bicycle bike motorcycle tractor")
    return frozenset(each for each in found if _fits(caption, phrase, each))


class _At:
    """A noun and the words around it."""

    def __init__(self, caption: Caption, phrase: Phrase) -> None:
        assert phrase.known is not None
        self.caption, self.phrase = caption, phrase
        self.category, self.one, _ = phrase.known
        self.said = set(caption.words)
        self.before, self.earlier = caption.word(phrase.start - 1), caption.word(phrase.start - 2)
        self.before = "on" if self.before == "of" and self.earlier == "top" else self.before
        self.after = caption.word(phrase.noun + 1)
        self.adjectives = {caption.words[place] for place in phrase.adjectives}
        self.determiner = "" if phrase.determiner is None else caption.words[phrase.determiner]

    @property
    def is_stuff(self) -> bool:
        """Whether it is named as stuff, without an article: who is eating pizza is not eating sandwich."""
        return self.phrase.start > 0 and self.phrase.determiner is None and not self.phrase.plural

    @property
    def who_is_on(self) -> str:
        """Who or what is on it: the noun before "on", or before the verb that is there."""
        place = self.phrase.start - 1
        while self.caption.word(place) in _ON:
            place -= 1
        while self.caption.word(place) in _RESTING | _set("is are was were that which who"):
            place -= 1
        return self.caption.word(place)

    @property
    def has_on_it(self) -> bool:
        """Whether something is in it or on it."""
        words = self.caption.words
        return any(word in (*INTO, "on") and following in ("it", "them") for word, following in pairwise(words))

    @property
    def is_calm(self) -> bool:
        """Whether an animal does nothing but what any animal does: no rabbit barks, begs or is trained."""
        doing = {word for word in self.caption.words if word.endswith("ing") and word not in NOT_VERBS}
        return (
            doing <= _CALM
            and not self.said & _HANDLING
            and (not self.after or self.after in FOLLOWING | _CALM or self.after in ("left", "right"))
        )


def _is_held(at: _At) -> bool:
    """Whether the words around a noun leave room for no other one."""
    if at.before in ("like", "as"):  # a sign that looks like a clock
        return True
    on = at.before in ("on", "onto", "riding", "rides", "ride")
    if at.category in _HELD_BY and at.before in _HELD_BY[at.category]:
        return True
    if (at.category in ("bag", "vehicle", "tool") and at.said & _FASTENED) or (at.after == "of" and at.category != "dish"):
        return True  # a coat of paint, too
    a_part = at.earlier in ("back", "out", "inside", "cab") or (at.earlier == "front" and at.caption.word(at.phrase.start - 3) != "in")
    if at.before == "of" and a_part and at.category in ("vehicle", "animal"):
        return True
    if at.category == "building" and at.after in ("on", "atop") and at.said & _set("building buildings roof"):
        return True
    if at.one == "dog" and (at.before in _WALKED or (at.said & _WALKED and (at.before == "with" or at.said & PEOPLE))):
        return True
    if at.one == "dog" and at.determiner in ("his", "her", "their") and at.said & (OUTSIDE | _set("plains")):
        return True
    if at.one in _CYCLES and (on or at.before in ("his", "her", "their")):
        return True
    if at.one in ("tree", "bush"):  # what stands in the background, or where something is
        return at.determiner in ("", "some") or at.before in _set("in under on up from beneath into of underneath")
    if at.one == "umbrella" and at.before in ("under", "beneath", "underneath", "by"):
        return True
    if at.one in ("sink", "bowl", "cup", "chair", "couch", "sofa", "bed") and at.before in INTO:
        return True
    if (at.one == "flower" and at.before == "of") or (at.one == "camera" and at.determiner == "the" and at.phrase.start > 0):
        return True
    if at.one in ("fork", "knife", "spoon") and at.said & FOOD:
        return True
    using = at.category == "tool" or (at.one in ("fork", "knife", "spoon") and bool(at.said & _USED))
    return at.before == "with" and using and at.earlier != "table"


def _animal(at: _At, found: frozenset[str]) -> frozenset[str]:
    if not at.is_calm or at.said & FOOD:
        return frozenset()
    if at.said & _set("grazing grazes graze herd"):
        found &= GRAZERS
    if at.one in INSTEAD["bear"] | {"bear"} and at.said & _INDOORS:  # a toy
        return frozenset()
    if at.said & PEOPLE:
        found -= _set("lion tiger")  # with whom nobody is seen
    if at.adjectives & _LARGE:
        found -= _set("monkey")
    if at.said & _set("sitting sits sit"):
        found -= _set("horse zebra giraffe elephant")
    return found if at.said & _DOGS and at.said & _CATS else found - _set("rabbit")  # which hardly ever is where dogs and cats are


def _vehicle(at: _At, found: frozenset[str]) -> frozenset[str]:
    if (at.one in _CYCLES and at.said & _FOR_CYCLES) or (at.one in ("bus", "train") and at.before in ("on", "onto")):
        return frozenset()
    if at.has_on_it:
        found &= _set("truck van") if at.one in ("car", "truck", "van") and not at.said & PEOPLE else frozenset()
    if at.said & _OF_A_CABIN:
        found -= _CYCLES
    for_many = at.said & (PEOPLE | _set("carrying carries loaded full traffic")) or at.adjectives & _LARGE
    if for_many and at.one in ("car", "bus", "truck", "van", "tractor"):
        found -= _CYCLES
    if at.before in ("on", "onto"):  # a cat on a car
        found &= _set("car truck van")
    return found if at.said & _FARM else found - _set("tractor")


def _furniture(at: _At, found: frozenset[str]) -> frozenset[str]:
    """By who or what is on it, and by the room."""
    if at.after in _LAID and at.said & (FOOD | _ON_TABLES):
        return frozenset()
    if at.before == "around":
        found &= _set("bed") if "standing" in at.said else frozenset()
    who = at.who_is_on if at.before in ("on", "onto") else ""
    if who in PEOPLE or who in ANIMATE:
        found &= _set("chair bench couch bed")
        if NOUNS.get(who, ("", "", who))[2] == who or who in _MANY:
            found -= _set("chair")
    elif at.one in ("table", "desk") and at.said & FOOD:
        return frozenset()
    elif who:
        found &= _set("bench") if at.said & _RESTING and at.said & (PEOPLE | ANIMATE) else _set("bench table desk")
    if at.said & _LYING and at.before != "to":
        found &= _set("bench couch bed")
    if at.one == "chair" and at.said & _set("table tables desk desks"):
        found &= _set("bench desk") if at.said & _set("bed beds") else _set("bench")
    if at.said & (_BATHROOM | _KITCHEN):
        found &= _set("chair bench table") if at.said & _KITCHEN else _set("chair bench")
    if at.said & OUTSIDE:
        found -= _set("bed couch desk")
    if at.said & _RIDDEN_IN:
        found &= _set("chair bench")
    return found - _set("bed") if at.phrase.plural or at.said & _set("living office lobby waiting classroom") else found


def _building(at: _At, found: frozenset[str]) -> frozenset[str]:
    return found if at.said & _FARM else found - _set("barn")


def _dish(at: _At, found: frozenset[str]) -> frozenset[str]:
    if at.has_on_it or at.said & _DRINKING or (at.before == "of" and at.earlier in ("bottom", "edge", "rim")):
        return frozenset()
    if at.one == "vase" and at.said & _IN_VASES:
        return found & _set("bottle") if at.after != "of" else frozenset()
    if at.one not in ("fork", "knife", "spoon"):
        found -= _set("fork knife spoon")
    if at.after == "with":
        found -= _set("plate")
    full = at.after in ("of", "topped", "filled", "full")
    if at.said & FOOD or full:  # a bowl of fruit, a plate of food; a vase of flowers is left alone
        found &= _set("bowl plate") if at.one in ("bowl", "plate") or not full else frozenset()
    if at.said & FLAT:
        found -= _set("bowl")
    return found - _set("plate") if at.said & _set("soup cereal milk water") else found


def _fruit(at: _At, found: frozenset[str]) -> frozenset[str]:
    return found - _set("lemon") if at.said & _EATING else found


def _appliance(at: _At, found: frozenset[str]) -> frozenset[str]:
    return found - _set("toaster") if at.before in ("on", "onto") else found


def _snack(at: _At, found: frozenset[str]) -> frozenset[str]:
    if at.is_stuff or at.said & _set("stove oven box boxes") or (at.one == "cake" and at.said & PEOPLE):
        return frozenset()
    return found


def _bag(at: _At, found: frozenset[str]) -> frozenset[str]:
    if at.before in INTO and at.said & FOOD:
        return frozenset()
    return found - _set("handbag") if at.said & _MEN else found


def _sport(at: _At, found: frozenset[str]) -> frozenset[str]:
    indoors = not at.said & OUTSIDE
    if indoors or at.is_stuff or at.said & _THROWN or any(NOUNS[word][0] == "animal" for word in at.said if word in NOUNS):
        found -= _set("kite")
    return found - _set("ball kite") if at.said & _LEANING else found


def _clothing(at: _At, found: frozenset[str]) -> frozenset[str]:
    if at.said & WORN or at.before in ("in", "with"):
        found -= _set("shirt dress")  # who wears a hat wears a shirt too
    if at.one in ("shirt", "dress") and at.said & PEOPLE:
        found &= {"coat"}  # no hat is worn in its place
    if at.said & _PLAYING:
        found -= _set("scarf coat tie jacket")
    if at.said & _MEN:
        found -= _set("dress")
    for noun, others in _WORN_INSTEAD.items():
        found -= _set(noun) if at.said & others else frozenset()
    return found


_FITTING: dict[str, Callable[[_At, frozenset[str]], frozenset[str]]] = {
    "animal": _animal,
    "appliance": _appliance,
    "vehicle": _vehicle,
    "furniture": _furniture,
    "dish": _dish,
    "fruit": _fruit,
    "snack": _snack,
    "bag": _bag,
    "building": _building,
    "sport": _sport,
    "clothing": _clothing,
}
"""Category -> of what might stand in the place of a noun, what is found there."""
INTO = ("in", "inside", "into", "from", "outside")
_UPON = _set("on onto riding rides ride")
_HELD_BY = {
    "animal": _UPON,
    "sport": _UPON,
    "dish": _UPON,
    "device": _UPON | _set("in at for to facing towards toward"),  # smiling at the camera
    "shape": _set("in"),  # people stand in a circle, and in a square
    "furniture": _set("at"),
    "plant": _set("on onto"),
    "building": _set("in inside into"),
    "appliance": _set("in into inside"),
    "tool": _set("in on of"),
    "vehicle": _set("walking walks walk walked pushing pushes push carrying carries carry lifting lifts lift wheeling wheels"),
}
_ON = _set("on onto top of")
_RESTING = _set(
    """sitting standing lying laying sleeping resting relaxing asleep seated placed sits stands lies lays sleeps rests sit stand lie lay
    sleep rest down together up"""
)
_CALM = _set(
    """sitting standing lying laying sleeping resting walking running looking staring playing waiting eating grazing holding wearing hugging
    sits stands lies lays sleeps rests walks runs looks waits eats grazes sit stand lie lay sleep rest walk run look wait eat graze fighting
    wrestling watching crouching chasing entering crossing kneeling"""
)
_HANDLING = _set("pull pulls pulled feed feeds fed pat pats pet pets petting lead leads led wash washes kiss kisses touch touches stroke")
_FASTENED = _set("attached mounted mounts mounting fastened tied strapped bolted towed towing tows")
_RIDDEN_IN = _set("train trains bus subway airplane plane boat ferry")
_INDOORS = _set("table tables chair chairs couch sofa bed desk shelf room kitchen bedroom house")
_CYCLES = _set("bike bicycle motorcycle")
_FOR_CYCLES = _set(
    """sidewalk sidewalks walkway hallway hall room apartment bedroom kitchen office lobby porch balcony stairs staircase steps stacked
    wheelie"""
)
"""Where no car goes."""
_OF_A_CABIN = _set("window windows windshield windscreen door doors roof hood bumper seats backseat sunroof dashboard")
_LARGE = _set("large big huge giant")
_LEANING = _set("leaning leaned leans lean leant propped upright")
_EATING = _set("eating eats eat eaten ate biting bites bite bitten chewing")
_FARM = _set("farm field fields barn hay dirt grass rural country countryside mud yard")
_MANY = _set("people children kids ladies guys friends couple family group players adults women men")
_BATHROOM = _set("bathroom toilet toilets urinal urinals restroom shower bathtub tub sink sinks")
_KITCHEN = _set("kitchen stove oven refrigerator microwave dishwasher counter restaurant cafe dining diner")
_LAID = _set("with topped filled covered full set made that has")
_ON_TABLES = _set(
    "chairs computer computers laptop laptops monitor monitors keyboard umbrella umbrellas cups plates glasses candles flowers"
)
_DRINKING = _set("drinking drinks drink licking licks lick pouring pours poured beer wine")
_IN_VASES = _set("flower flowers rose roses tulips bouquet plant plants stems")
_DOGS, _CATS = _set("dog dogs"), _set("cat cats")
_WORN_INSTEAD = {
    "hat": _set("cap caps helmet helmets hood beanie bandana headband crown wig turban sombrero"),
    "jacket coat": _set("suit suits vest vests hoodie sweatshirt sweater sweaters blazer blazers uniform uniforms"),
    "shirt dress": _set("t-shirt top blouse sweater sweatshirt hoodie suit jacket coat"),
}
"""Clothes -> other ones in whose company they are one too many."""
_WALKED = _set("walking walks walk running runs run jogging jogs")
_LYING = _set("lying laying lies lays sleeping sleeps asleep")
_MEN = _set("man men boy boys guy guys")
_THROWN = _set("throwing throws throw catching catches catch tossing tossed reaching reaches")
_USED = _set("cutting cuts cut slicing eating eats spreading stirring")
_PLAYING = _set("tennis baseball soccer football frisbee skateboard surfboard skateboarding surfing ball racket racquet bat")


def _fits(caption: Caption, phrase: Phrase, noun: str) -> bool:
    """Whether what is said of a noun may be said of another one."""
    words = [caption.words[place] for place in phrase.adjectives]
    for word, nouns in _ONLY_OF.items():
        if word in words and noun not in nouns:
            return False
    for word in words:
        if not can_be(noun, word) and word in _COLOURS:
            return False
        if word in _MATERIALS and word not in MADE_OF.get(noun, frozenset()):
            return False
    if "tall" in words and phrase.known is not None and phrase.known[0] == "snack":
        return False
    return not (
        phrase.known is not None and phrase.known[0] == "vehicle" and set(words) & {"long", "tall"} and noun not in ("bus", "truck")
    )


_ONLY_OF = {
    **dict.fromkeys(("empty", "full"), _set("bowl cup bottle vase plate basket")),
    **dict.fromkeys(("open", "closed"), _set("book newspaper map")),
    **dict.fromkeys(("ripe", "sliced"), INSTEAD["carrot"] | INSTEAD["apple"]),
    **dict.fromkeys(("striped", "dotted", "plaid", "checkered"), PATTERNED | INSTEAD["circle"]),
    "long": _set("table bench desk couch bus truck"),
    "round": _set("plate bowl table"),
}
"""Adjective -> the nouns of which it may be said."""
_COLOURS = frozenset(
    ["red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink", "brown", "black", "white", "gray", "grey"]
) | _set("violet beige tan silver gold golden turquoise maroon")
_MATERIALS = _set("wooden metal plastic glass stone brick leather")
