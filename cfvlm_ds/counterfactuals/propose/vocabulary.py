"""Closed lists of words that rules may change, and of contexts in which a word means something else.

Whole words, and their forms stated one by one.
"""

from __future__ import annotations

from cfvlm_ds.counterfactuals.propose.siblings import word_set as _set


def _groups(text: str) -> tuple[frozenset[str], ...]:
    """A set of words a line, or between commas."""
    return tuple(frozenset(part.split()) for part in text.replace("\n", ",").split(",") if part.strip())


# Attributes -----------------------------------------------------------------------------------------------------------------------------

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink", "brown", "black", "white", "gray", "grey", "violet", "beige",
    "tan", "silver", "gold", "golden", "turquoise", "maroon",
)  # fmt: skip
NEAR_COLOURS = _groups(
    """red orange pink maroon, orange yellow gold golden brown beige tan, gray grey silver white, gray grey silver black, purple violet pink
    blue cyan turquoise purple violet, green cyan turquoise, white beige tan, red maroon brown"""
)
"""Colours that people take for one another: none is proposed for another."""
SIZES = {
    **dict.fromkeys(("big", "large"), ("small", "little")), **dict.fromkeys(("small", "little"), ("big", "large")),
    **dict.fromkeys(("huge", "giant"), ("tiny",)), "tiny": ("huge", "giant"),
    "tall": ("short",), "long": ("short",), "short": ("tall", "long"),
}  # fmt: skip
"""Size -> its opposites."""
LENGTHY = _set("dress dresses skirt skirts coat coats table tables bench benches train trains rope leash scarf scarves socks bus truck")
"""What is short and not long; other things are short and not tall."""
MATERIALS = tuple(["wooden", "metal", "plastic", "glass", "stone", "brick", "leather"])
TEXTURES = tuple(["striped", "dotted", "hollow", "plaid", "checkered", "spotted"])
TEXTURES_AGAINST = {"dotted": {"spotted"}, "spotted": {"dotted"}, "plaid": {"checkered"}, "checkered": {"plaid"}}

# Things ---------------------------------------------------------------------------------------------------------------------------------

NUMBERS = {word: number for number, word in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 1)}

_NOUNS = """
person: man/men woman/women boy/boys girl/girls guy/guys lady/ladies child/children
animal: dog/dogs cat/cats horse/horses cow/cows sheep/sheep elephant/elephants bear/bears zebra/zebras giraffe/giraffes bird/birds
animal: pig/pigs goat/goats rabbit/rabbits monkey/monkeys lion/lions tiger/tigers duck/ducks fish/fish
vehicle: car/cars bus/buses truck/trucks train/trains motorcycle/motorcycles bicycle/bicycles boat/boats airplane/airplanes
vehicle: bike/bikes van/vans tractor/tractors helicopter/helicopters
furniture: chair/chairs table/tables bench/benches couch/couches bed/beds desk/desks sofa/sofas
dish: cup/cups bowl/bowls plate/plates bottle/bottles fork/forks knife/knives spoon/spoons vase/vases
fruit: apple/apples banana/bananas orange/oranges pear/pears lemon/lemons strawberry/strawberries
vegetable: carrot/carrots tomato/tomatoes potato/potatoes cucumber/cucumbers
snack: sandwich/sandwiches pizza/pizzas donut/donuts cake/cakes hamburger/hamburgers cookie/cookies
device: laptop/laptops phone/phones television/televisions keyboard/keyboards camera/cameras clock/clocks lamp/lamps
appliance: microwave/microwaves oven/ovens refrigerator/refrigerators toaster/toasters sink/sinks
bag: backpack/backpacks suitcase/suitcases handbag/handbags umbrella/umbrellas basket/baskets
sport: frisbee/frisbees kite/kites skateboard/skateboards surfboard/surfboards ball/balls stick/sticks snowboard/snowboards
clothing: hat/hats helmet/helmets cap/caps shirt/shirts jacket/jackets dress/dresses skirt/skirts tie/ties scarf/scarves coat/coats
plant: tree/trees flower/flowers bush/bushes cactus/cactuses mushroom/mushrooms
reading: book/books newspaper/newspapers map/maps
tool: hammer/hammers saw/saws shovel/shovels broom/brooms
shape: circle/circles square/squares triangle/triangles star/stars cross/crosses diamond/diamonds
legwear: shorts/shorts pants/pants jeans/jeans
instrument: guitar/guitars accordion/accordions violin/violins trumpet/trumpets saxophone/saxophones flute/flutes cello/cellos banjo/banjos
place: beach/beaches street/streets road/roads sidewalk/sidewalks field/fields path/paths trail/trails
ground: snow/snows grass/grasses sand/sands mud/muds dirt/dirts
building: house/houses church/churches barn/barns tower/towers bridge/bridges castle/castles
"""
SIBLINGS: dict[str, tuple[tuple[str, str], ...]] = {}
"""Category -> (singular, plural) of its nouns: none of them is a kind of another."""
for _line in _NOUNS.strip().splitlines():
    _category, _, _listed = _line.partition(": ")
    SIBLINGS[_category] = (*SIBLINGS.get(_category, ()), *((_pair.split("/")[0], _pair.split("/")[1]) for _pair in _listed.split()))
