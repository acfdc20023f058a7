"""What may stand in the place of a noun, and what a noun can be like.

A picture of the edited caption must be thinkable: a giraffe on a wire or a purple horse is told from a photograph by its words alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from cfvlm_ds.counterfactuals.propose.caption import Caption, Phrase
from cfvlm_ds.counterfactuals.propose.vocabulary import ALIKE, FOLLOWING, GENDERED, NEVER_PROPOSED, NOT_VERBS, NOUNS, PEOPLE, SCENERY


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _lines(text: str) -> Iterator[tuple[list[str], frozenset[str]]]:
    for line in text.strip().splitlines():
        names, _, listed = line.partition(":")
        yield names.split(), _set(listed)


INSTEAD: dict[str, frozenset[str]] = {}
"""Noun -> what is found in the places where it is."""
_INSTEAD = """
man: woman
woman: man
boy: girl
girl: boy
dog cat rabbit bird duck: dog cat rabbit
horse cow pig sheep goat: horse cow pig sheep goat
elephant zebra giraffe lion tiger monkey bear: elephant zebra giraffe lion tiger monkey
car bus truck van tractor motorcycle bicycle bike: car bus truck van tractor motorcycle bicycle
boat train: bus truck
airplane: helicopter
helicopter: airplane
chair bench couch sofa bed table desk: chair bench couch bed table desk
cup bowl plate bottle vase fork knife spoon: cup bowl plate bottle vase fork knife spoon
apple banana pear lemon strawberry orange: apple banana pear lemon strawberry
carrot tomato potato cucumber: carrot tomato potato cucumber
sandwich pizza hamburger: sandwich pizza hamburger
donut cake cookie: donut cake cookie
laptop: television keyboard
keyboard television: laptop
phone: camera
camera: phone
clock: lamp
lamp: clock
microwave oven refrigerator toaster sink: microwave oven refrigerator toaster sink
backpack suitcase handbag umbrella basket: backpack suitcase handbag umbrella basket
ball frisbee kite: ball frisbee kite
skateboard surfboard snowboard: ball frisbee kite
hat shirt jacket dress tie scarf coat: hat shirt jacket dress tie scarf coat
tree bush: cactus
flower cactus mushroom: flower cactus mushroom
book newspaper map: book newspaper map
hammer saw shovel broom: hammer saw shovel broom
circle square triangle star cross diamond: circle square triangle star cross diamond
house church barn tower castle: house church barn tower castle
"""
for _names, _listed in _lines(_INSTEAD):
    INSTEAD.update(dict.fromkeys(_names, _listed))

BESIDE: dict[str, frozenset[str]] = {}
"""Noun -> words of a caption in which nothing else would do."""
_BESIDE = """
train: track tracks rail rails railway railroad station platform locomotive traveling travelling carriage conductor engine
boat: water lake river sea ocean harbor harbour dock docks pier sail sails sailing floating bay beach shore pond canal fishing wave waves
boat: rowing rows paddling oar oars anchored docked motor captain
airplane: wing wings runway landing taking passengers passenger boarding jet propeller
helicopter: rotor blades
bird duck: surrounded flock
bird duck: flying flies fly wire wires branch branches tree trees sky perched wings air above over roof pole nest feeder egg eggs
bird duck: water pond lake river swimming singing beak feathers
dog: floppy tied leashed wearing wears cape costume jacket sweater
dog: leash collar barking barks frisbee bone sheepdog catch catches catching chase chases chasing fetch fetches fetching retrieves retriever
dog: leap leaps leaping jump jumps jumping water surf swim swims swimming splash splashes splashing ball balls toy stick mouth carry carries
dog: carrying race racing hurdle obstacle herding sled sleds tongue muzzle harness walker hose sprinkler surf
dog: pool puddle puddles lake river ocean sea fountain mud creek stream training trained train trick tricks sidecar
dog: obedience agility hunting hunter
horse: riding rides ride rider saddle jockey carriage racing cart pulling pull pulls race races polo reins gallops galloping trotting
cow: milk milking udder
sheep: wool shearing shepherd
pig: mud
elephant: trunk tusk tusks circus spraying
zebra: stripes striped
giraffe: neck leaves eating tall reaching
lion: mane roaring
monkey: tree trees branch branches banana bananas climbing swinging
bike bicycle motorcycle: riding rides ride rider helmet pushing pulling against leaning lean locked pedals race rack
car bus truck van tractor: driving drives seat wheel passengers plowing race hauling load trailer cargo trunk windshield hood lane
tractor: hay farm plow plowing
flower: vase vases pot pots bouquet petals stem wearing bee bees butterfly
mushroom: eating soup pizza cooked
tree: leaves trunk climb climbing climbs christmas branches orchard fallen snow snowy stump forest woods ski skis skier skiers skiing
sink: bathroom toilet water running washing shower bathtub mirror
oven refrigerator microwave: cooking baking baked magnets door open
plate: batter home catcher umpire baseball
chair couch sofa: seating
umbrella: rain raining opening closing open opens closed shade over under
basket: wicker laundry basketball hoop opening closing
suitcase backpack handbag: opening closing luggage wearing wears
kite: flying flies fly string sky wind
ball: playing plays kicking kicks hitting hits bouncing tennis soccer bat racket goal net dribbling bouncy rolling rolls pitcher court hoop
ball: bowls bowling bowl golf volleyball basketball baseball football
skateboard surfboard snowboard: jump jumps jumped doing does skate pipe air wetsuit surfer skier ocean beach
skateboard surfboard snowboard: riding rides ride trick tricks ramp jumping wave waves surfing snow
chair: dining
table: chairs dinner
desk: chair computer office monitor monitors keyboard keyboards
bed: blanket blankets pillow pillows sheet sheets headboard bedroom
couch sofa: pillow pillows cushion cushions
pizza: toppings slice slices pepperoni crust oven pan
cake: candle candles birthday wedding frosting frosted icing iced layer slice slices
cookie donut: dough chip chips glazed sprinkles frosted iced
sandwich hamburger: bread bun toast toasted lettuce sub
apple pear lemon orange banana: tree trees bunch bunches peel peeled juice branch branches slice slices
strawberry: cream jam juice slice slices
lamp: light lights shining lit bright lighting glowing shines shade
clock: time hands o'clock tower
phone television laptop camera keyboard: talking talks watching watches typing types call photo photos picture pictures computer mouse
phone television laptop camera keyboard: monitor photographer lens texting
laptop: open between inside
dress skirt: dancing ballet
shirt jacket coat: sleeve sleeves button buttons buttoned unbuttoned zipper tucked dog dogs cat cats horse horses fur shaggy
tie: suit suits
hat shirt jacket dress tie scarf coat: neck necks waist around
house church barn castle tower: roof lives
"""
for _names, _listed in _lines(_BESIDE):
    for _name in _names:
        BESIDE[_name] = BESIDE.get(_name, frozenset()) | _listed
OF_ONE_SEX = _set(
    """dress dresses skirt skirts bikini bikinis beard beards bearded mustache moustache bald pregnant bra gown heels shirtless bride groom
    wedding makeup lipstick nun monk king queen husband wife father mother son daughter pigtail pigtails ponytail ponytails braids tutu sari
    topless ballerina ballerinas cheerleader cheerleaders hijab purse"""
)
OUTSIDE = _set(
    """park street road beach garden yard field grass river lake forest hill sidewalk parking lawn meadow snow sea ocean water city
    mountains sand sandy grassy snowy patio deck trees sunny outdoors outside"""
)
GRAZERS = _set("zebra giraffe elephant horse cow sheep goat")
WORN = _set("wearing wears wear dressed worn")

_CAN_BE = """
dog dogs puppy puppies pup pups rabbit rabbits bunny goat goats sheep lamb donkey: black white brown gray
lab labs labrador labradors terrier terriers poodle spaniel collie shepherd hound hounds bulldog beagle mutt: black white brown gray
husky dachshund chihuahua pug boxer dalmatian mastiff doggie doggy animal animals calf foal stallion mare llama: black white brown gray
ears spot spots tail tails paws fur mane markings: black white brown gray
cat cats kitten kittens: black white gray orange brown
horse horses pony ponies: black white brown gray
cow cows bull bulls hen hens chicken chickens rooster: black white brown
pig pigs: pink black brown white
duck ducks: white brown black yellow
mouse rat: gray white black brown
bird birds: red blue green yellow black white brown gray
slug snail: brown black orange
elephant elephants zebra zebras giraffe giraffes lion lions tiger tigers monkey monkeys bear bears:
apple apples: red green yellow
pear pears banana bananas lemon lemons: yellow green
strawberry strawberries: red
orange oranges carrot carrots: orange
tomato tomatoes: red green yellow
potato potatoes: brown
cucumber cucumbers: green
pepper peppers: green red yellow
grape grapes: green purple
corn: yellow white
eye eyes: blue green brown gray
hair: black brown gray white red
flower flowers rose roses tulip tulips: red yellow white pink purple blue orange
field fields meadow hill hills: green brown yellow
rock rocks: gray brown black white red
egg eggs: white brown
tree trees bush bushes cactus cactuses mountain mountains sand gull whale owl eagle hawk flamingo retriever planet gnu:
"""
CAN_BE: dict[str, frozenset[str]] = {}
"""Noun -> the colours that it has; any where it is not listed."""
for _names, _listed in _lines(_CAN_BE):
    CAN_BE.update(dict.fromkeys(_names, _listed))

_MADE_OF = """
chair chairs stool stools: wooden metal plastic
bench benches: wooden metal plastic stone
table tables desk desks: wooden metal plastic glass
wall walls: brick stone wooden metal
fence fences: wooden metal plastic
gate gates barrel: wooden metal
bridge house building buildings tower cottage church: wooden stone brick
door doors: wooden metal glass plastic
boat boats: wooden metal plastic
bowl bowls cup cups plate plates vase vases: wooden metal plastic glass
spoon spoons fork forks box boxes tray trays bucket basket crate crates hanger hangers mallet toy: wooden metal plastic
floor floors: wooden stone
shelf shelves cabinet cabinets: wooden metal plastic glass
statue post posts: wooden metal stone
couch sofa jacket coat hat: leather
"""
MADE_OF: dict[str, frozenset[str]] = {}
"""Noun -> the materials that it is made of; none are known where it is not listed."""
for _names, _listed in _lines(_MADE_OF):
    MADE_OF.update(dict.fromkeys(_names, _listed))
PATTERNED = _set(
    """shirt shirts tie ties dress dresses hat hats scarf scarves jacket jackets coat coats sweater skirt pants shorts socks umbrella
    umbrellas towel towels blanket blankets rug curtain curtains pillow pillows couch sofa chair chairs bag cup cups bowl bowls plate plates
    vase vases floor wall ball balls tent tablecloth apron robe wallpaper flag cloth mug box"""
)
"""What patterns are made on: a striped cat is no other cat with dots."""
_ALIKE = {word: frozenset().union(*(group for group in ALIKE if word in group)) for _, word, _ in NOUNS.values()}
_INTO = ("in", "inside", "into", "from", "outside")


def can_be(noun: str, colour: str) -> bool:
    """Whether there are things of a kind that have a colour."""
    return noun not in CAN_BE or {"grey": "gray"}.get(colour, colour) in CAN_BE[noun]


def is_compared(caption: Caption, phrase: Phrase) -> bool:
    """Whether there is something else that tells the size of a thing: a picture of a lone ball shows no size."""
    return any(each.noun != phrase.noun and caption.words[each.noun] not in SCENERY for each in caption.phrases)


def instead(caption: Caption, phrase: Phrase) -> frozenset[str]:
    """Singulars of what may stand in the place of a noun; none where it is what the rest of the caption needs."""
    assert phrase.known is not None
    category, one, _ = phrase.known
    said, before, after = set(caption.words), caption.word(phrase.start - 1), caption.word(phrase.noun + 1)
    before = "on" if before == "of" and caption.word(phrase.start - 2) == "top" else before
    if said & BESIDE.get(one, frozenset()) or (category == "person" and said & (GENDERED | OF_ONE_SEX)):
        return frozenset()
    if (category == "animal" and not _is_calm(caption, phrase)) or (one == "flower" and before == "of"):
        return frozenset()
    determiner = "" if phrase.determiner is None else caption.words[phrase.determiner]
    if one in ("tree", "bush") and determiner in ("", "some"):  # what stands in the background
        return frozenset()
    if before == "of" and caption.word(phrase.start - 2) == "back" and category == "vehicle":
        return frozenset()
    if one == "dog" and determiner in ("his", "her", "their") and said & (OUTSIDE | _set("plains mountain trail")):
        return frozenset()
    if (one == "camera" and determiner == "the" and phrase.start) or (category == "snack" and _is_stuff(caption, phrase)):
        return frozenset()
    if _held_by_place(category, one, before, caption.word(phrase.start - 2), said):
        return frozenset()
    found = INSTEAD.get(one, frozenset()) - _ALIKE[one] - {one}
    found -= frozenset() if category == "shape" else NEVER_PROPOSED
    if after == "of":  # a bowl of fruit, a plate of food; a coat of paint and a vase of flowers are left alone
        found &= frozenset(("bowl", "plate")) if one in ("bowl", "plate") and not said & _set("soup cereal milk water") else frozenset()
    if category == "animal" and said & _set("grazing grazes graze herd"):
        found &= GRAZERS
    if category == "clothing" and (said & WORN or before in ("in", "with")):
        found -= _set("shirt dress")  # who wears a hat wears a shirt too
    if category == "furniture" and said & OUTSIDE:
        found -= _set("bed couch desk")
    if category == "furniture" and phrase.plural:
        found -= _set("bed")
    if category == "furniture" and said & _LYING:
        found &= _set("bench couch bed")
    if said & _MEN:
        found -= _set("dress")
    for noun, others in _WORN_INSTEAD.items():
        found -= _set(noun) if said & others else frozenset()
    if one in ("car", "bus", "truck", "van", "tractor") and said & (PEOPLE | _set("carrying carries loaded full")):
        found -= _set("bicycle bike motorcycle")
    if not (said & _DOGS and said & _CATS):
        found -= _set("rabbit")  # which hardly ever is where dogs and cats are
    if category == "sport" and (said & _THROWN or any(NOUNS[word][0] == "animal" for word in said if word in NOUNS)):
        found &= _set("ball frisbee")
    if category == "dish" and after == "with":
        found -= _set("plate fork knife spoon")
    if category == "dish" and said & _FOOD:
        found -= _set("vase bottle fork knife spoon")
    if one == "chair" and said & _set("table tables desk desks"):
        found -= _set("bed couch")
    if before in _INTO:
        found -= _set("plate fork knife spoon umbrella bicycle bike motorcycle tractor")
    return frozenset(each for each in found if _fits(caption, phrase, each))


def _is_calm(caption: Caption, phrase: Phrase) -> bool:
    """Whether an animal does nothing but what any animal does: no rabbit barks, begs or is trained."""
    doing = {word for word in caption.words if word.endswith("ing") and word not in NOT_VERBS}
    after = caption.word(phrase.noun + 1)
    return doing <= _CALM and (not after or after in FOLLOWING | _CALM or after in ("left", "right"))


_CALM = _set(
    """sitting standing lying laying sleeping resting walking running looking staring playing waiting eating grazing holding wearing hugging
    sits stands lies lays sleeps rests walks runs looks waits eats grazes sit stand lie lay sleep rest walk run look wait eat graze fighting
    wrestling watching crouching chasing following entering crossing kneeling"""
)


def _is_stuff(caption: Caption, phrase: Phrase) -> bool:
    """Whether a food is named as stuff, without an article: who is eating pizza is not eating sandwich."""
    return phrase.start > 0 and phrase.determiner is None and not phrase.plural


def _held_by_place(category: str, one: str, before: str, earlier: str, said: set[str]) -> bool:
    """Whether the words before a noun leave room for no other one."""
    on = before in ("on", "onto", "riding", "rides", "ride")
    if category in ("animal", "device", "sport", "dish") and on:
        return True
    if one == "dog" and (before in _WALKED or (said & _WALKED and (before == "with" or said & PEOPLE))):
        return True
    if one in ("bike", "bicycle", "motorcycle") and (on or before in ("his", "her", "their")):
        return True
    if one in ("tree", "bush") and before in ("in", "under", "on", "up", "from", "beneath", "into", "of", "underneath"):
        return True
    if one == "umbrella" and before in ("under", "beneath", "underneath"):
        return True
    if category == "shape" and before == "in":  # people stand in a circle, and in a square
        return True
    if category == "furniture" and before == "at":
        return True
    if category == "building" and before in ("in", "inside", "into"):
        return True
    if category == "device" and before in ("in", "at", "for", "to", "facing", "towards", "toward"):  # smiling at the camera
        return True
    if one in ("sink", "bowl", "cup", "chair", "couch", "sofa", "bed") and before in _INTO:
        return True
    if category == "tool" and before in ("in", "on", "of"):
        return True
    if one in ("fork", "knife", "spoon") and said & _FOOD:
        return True
    using = category == "tool" or (one in ("fork", "knife", "spoon") and bool(said & _USED))
    return before == "with" and using and earlier != "table"


_DOGS, _CATS = _set("dog dogs"), _set("cat cats")
_FOOD = _set(
    """food foods noodles meat broccoli fries rice salad pasta fruit fruits vegetables cheese sauce burger sandwich sandwiches pizza soup
    chicken beef meal breakfast lunch dinner dessert cake eggs potatoes carrots"""
)
_WORN_INSTEAD = {
    "hat": _set("cap caps helmet helmets hood beanie bandana headband crown wig turban sombrero"),
    "jacket coat": _set("suit suits vest vests hoodie sweatshirt sweater sweaters"),
    "shirt dress": _set("t-shirt top blouse sweater sweatshirt hoodie suit jacket coat"),
}
"""Clothes -> other ones in whose company they are one too many."""
_WALKED = _set("walking walks walk running runs run jogging jogs")
_LYING = _set("lying laying lies lays sleeping sleeps asleep")
_MEN = _set("man men boy boys guy guys")
_THROWN = _set("throwing throws throw catching catches catch tossing tossed")
_USED = _set("cutting cuts cut slicing eating eats spreading stirring")


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
    return not (
        phrase.known is not None and phrase.known[0] == "vehicle" and set(words) & {"long", "tall"} and noun not in ("bus", "truck")
    )


_ONLY_OF = {
    **dict.fromkeys(("empty", "full"), _set("bowl cup bottle vase plate basket")),
    **dict.fromkeys(("open", "closed"), _set("book newspaper map")),
    **dict.fromkeys(("ripe", "sliced"), INSTEAD["carrot"] | INSTEAD["apple"]),
    "long": _set("table bench desk couch bus truck"),
    "round": _set("plate bowl table"),
}
"""Adjective -> the nouns of which it may be said."""
_COLOURS = frozenset(
    ["red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink", "brown", "black", "white", "gray", "grey"]
) | _set("violet beige tan silver gold golden turquoise maroon")
_MATERIALS = _set("wooden metal plastic glass stone brick leather")
