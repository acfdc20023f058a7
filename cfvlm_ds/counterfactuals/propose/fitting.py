"""What of a kind fits where a noun is: by the words around it, and by who or what is with it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from cfvlm_ds.counterfactuals.propose.caption import Caption, Phrase
from cfvlm_ds.counterfactuals.propose.siblings import INSTEAD, OF_A_GROUND, OF_A_PLACE, OF_ADULTS, OF_CHILDREN, word_set
from cfvlm_ds.counterfactuals.propose.vocabulary import ANIMATE, FLAT, FOLLOWING, FOOD, NOT_VERBS, NOUNS, PEOPLE, SKATED

OUTSIDE = word_set(
    """park street road beach garden yard field grass river lake forest hill sidewalk parking lawn meadow snow sea ocean water city
    mountains sand sandy grassy snowy patio deck trees sunny outdoors outside woods wooded trail path nature bridge desert jungle zoo curb
    pavement hillside pasture pier porch outdoor court mountain backyard playground"""
)
GRAZERS = word_set("zebra elephant horse cow sheep goat")
WORN = word_set("wearing wears wear dressed worn")
EATEN = FOOD | frozenset(form for form, (category, _, _) in NOUNS.items() if category in ("fruit", "vegetable", "snack"))


class At:
    """A noun and the words around it."""

    def __init__(self, caption: Caption, phrase: Phrase) -> None:
        assert phrase.known is not None
        self.caption, self.phrase = caption, phrase
        self.category, self.one, _ = phrase.known
        self.said = set(caption.words)
        self.before, self.earlier = caption.word(phrase.start - 1), caption.word(phrase.start - 2)
        self.before = "on" if self.before == "atop" or (self.before == "of" and self.earlier == "top") else self.before
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
        while self.caption.word(place) in _RESTING | word_set("is are was were that which who"):
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


def _person(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.said & word_set("another others"):  # who is of the same sex
        return frozenset()
    tied = at.said & (OF_CHILDREN if at.one == "child" else OF_ADULTS) or at.adjectives & word_set(
        "small little tiny tall big large adult old elderly"
    )
    if at.one == "child":
        return frozenset() if tied else found
    return found - word_set("child") if tied else found


def _animal(at: At, found: frozenset[str]) -> frozenset[str]:
    if not at.is_calm or at.said & EATEN:
        return frozenset()
    if at.said & word_set("grazing grazes graze herd eating eats eat"):
        found &= GRAZERS
    others = {NOUNS[word][1] for word in at.said if word in NOUNS and NOUNS[word][0] == "animal"} - {at.one}
    if at.one in WILD:
        if at.said & _INDOORS:  # a toy
            return frozenset()
        if others or at.said & _PREY:
            found &= word_set("elephant zebra giraffe")
        if at.adjectives & word_set("giant huge"):
            found &= word_set("elephant giraffe")
    if at.one in ("elephant", "bear") and at.said & _BATHS and at.said & word_set("in through into across"):
        return frozenset()
    if at.one in ("bird", "duck") and others - word_set("dog cat rabbit"):
        return frozenset()
    if at.one == "dog" and at.phrase.plural and at.said & OUTSIDE:
        return frozenset()
    if at.one == "cat" and at.said & _FOR_CATS and at.said & word_set("in on atop up along inside"):
        return frozenset()
    if at.said & word_set("africa african safari savanna savannah"):
        found -= word_set("tiger")
    if at.said & PEOPLE:
        found -= word_set("lion tiger")  # with whom nobody is seen
    if at.adjectives & _LARGE:
        found -= word_set("monkey")
    if at.said & word_set("sitting sits sit"):
        found -= word_set("horse zebra giraffe elephant")
    return found if at.said & _DOGS and at.said & _CATS else found - word_set("rabbit")  # which hardly ever is where dogs and cats are


def _vehicle(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.before == "for" or (at.one in ("bus", "train") and at.before in ("on", "onto")):
        return frozenset()
    if at.one in ("bus", "train") and at.before in INTO:  # with the seats of one
        found &= word_set("bus")
    if at.one in CYCLES:
        found &= frozenset() if at.said & _FOR_CYCLES else word_set("car truck van")
    elif at.one not in ("car", "van"):  # no cycle is where a bus is, of its size or with its lettering
        found -= CYCLES
    if at.one == "boat" and not at.said & _LAND:
        return frozenset()
    if at.said & _TOWN:  # where cars are anyhow
        found -= word_set("car")
    if at.has_on_it:
        found &= word_set("truck van") if at.one in ("car", "truck", "van") and not at.said & PEOPLE else frozenset()
    for_many = at.said & (PEOPLE | word_set("carrying carries loaded full traffic"))
    if for_many or at.adjectives & _LARGE or at.said & _OF_A_CABIN:
        found -= CYCLES
    if at.before in ("on", "onto"):  # a cat on a car
        found &= word_set("car truck van")
    return found if at.said & _FARM and not at.said & _TOWN else found - word_set("tractor")


def _furniture(at: At, found: frozenset[str]) -> frozenset[str]:
    """By who or what is on it, and by the room."""
    if at.after in _LAID and (at.said & (EATEN | DISHES | _ON_TABLES) or at.after != "with"):
        return frozenset()
    if at.said & SKATED:  # nobody skates over a bed
        return frozenset()
    if at.one in ("table", "desk") and at.after == "with":
        found &= word_set("bench desk")
    if at.before == "around":
        found &= word_set("bed") if "standing" in at.said else frozenset()
    if at.one in ("table", "desk") and at.said & (FOOD | _DRINKS):
        return frozenset()
    who = at.who_is_on if at.before in ("on", "onto") else ""
    if who in PEOPLE or who in ANIMATE:
        found &= word_set("chair bench couch") if at.one == "bench" else word_set("chair bench couch bed")
        if NOUNS.get(who, ("", "", who))[2] == who or who in _MANY or at.caption.words.count(who) > 1:
            found -= word_set("chair")
    elif who:
        found &= word_set("bench") if at.said & _RESTING and at.said & (PEOPLE | ANIMATE) else word_set("bench table desk")
    if at.said & _LYING and at.before != "to":
        found &= word_set("bench couch bed")
    if at.before in ("from", "off"):
        return frozenset()
    if at.one == "chair" and at.said & word_set("table tables desk desks"):
        found &= word_set("bench desk") if at.said & word_set("bed beds") else word_set("bench")
    if at.said & (_BATHROOM | _KITCHEN):
        found &= word_set("chair bench table") if at.said & _KITCHEN else word_set("chair bench")
    if at.said & (OUTSIDE | _BUILT):
        found -= word_set("bed couch desk")
    if at.said & _RIDDEN_IN:
        found &= word_set("chair bench")
    return found - word_set("bed") if at.phrase.plural or at.said & word_set("living office lobby waiting classroom") else found


def _building(at: At, found: frozenset[str]) -> frozenset[str]:
    return found if at.said & _FARM else found - word_set("barn")


def _dish(at: At, found: frozenset[str]) -> frozenset[str]:
    of_a_part = at.before in ("off", "from") or (at.before == "of" and at.earlier in ("off", "bottom", "edge", "rim"))
    if at.has_on_it or at.said & _DRINKING or of_a_part:
        return frozenset()
    if at.one == "vase" and at.said & _IN_VASES:
        return found & word_set("bottle") if at.after != "of" else frozenset()
    if at.said & word_set("set settings napkin napkins"):
        found -= word_set("bottle vase")
    if at.before in INTO:  # what is on a plate goes into no bottle
        found &= word_set("bowl") if at.one == "plate" else frozenset()
    if at.one not in CUTLERY:
        found -= CUTLERY
    elif at.said & word_set("plate plates bowl bowls"):
        found -= word_set("bottle vase")
    full = at.after in _LAID | word_set("of holding containing")
    if at.said & EATEN or full:  # a bowl of fruit, a plate of food; a vase of flowers is left alone
        found &= word_set("bowl plate") if at.one in ("bowl", "plate") or not full else frozenset()
    if at.after == "with":
        found -= word_set("plate")
    if at.said & FLAT:
        found -= word_set("bowl")
    return found - word_set("plate") if at.said & word_set("soup cereal milk water") else found


def _fruit(at: At, found: frozenset[str]) -> frozenset[str]:
    return found - word_set("lemon") if at.said & _EATING else found


def _appliance(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.said & EATEN:  # an oven with a pizza in it
        return frozenset()
    return found - word_set("toaster") if at.before in ("on", "onto") else found


def _snack(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.is_stuff or at.said & word_set("stove oven box boxes") or (at.one == "cake" and at.said & PEOPLE):
        return frozenset()
    if at.one == "pizza" and not at.phrase.plural and at.said & _MANY:  # who share it
        return frozenset()
    return found


def _device(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.one == "clock" and at.said & word_set("top atop"):  # of a building
        return frozenset()
    if at.one == "laptop":
        outside = at.said & OUTSIDE
        no_desk = outside or at.said & word_set("bed beds couch sofa chair bench floor")
        if (outside and at.said & ANIMATE) or (no_desk and at.said & PEOPLE):
            return frozenset()
        if no_desk or at.said & word_set("tray lap holding holds"):
            found -= word_set("television")
    return found


def _bag(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.before in INTO and at.said & EATEN:
        return frozenset()
    if (at.phrase.plural and at.one == "suitcase") or at.after in word_set("full filled with containing of"):
        found -= word_set("umbrella")
    return found - word_set("handbag") if at.said & _MEN else found


def _sport(at: At, found: frozenset[str]) -> frozenset[str]:
    indoors = not at.said & OUTSIDE
    if indoors or at.is_stuff or at.said & _THROWN or any(NOUNS[word][0] == "animal" for word in at.said if word in NOUNS):
        found -= word_set("kite")
    if at.is_stuff:  # playing frisbee
        found -= word_set("stick")
    return found - word_set("ball kite") if at.said & _LEANING else found


def _clothing(at: At, found: frozenset[str]) -> frozenset[str]:
    worn = bool(at.said & WORN) or at.before in ("in", "with")
    if at.one in ("shirt", "dress", "skirt") and at.said & PEOPLE and not at.said & _MEN:
        dressed = at.said & _WOMEN and not at.said & _ON_LEGS and at.after != "and"
        return found & _WORN_BY_WOMEN[at.one] if dressed and (at.before in ("in", "with") or at.said & WORN) else frozenset()
    found -= word_set("skirt")
    if at.one in ("shirt", "dress", "skirt", "jacket", "coat") and (at.said & PEOPLE or (worn and not at.said & _TOYS)):
        found &= word_set("coat") if at.one == "dress" else frozenset()  # no hat or scarf takes its place
    if worn:
        found -= word_set("shirt dress")  # who wears a hat wears a shirt too
    if at.said & _PLAYING:
        found -= word_set("scarf coat tie jacket")
    if at.said & _WARM:
        found -= word_set("scarf coat jacket")
    if at.said & word_set("hanger hangers draped folded"):
        found -= word_set("hat tie")
    if at.said & _MEN:
        found -= word_set("dress")
    for noun, others in _WORN_INSTEAD.items():
        found -= word_set(noun) if (at.said - {at.one}) & others else frozenset()
    if at.one in _ON_HEADS:
        return found & _ON_HEADS
    return found - word_set("helmet cap")


def _place(at: At, found: frozenset[str]) -> frozenset[str]:
    """Other places with the same prepositions, where nothing else says what place it is."""
    if at.said & OF_A_PLACE or at.before not in _BEFORE_PLACES or at.phrase.plural or at.after or at.earlier == "top":
        return frozenset()
    return found & _BEFORE_PLACES[at.before]


def _ground(at: At, found: frozenset[str]) -> frozenset[str]:
    if at.said & OF_A_GROUND or at.before not in ("in", "on", "through", "across") or at.after or at.determiner == "a":
        return frozenset()
    return found - word_set("mud") if at.before == "on" else found


def _plant(at: At, found: frozenset[str]) -> frozenset[str]:
    return frozenset() if at.one in ("tree", "bush") and at.said & _GREEN else found


FITTING: dict[str, Callable[[At, frozenset[str]], frozenset[str]]] = {
    "person": _person,
    "animal": _animal,
    "appliance": _appliance,
    "vehicle": _vehicle,
    "furniture": _furniture,
    "dish": _dish,
    "fruit": _fruit,
    "snack": _snack,
    "device": _device,
    "bag": _bag,
    "building": _building,
    "sport": _sport,
    "clothing": _clothing,
    "plant": _plant,
    "place": _place,
    "ground": _ground,
}
"""Category -> of what might stand in the place of a noun, what is found there."""
INTO = ("in", "inside", "into", "from", "outside")
CUTLERY = word_set("fork knife spoon")
DISHES = frozenset(form for form, (category, _, _) in NOUNS.items() if category == "dish")
WILD = INSTEAD["bear"] | {"bear"}
_ON = word_set("on onto top of atop")
_RESTING = word_set(
    """sitting standing lying laying sleeping resting relaxing asleep seated placed sits stands lies lays sleeps rests sit stand lie lay
    sleep rest down together up"""
)
_CALM = word_set(
    """sitting standing lying laying sleeping resting walking running looking staring playing waiting eating grazing holding wearing hugging
    sits stands lies lays sleeps rests walks runs looks waits eats grazes sit stand lie lay sleep rest walk run look wait eat graze fighting
    wrestling watching crouching chasing entering crossing kneeling"""
)
_HANDLING = word_set(
    "pull pulls pulled feed feeds fed pat pats pet pets petting lead leads led wash washes kiss kisses touch touches stroke"
)
_PREY = word_set("antelope antelopes gazelle gazelles wildebeest wildebeests deer buffalo ostrich ostriches impala impalas rhino rhinos")
_BATHS = word_set("water river lake pond pool ocean stream")
_FOR_CATS = word_set(
    """litter toilet bowl tin pot vase drawer curled windowsill sill shelf shelves bookshelf bookcase ledge tree branch fence railing mantle
    mantel dresser hood roof television tv"""
)
"""Where cats climb, or fit."""
_RIDDEN_IN = word_set("train trains bus subway airplane plane boat ferry")
_INDOORS = word_set("table tables chair chairs couch sofa bed desk shelf room kitchen bedroom house")
CYCLES = word_set("bike bicycle motorcycle")
_FOR_CYCLES = _RIDDEN_IN | word_set(
    """sidewalk sidewalks walkway hallway hall room apartment bedroom kitchen office lobby porch balcony stairs staircase steps stacked
    wheelie rack racks luggage helmet stand floor showroom museum entryway doorway"""
)
"""Where no car goes."""
_LAND = word_set("road street highway parking lot driveway garage trailer wall fence town yard house barn shop")
_OF_A_CABIN = word_set("window windows windshield windscreen door doors roof hood bumper seats backseat sunroof dashboard")
_LARGE = word_set("large big huge giant")
_LEANING = word_set("against leaning leaned leans lean leant propped upright")
_EATING = word_set("eating eats eat eaten ate biting bites bite bitten chewing")
_FARM = word_set("farm field fields barn hay dirt grass rural country countryside mud yard")
_TOWN = word_set("street streets city town traffic sidewalk intersection highway game sports soccer baseball players")
_MANY = word_set("people children kids ladies guys friends couple family group players adults women men")
_BATHROOM = word_set("bathroom toilet toilets urinal urinals restroom shower bathtub tub sink sinks")
_KITCHEN = word_set("kitchen stove oven refrigerator microwave dishwasher counter restaurant cafe dining diner")
_BUILT = word_set("building buildings store shop statue tree plaza garage driveway tent barn church")
"""What furniture of a room does not stand beside."""
_LAID = word_set("with topped filled covered full set made that has")
_ON_TABLES = word_set(
    "chairs computer computers laptop laptops monitor monitors keyboard umbrella umbrellas cups plates glasses candles flowers"
)
_DRINKS = word_set("wine beer drink drinks beverage beverages coffee tea glasses")
_DRINKING = word_set(
    "drinking drinks drink licking licks lick pouring pours poured beer wine opening opens opened bartender cork uncorking label"
)
_IN_VASES = word_set("flower flowers rose roses tulips bouquet plant plants stems")
_DOGS, _CATS = word_set("dog dogs"), word_set("cat cats")
_WORN_INSTEAD = {
    "hat": word_set("cap caps helmet helmets hood beanie bandana headband crown wig turban sombrero"),
    "jacket coat": word_set("suit suits vest vests hoodie sweatshirt sweater sweaters blazer blazers uniform uniforms"),
    "shirt dress": word_set("t-shirt top blouse sweater sweatshirt hoodie suit jacket coat"),
}
"""Clothes -> other ones in whose company they are one too many."""
_WOMEN = word_set("woman women girl girls lady ladies")
_ON_LEGS = word_set(
    """pants jeans shorts tights leggings trousers slacks suit tie top blouse sweater vest jacket coat uniform apron bikini player
    players team"""
)
_WORN_BY_WOMEN = {"shirt": word_set("dress"), "dress": word_set("shirt skirt"), "skirt": word_set("dress")}
_ON_HEADS = word_set("hat helmet cap")
_BEFORE_PLACES = {
    "on": word_set("beach street road sidewalk field path trail"),
    "down": word_set("beach street road sidewalk path trail"),
    "along": word_set("beach street road path trail"),
    "across": word_set("beach street road field"),
}
_WARM = word_set("beach summer shorts swim swimming swimsuit bikini bathing pool surf surfing")
_TOYS = word_set("teddy bear bears doll dolls toy toys stuffed statue dog cat animal mannequin")
_LYING = word_set("lying laying lies lays sleeping sleeps asleep")
_MEN = word_set("man men boy boys guy guys")
_THROWN = word_set("throwing throws throw catching catches catch tossing tossed reaching reaches")
_PLAYING = word_set("tennis baseball soccer football frisbee skateboard surfboard skateboarding surfing ball racket racquet bat")
_GREEN = word_set(
    """grass grassy green park field lawn yard meadow garden snow snowy river lake pond ocean water forest woods zoo swamp fruit apple
    apples banana bananas lemon lemons pear pears oranges bear bears panda deer"""
)
"""Where no cactus grows."""