NOUNS: dict[str, tuple[str, str, str]] = {}
"""Form -> (category, singular, plural)."""
for _category, _pairs in SIBLINGS.items():
    for _singular, _plural in _pairs:
        for _form in (_singular, _plural):
            NOUNS.setdefault(_form, (_category, _singular, _plural))
UNCOUNTED = frozenset(("sheep", "fish", "tennis"))
"""One form for one and for many, or for none."""
NEVER_PROPOSED = _set("cross star orange tie saw square diamond bear fish bridge")
"""Nouns that mean something else in many captions; only a shape is replaced by a shape."""
ALIKE = _groups(
    """couch sofa, couch bed, couch chair, sofa bed, sofa chair, bike bicycle motorcycle, table desk, van car, van truck, van bus, car truck
    cup bowl vase, lemon orange, sheep goat, lion tiger, duck bird, suitcase handbag backpack, jacket coat shirt, fork knife spoon
    microwave oven toaster, bush tree, skateboard snowboard surfboard, castle tower, castle house, church tower, house barn
    sandwich hamburger, man boy guy, woman girl lady, man girl, woman boy, guy girl, lady boy, child boy, child girl, hat cap
    pants jeans, guitar banjo
    violin cello, trumpet saxophone, street road sidewalk, road path trail sidewalk, mud dirt, sand dirt"""
)
"""Nouns that a picture does not always tell apart, or of which one has the other, as a castle has towers: none is proposed for another."""
PEOPLE = _set(
    """man men woman women boy boys girl girls person people child children kid kids baby babies guy guys lady ladies player players male
    males female females adult adults couple family families crowd team skin face faces american americans rider riders skier
    skiers surfer surfers gentleman gentlemen skateboarder skateboarders snowboarder snowboarders bicyclist bicyclists cyclist cyclists
    motorcyclist motorcyclists biker bikers skater skaters tourist tourists visitor visitors passenger passengers pedestrian pedestrians
    worker workers officer officers policeman policemen cop cops chef chefs waiter waitress toddler toddlers infant teen teens teenager
    teenagers student students teacher friend friends mother father mom dad wife husband son daughter batter catcher pitcher umpire
    soldier soldiers jockey jockeys cowboy cowboys bride groom someone somebody everyone"""
)
YOUNG = _set("boy boys girl girls child children kid kids baby babies toddler toddlers")
ANIMATE = frozenset(form for form, (category, _, _) in NOUNS.items() if category in ("person", "animal")) | _set(
    "person people child children kid kids baby babies guy guys lady ladies player players couple puppy kitten"
)

FLAT = _set(
    """pizza pizzas sandwich sandwiches hamburger hamburgers burger burgers hotdog hotdogs hot toast pancake pancakes waffle waffles bread
    cake cakes pie pies steak fish donut donuts doughnut doughnuts cookie cookies dessert pastry pastries slice slices piece pieces fries"""
)
FOOD = FLAT | _set(
    """food foods noodles meat broccoli fries rice salad pasta fruit fruits vegetables veggies cheese sauce soup chicken beef meal
    breakfast lunch dinner eggs egg potatoes carrots tomatoes greens cupcake cupcakes snacks cut cream strawberries cheesecake"""
)
"""What no bowl or cup holds, of what is eaten, and all of it."""

# What is left alone ---------------------------------------------------------------------------------------------------------------------

FIXED_COLOUR = _set(
    """grass sky snow leaf leaves lettuce broccoli meat wine tea rice bread light lights house beans onion onions cabbage sauce photo
    photograph picture image photography background ink card carpet belt board collar tape flag bean jay bear panda fox kangaroo
    deer squirrel robin cardinal heron giraffe elephant zebra pages page sugar chocolate coffee vegetables greens fire flames smoke
    cloud clouds water waters rapids ocean sea juice peel slice slices salad fruit fruits ice polar park valley hillside hilltop
    pasture lawn landscape forest woods garden plant plants foliage vines moss weeds fern ferns palm palms bamboo dirt mud soil
    ground gravel waves wave foam tooth teeth lips nose cheeks tongue line lines beard mustache moustache sunset horizon bone milk
    butter cheese egg eggs swan swans seagull seagulls pigeon pigeons crow crows parrot flamingos leopard camel camels dolphin
    dolphins seal frog turtle rhino hippo hay straw marble light wedge wedges peels rind segments sections halves sprinkles"""
)
"""Nouns whose colour is always the same, or part of their name."""
NOT_SIZED = _set(
    """group groups crowd number numbers part piece pieces amount area bit way ben time while lot city town girl boy girls boys kid kids
    child children brother sister one ones day distance hair hairs sleeve sleeves sleeved line lines jump board intestine screen league horn
    apple cat cats game top lake lakes river sea ocean pond field fields mountain mountains beach valley forest park room kitchen world
    skyscraper skyscrapers elephant elephants giraffe giraffes whale puppy puppies kitten kittens lamb calf baby babies neck tail beak nose
    ear ears legs leg trunk fur coat mane smile grin eyes mouth teeth feet hands display variety selection collection bunch pile set pair
    trinket trinkets figurine figurines crumb crumbs droplet droplets pebble pebbles bead beads sprinkles boulder boulders mansion batch
    ship ships
    stack herd flock array gathering event party meal view family team grass snow rain water
    sand object objects surface surfaces"""
)
COMPARED = _set("larger bigger smaller taller shorter longer than")
"""What says a size beside another one."""
CROWDS = _set("group groups lots lot many several crowd crowds surrounding surrounded family")
"""With whom what is long stays long."""
SCENERY = _set(
    """grass field fields sky snow beach street road ground water lake river sea ocean sand park yard lawn air day night background side
    distance front sun sunlight rain summer winter room floor city forest woods meadow mountains picture photo image"""
)
"""What nothing is large or small beside."""
NEGATIONS = _set("no not without never none neither nor nobody nothing cannot except instead missing lacking hardly nowhere absent")
UNCERTAIN = _set("or either maybe perhaps probably possibly might")
EXPLAINING = _set("usually often always typically generally sometimes commonly called known means")
KINDS_OF_THINGS = _set(
    "animal animals vehicle vehicles fruits vegetables tools instruments mammals insects machines devices plants creatures species foods"
)
POINTING = _set("this that these those it there here they")
CALLED = _set("called named titled entitled labeled labelled says saying spelling")
GENDERED = _set("he him his himself she her hers herself")
UNITS = _set(
    """hours minutes seconds days weeks months years feet foot inches miles meters metres kilometers dollars cents times pounds degrees
    o'clock hour minute second day week month year mile meter metre dollar cent euro euros pound yen pence piece pieces move
    year-old stories story levels lanes percent half halves thirds people's of way ways different others other more side sides end ends
    corner corners edge direction point moment place time row rows kind kinds type types size sizes color colors colour colours poles
    skis skiis drumsticks crutches shoes boots socks gloves sneakers earrings"""
)
FIXING_A_NUMBER = _set("tennis third fourth second last both other teams opposite either chess boxing wrestling seesaw")
"""With these in it a caption has no other number: two that tackle a third are not four, and a game is of two teams."""
OF_TWO = _set(
    """shake shakes shaking handshake embrace embraces embracing chair dance dances dancing seesaw double tug both other one couple
    twins twin together hug hugs hugging kiss kisses kissing bike bikes canoe kayak motorcycle bench couch"""
)
"""With these in it a caption is of no group."""
OF_A_GROUP = _set(
    """gather gathers gathered gathering crowd circle line row rows lined queue around surround surrounds surrounding surrounded team
    parade choir orchestra band concert class classroom each some one others other all various different several many lots four five
    two three half while most everyone formation huddle huddled meeting march marching protest rally crossing packed number huge
    together is was has"""
)
"""With these it is of more than two, or of one group."""
MEASURES = _set(
    """star door wheel wheeled legged tone tier layer leaf person man car bedroom seat seater arm prong lane speed story storey
    level room piece part way
    bed string cylinder engine course"""
)
"""Singulars that belong to a number before a noun: five star hotels are no hotels that one counts."""
NUMBERED = _set(
    """number route channel flight page figure chapter part level floor room lane gate pier platform size day week year episode season step
    stage version volume line track"""
)
"""What is numbered, and not counted, by a number that follows."""
OF_BODY = _set(
    """hand hands arm arms leg legs foot feet toe toes finger fingers eye eyes ear ears head heads back chin nose neck shoulder shoulders
    knee knees lap paw paws wing wings wheel wheels stomach belly face faces mouth lips body"""
)
"""Parts: no picture shows another number of them, and what is behind an ear is not in front of it."""
LETTERING = _set(
    """sign signs clock clocks watch letter letters lettering text word words writing written logo number numbers license licence
    newspaper newspapers book books jersey jerseys reads says saying label labels poster posters billboard map maps keyboard keyboards
    screen menu magazine graffiti banner calendar page pages name named tattoo monitor laptop scoreboard ticket stamp money"""
)
"""What shows in a mirror image: a picture of it is not flipped."""

# Places and actions ---------------------------------------------------------------------------------------------------------------------

RELATIONS = tuple(
    (pair.split(" / ")[0].strip(), pair.split(" / ")[1].strip())
    for pair in """to the left of / to the right of, on the left of / on the right of, left of / right of, to the left / to the right
    on the left side of / on the right side of, on the left side / on the right side, on the left / on the right
    at the top of / at the bottom of, at the top / at the bottom, in front of / behind, in front / behind, on top of / underneath
    underneath / on top of, above / below, beneath / on top of, under / on top of, inside / outside""".replace("\n", ",").split(",")
)  # fmt: skip
_UNDER = _set(
    """sky sun moon light lights construction water rain cloud clouds tree trees umbrella umbrellas blanket blankets cover covers sheets
    bridge way influence face statue roof ceiling tent canopy tarp arch awning shelter shade shower waterfall palm lamp hood attack
    control age"""
)
HANGING = _set(
    "picture pictures painting paintings mirror mirrors clock cabinet cabinets shelf shelves sign poster window windows photo photos"
)
_SEEN_BEFORE = _set(
    """camera mirror laptop laptops computer computers keyboard desk microphone monitor screen window windows counter bar crowd
    audience podium television tv stove table wall walls building buildings house houses skyscraper skyscrapers castle temple hotel
    store shop restaurant station stadium mountain mountains water ocean sea lake river bay sunset sky skyline background backdrop
    map guitar drum keyboards canvas painting picture poster mural graffiti sign banner billboard door doors doorway entrance
    fireplace refrigerator oven sink
    cake plate plates bowl food meal pizza tray drums piano forest city beach shore business"""
)
AREAS = _set(
    """street streets road roads path sidewalk highway intersection field fields lawn yard grass sand snow park garden track tracks runway
    tarmac court floor ground lot plain plains meadow prairie desert wave waves marsh stream river creek pond lake hill valley crosswalk
    surface"""
)
"""What has no behind."""
BACKDROPS = _set(
    """boat boats ship ships monitor monitors screen curtain curtains house wall walls building buildings mountain mountains hill hills
    sunset ocean sign trees"""
)
"""What is behind all."""
NO_OPPOSITE = {
    "in front of": _SEEN_BEFORE,
    "behind": _set("bars wheel home plate scenes camera net counter desk podium schedule mask table keyboard keyboards batter"),
    "under": _UNDER | HANGING,
    "beneath": _UNDER | HANGING,
    "underneath": _UNDER | HANGING,
    "above": _set(
        """surface ground water average sea all ocean street streets road field fields city town village river lake beach stadium tower
        building buildings house houses church mountain mountains hill roof station airport stove sink toilet fireplace"""
    ),
    "below": _set("surface zero ground sea average freezing"),
    "to the right": _set("side"),
    "to the left": _set("side"),
    "at the top": _set("lungs"),
    "at the bottom of": _set("cup mug glass bowl bottle jar container bag pool sea ocean lake"),
    "right of": _set("way passage"),
}
"""What may not be in the phrase that follows, or within three words: it means something else there, or its opposite is as true."""
LIES_BELOW = _set("rug rugs carpet mat floor ground road grass")
"""What nothing lies under; what is always on top."""
ABOVE_ALL = _set("sky sun moon clouds cloud rainbow light lights")
FROM_THERE = _set("from hiding hides hide hidden peeking peeks peek peering peers peaking")
"""Before a place that says more than where: nobody hides in front of a tree."""
OF_THE_PICTURE = frozenset(
    [f"{at} {side}" for at in ("on the", "to the") for side in ("left", "right")]
    + ["on the left side", "on the right side", "at the top", "at the bottom", "in front"]
)
"""Phrases that say where in the picture, and not beside what."""
_EXCLUSIVE = """sitting standing, sitting lying, sitting laying, standing lying, standing laying, sleeping standing, sleeping sitting
    kneeling standing, walking running, walking standing, pushing pulling, throwing catching, smiling crying, smiling frowning
    laughing crying"""
"""Actions of which nobody does both. A picture shows which: of a door it does not show whether somebody opens or closes it."""
ACTIONS: dict[str, tuple[str, ...]] = {}
"""Action -> what nobody does meanwhile."""
for _first, _second in (_pair.split() for _pair in _EXCLUSIVE.replace("\n", ",").split(",")):
    ACTIONS[_first] = (*ACTIONS.get(_first, ()), _second)
    ACTIONS[_second] = (*ACTIONS.get(_second, ()), _first)
FINITE = {
    f"{double or verb}ing": (f"{verb}s", verb)
    for verb, double in (
        ("stand", ""), ("sit", "sitt"), ("walk", ""), ("run", "runn"), ("sleep", ""), ("smile", "smil"), ("laugh", ""), ("kneel", ""),
        ("lie", "ly"),
    )
}  # fmt: skip
"""What one and many do in the present."""
OF_PLACE = _set("sitting standing lying laying sleeping walking running kneeling")
MOTION = _set("walking walks walk running runs run")
AFTER_MOTION = _set("on in down through along across up past around towards toward over into")
GROUNDS = _set("sidewalk street road beach sand snow grass field path trail park woods forest lawn dirt mud alley yard shore")
"""Where people stand, walk and run."""
DIRECTIONS = _set("down through along across up past around towards toward into from away after onto off over")
"""What a posture has not."""
IN_A_RUN = _set(
    """race racing marathon runner runners jogger joggers track ball base bases chase chases chasing chased catch frisbee bulls bull hurdle
    hurdles sprinting relay jersey number finish escape"""
)
"""With these nobody walks."""
IN_A_WALK = _set(
    """old elderly older cane walker wheelchair crutches slowly leash stroller cart carrying carries luggage suitcase suitcases bag bags
    line parade marching march bride groom wedding crosswalk crowd crowded busy umbrella umbrellas phone cellphone holding heels stilts
    tightrope rope casually strolling shopping baby pushing pulling"""
)
"""With these nobody runs."""
RIDDEN_BY_FEW = _set("bike bicycle motorcycle motorbike scooter moped horse surfboard skateboard")
"""What carries no more people than it does."""
PULLED = _set("out off up down over away stroller wheelchair wallet rope ropes sled leash plow trailer hair trigger")
THROWN = _set("ball balls baseball football basketball frisbee frisbees")
ORDERED = _set(
    """pulling pulls pulled pull towing tows towed dragging drags leading leads led following follows followed follow
    chasing chases chased trailing trails trailed trail"""
)
"""Doings that say what is behind what."""
OFF_THE_GROUND = _set("air flying flies fly floating hovering soaring inches feet")
SUPPORTS = _set("table tables chair chairs bench benches bed couch sofa desk car cars truck van cart stool")
"""What a thing may be on and under."""
CONTAINERS = _set("box boxes basket baskets cage crate crates container bucket barrel cart tube suitcase circle square triangle")
"""What a thing may be in and beside, in a picture that stays the same."""
SEEN_BEHIND = (PEOPLE | frozenset(NOUNS)) - frozenset(
    form for form, (category, _, _) in NOUNS.items() if category in ("building", "furniture", "appliance", "device")
) | _set(
    """chair chairs bench benches fence fences gate gates railing barrier barriers barricade net pole poles post posts sign signs statue
    statues sculpture hydrant hydrants meter meters cone cones markers cart carts stroller wagon trolley rock rocks fountain hedge
    object objects vehicles memorial rail equipment carving decorations landmark kitten puppy stop"""
)
"""What hides nothing that is behind it."""
HIDING = _set("bus buses truck trucks van vans train trains airplane airplanes boat boats helicopter tractor christmas wall building")
FAR = _set("far distance distant background backdrop foreground")
"""What is far away is in front of nothing."""
LAIN_ON = _set("bed couch sofa grass sand beach floor ground snow bench towel blanket rug mattress lawn field hammock mat carpet pillow")
"""Where people lie, and sleep."""
SEATS = _set("seat seats chair chairs stool stools couch couches sofa sofas bed beds recliner swing")
IN_A_GAME = _set("batter catcher umpire pitcher tennis racket racquet")
"""Who has his place."""
IN_PLAY = IN_A_GAME | _set(
    """baseball bat court skis ski skiing skiis skies skier skiers snowboarder surfer
    surfers game match frisbee frisbees ball soccer wave waves player players"""
)
AT_WORK = _set(
    "pouring pours making makes preparing prepares cooking cooks chopping washing cleaning working serving brushing grilling baking"
)
"""With these people do nothing else meanwhile."""
WATERS = _set("water river lake ocean sea pond stream waves surf mud")
"""Where no animal lies."""
IN_MOTION = _set("air midair mid-air line parade procession race marathon rain blanket blankets covers")
"""Where somebody is as he is: nobody lies in the air, or in line."""
RIDDEN = _set(
    """horse horses elephant elephants camel bike bikes bicycle bicycles motorcycle motorcycles scooter swing swings toilet throne
    ladder stairs"""
)
AWAKE = _set(
    "water surf wave waves ocean sea lake river pool pond rain snow snowy ice path trail street road sidewalk track rock rocks stage court"
)
"""Where nobody sleeps."""
BUSY = _set(
    """phone phones cellphone cellphones laptop smiling smiles smile laughing holding holds hold talking talks waving posing poses pose
    reflected dressed"""
)
"""Doings of who does not sleep."""
MADE_LIKE = _set("teddy stuffed toy toys doll dolls statue statues sculpture sculptures figurine figurines balloon ceramic plastic fake")
"""What does not wake, either."""
ALONG = _set("side alongside leash")
"""Of who goes with somebody."""
WET = _set("wet crosswalk intersection puddle puddles")
"""Where people do not sit down."""
STOOD_AT = _set("oven stove refrigerator fridge freezer sink counter microwave grill podium microphone urinal whiteboard blackboard")
"""Where nobody sits."""
SKATED = _set("skateboard skateboards skate skates skating skateboarding skateboarder boarding boarder")
"""Of who rides where nobody lies, and over what no bed is."""
NARROW = _set("railing rail rails fence wire rope beam pole ledge branch")
SEATED_IN = _set(
    """car cars truck van plane airplane cockpit seat seats chair chairs stroller wheelchair cart kayak canoe tub bathtub carriage cab
    booth"""
)
AFTER_PLACE = _set("on in at near next beside by under behind outside inside with and while")
HELD_UP = _set("on under underneath beneath inside")
"""Of a thing that bears or holds the other one, which does not bear or hold it in its turn."""
ASYMMETRIC = (
    "to the left of", "to the right of", "left of", "right of", "above", "below", "under", "underneath", "beneath", "on top of",
    "in front of", "behind", "chasing", "following", "pulling", "pushing", "carrying", "inside",
)  # fmt: skip
"""Between two things, these say something else when the things change places."""

# Small words ----------------------------------------------------------------------------------------------------------------------------

DETERMINERS = _set(
    """a an the some several many this that these those his her their its my your our one two three four five six seven eight nine ten each
    every another both various few no any"""
)
ADJECTIVES = _set(
    """young old new beautiful cute fluffy empty full open closed wet dry dirty clean shiny round tall short long happy sad modern antique
    vintage colorful colourful ripe fresh sliced whole furry adult elderly different other same single"""
)
FOLLOWING = _set(
    """on in at of with and or to near next by under over above below beneath underneath behind inside outside into onto from for while as
    through across along around between against beside off up down out is are was were has have that which who where sit sits stand stands
    lie lies during before after about towards toward amongst among within without beyond atop like than we"""
)
NOT_VERBS = _set(
    """building clothing ceiling painting string ring wing king swing pudding icing lighting wedding evening crossing parking dining landing
    railing awning morning spring sibling sling thing something anything nothing duckling dumpling bed shed seed feed red speed weed reed
    steed breed moped hundred filling stuffing legged shaped sided handed haired"""
)
