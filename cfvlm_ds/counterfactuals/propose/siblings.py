"""Tables of what is found in the places where a thing is, and of the words that leave no room for another one."""

from __future__ import annotations

from collections.abc import Iterator


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def lines(text: str) -> Iterator[tuple[list[str], frozenset[str]]]:
    for line in text.strip().splitlines():
        names, _, listed = line.partition(":")
        yield names.split(), word_set(listed)


INSTEAD: dict[str, frozenset[str]] = {}
"""Noun -> what is found in the places where it is."""
_INSTEAD = """
man guy: woman lady child
woman lady: man guy child
child: man woman guy lady
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
ball frisbee kite: ball frisbee kite stick
stick: ball frisbee
skateboard surfboard snowboard: ball frisbee kite
hat helmet cap shirt jacket dress skirt tie scarf coat: hat helmet cap shirt jacket dress skirt tie scarf coat
shorts pants jeans: shorts pants jeans
guitar accordion violin trumpet saxophone flute cello banjo: guitar accordion violin trumpet saxophone flute cello banjo
beach street road sidewalk field path trail: beach street road sidewalk field path trail
snow grass sand mud dirt: snow grass sand mud dirt
tree bush: cactus
flower cactus mushroom: flower cactus mushroom
book newspaper map: book newspaper map
hammer saw shovel broom: hammer saw shovel broom
circle square triangle star cross diamond: circle square triangle star cross diamond
house church barn tower castle: house church barn tower castle
"""
for _names, _listed in lines(_INSTEAD):
    INSTEAD.update(dict.fromkeys(_names, _listed))

BESIDE: dict[str, frozenset[str]] = {}
"""Noun -> words of a caption in which nothing else would do."""
_BESIDE = """
train: overhead structure trestle viaduct boxcar boxcars caboose freight depot steam commuter subway
train: track tracks rail rails railway railroad station platform locomotive traveling travelling carriage conductor engine
boat: water lake river sea ocean harbor harbour dock docks pier sail sails sailing floating bay beach shore pond canal fishing wave waves
boat: bow stern mast hull deck helm rudder paddle paddles canoe kayak yacht ship ships ferry crew marina shipyard
boat: water's canopy edge shoreline seashore marsh coast coastal waterfront riverbank cove lagoon ashore sandbar fisherman
boat: fishermen net nets swimming seagull seagulls kayaks canoes yachts waters sailors vessel vessels island reeds
boat: rowing rows paddling oar oars anchored docked motor captain
airplane: war wwii fighter bomber airline airlines terminal gate
airplane: tail nose cockpit engine engines hangar formation contrail contrails smoke trail airshow
airplane: wing wings runway landing taking passengers passenger boarding jet propeller
helicopter: rotor blades
bird duck: surrounded flock post posts railing rail
bird duck: flying flies fly wire wires branch branches tree trees sky perched wings air above over roof pole nest feeder egg eggs
bird duck: water pond lake river swimming singing beak feathers
dog: floppy tied leashed wearing wears cape costume jacket sweater
dog: leash collar barking barks frisbee bone sheepdog catch catches catching chase chases chasing fetch fetches fetching retrieves retriever
dog: leap leaps leaping jump jumps jumping water surf swim swims swimming splash splashes splashing ball balls toy stick mouth carry carries
dog: carrying race racing hurdle obstacle herding sled sleds tongue muzzle harness walker hose sprinkler surf
dog: beach shore sand snow walks collars kennel
dog: pool puddle puddles lake river ocean sea fountain mud creek stream training trained train trick tricks sidecar
dog: puppy puppies pups pack ski skis skies skiing skier skiers snowboard snowboarder snowboarding skateboard skateboards
dog: skateboarding skate skating boarding bicycle bike motorcycle scooter jogging vest frisbees sheep cattle herd herds
dog: obedience agility hunting hunter
horse: bridle halter hoof reins mounted police equestrian jockeys riders
horse: foal colt cowboy cowboys stable hooves
horse: riding rides ride rider saddle jockey carriage racing cart pulling pull pulls race races polo reins gallops galloping trotting
cow: milk milking udder dairy bell bells horns calf calves
sheep: lamb lambs flock flocks shorn sheared fleece woolly
cat: kitten kittens whiskers
pig: piglet piglets
sheep: wool shearing shepherd
pig: mud
elephant zebra giraffe lion tiger monkey bear: perched perches climb climbs climbing climbed
bear: tree trees branch log logs cub cubs polar grizzly salmon den
elephant: tusked bathing bath herding
elephant: trunk tusk tusks circus spraying feeding fed logs washing
elephant zebra giraffe lion tiger monkey bear: costume costumes wear wears wearing draped blanket trailer rider riders ride rides riding
zebra: stripes striped
giraffe: neck leaves eating tall reaching
lion: mane roaring
monkey: tree trees branch branches banana bananas climbing swinging
bike bicycle motorcycle: stand sidecar jump jumps over ramp ridden racetrack
bike bicycle motorcycle: resting rests
bike bicycle motorcycle: basket baskets helmets track handlebars kickstand pedals lock chained biker bikers cyclist cyclists
bike bicycle motorcycle: riding rides ride rider helmet pushing pulling against leaning lean locked pedals race rack
car bus truck van tractor: sightseeing touring tourist tourists
car bus truck van tractor: pickup plow crosstown route
car bus truck van tractor: cab stop stops station passenger boarding deck decker roof tow taxi fire engine
car bus truck van tractor: driving drives seat wheel passengers plowing race hauling load trailer cargo trunk windshield hood lane
tractor: hay farm plow plowing
flower: plant plants bush bushes
flower: field bed garden cake plate bowl hair grass ground lawn holding
map: sign signs street subway city route train bus
flower: street sidewalk road sign signs
flower: vase vases pot pots bouquet petals stem wearing bee bees butterfly
mushroom: eating soup pizza cooked
tree: giraffe giraffes zebra zebras elephant elephants bear bears monkey bird birds leaf leafy squirrel shade branch green lush
tree: leaves trunk climb climbing climbs christmas branches orchard fallen snow snowy stump forest woods ski skis skier skiers skiing
sink: window windowsill faucet under beneath counter vanity island
sink: basin basins soap towel towels tub toilets mirrors display plumbing drain
sink: bathroom toilet water running washing shower bathtub mirror
sink oven refrigerator microwave toaster: stove range
oven refrigerator microwave: cooking baking baked magnets door open freezer
plate: batter home catcher umpire baseball
chair couch sofa: seating
umbrella: table tables patio cafe air
umbrella: shaded shading raincoat boots twirling parasol raincoats
umbrella: rain raining opening closing open opens closed shade over under
bottle: opener opening opens opened open uncorked cork corks wine beer pouring pours poured drinking drinks ketchup sauce lotion shampoo
basket: wicker laundry basketball hoop opening closing
suitcase: stack stacks stacked pile piled grouped waiting
suitcase backpack handbag: airport terminal carousel rolling wheels wheeled handle packed packing conveyor clothes clothing strap straps
suitcase backpack handbag: opening closing luggage wearing wears
kite: flown wind windy breeze
kite: above over making makes made constructing crafting building paper sticks
kite: fixing assembling prepares preparing putting air high watching strings tail
kite: flying flies fly string sky wind
ball: playing plays kicking kicks hitting hits bouncing tennis soccer bat racket goal net dribbling bouncy rolling rolls pitcher court hoop
ball: base bases player players catcher inning mound racquet racquets rackets court
ball: footballer rugby tackle tackling tackled protects run
ball: bowls bowling bowl golf volleyball basketball baseball football
skateboard surfboard snowboard: jump jumps jumped doing does skate pipe air wetsuit surfer skier ocean beach
skateboard surfboard snowboard: ski skis skies skiis skiing skier skiers rack racks slope slopes mountain hill snowy boots
skateboard surfboard snowboard: car van truck roof
skateboard surfboard snowboard: riding rides ride trick tricks ramp jumping wave waves surfing snow
chair: dining
table: set setting settings placemat placemats napkin napkins silverware utensils cutlery
table: chairs dinner cloth tablecloth picnic coffee pool
table: topped spread candles seats
desk: drawer drawers
desk: computers laptop laptops printer classroom
desk: chair computer office monitor monitors keyboard keyboards
bed: frame guests
bed: net mosquito
bed: cover covers covered quilt quilts duvet bedspread spread mattresses sheets made unmade
bed: jumping jumps
bed: linens comforter mattress bedding canopy pajamas hospital hotel
bed: blanket blankets pillow pillows sheet sheets headboard bedroom
couch sofa: pillow pillows cushion cushions
pizza: pan pans baked baking cooked slicer cutter whole pies cut bite bites
pizza: covered topped topping box boxes crackers pie
pizza: toppings slice slices pepperoni crust oven pan
cake: topped decorated berries strawberry strawberries stand tiered tier icing layered writing
cake: bride groom couple cutting cuts cut knife celebrating celebrate celebration
cake: candle candles birthday wedding frosting frosted icing iced layer slice slices
cookie donut: hole holes
cookie donut: dough chip chips glazed sprinkles frosted iced
sandwich hamburger: cut half halves sliced slices patty
sandwich hamburger: bread bun toast toasted lettuce sub
apple pear lemon orange banana: hang hangs hanging growing grow grows orchard half cut sliced
apple pear lemon orange banana: tree trees bunch bunches peel peeled peeling peelings skin juice branch branches slice slices
strawberry: icing whipped dipped cheesecake waffle waffles pancake pancakes shortcake chocolate sliced
carrot: stick sticks baby shredded grated peeled
potato: mashed baked fries chips fried
tomato: cherry sauce slice slices sliced
cucumber: slice slices sliced pickle
strawberry: cake frosting
strawberry: cream jam juice slice slices
lamp: street ceiling chandelier
lamp: light lights shining lit bright lighting glowing shines shade
book: priest church bible ceremony
newspaper: cover covers page pages
book: stack stacks stacked pile piles title cover covers novel
book: shelf shelves bookshelf bookcase library page pages
clock: spire steeple cathedral facade roman ticking
clock: time hands o'clock tower says set reading reads displays shows numerals dial face faces number numbers
television: living stand room flat
phone television laptop camera keyboard: mounted hanging hangs hung screen screens remote game wii booth text texting message dialing
phone television laptop camera keyboard: speakers desktop ipod mice docked plug
phone television laptop camera keyboard: talking talks watching watches typing types call photo photos picture pictures computer mouse
phone television laptop camera keyboard: monitor photographer lens texting ear ears selfie speaking charging charger plugged
laptop: lap using uses working opened screen mouse
laptop: open between inside
dress skirt: dancing ballet
dress: wedding bride gown bridesmaid bridesmaids
shirt jacket coat: sleeve sleeves button buttons buttoned unbuttoned zipper tucked dog dogs cat cats horse horses fur shaggy
tie: suit suits
hat shirt jacket dress tie scarf coat: neck necks waist around
stick: hockey lacrosse walking fire glow drum hiking hitting hits field player players
helmet: football hockey batter construction player players firefighter firefighters catcher baseball lacrosse soldier soldiers hard pilot
helmet: astronaut worker workers racer racers racing race fencing police motorcycle motorcycles motorcyclist
cap: baseball swim swimming swimmer graduation gown gowns bottle
shorts pants jeans: covered covers pair tennis basketball leather dress suit suits karate belt rolled torn ripped
guitar accordion violin trumpet saxophone flute cello banjo: strumming strums strings bow electric acoustic case amplifier keys plays play
guitar accordion violin trumpet saxophone flute cello banjo: mouth singing sings microphone chin bass band orchestra rock
house church barn castle tower: roof lives clock clocks bell bells steeple steeples cross silo
"""
for _names, _listed in lines(_BESIDE):
    for _name in _names:
        BESIDE[_name] = BESIDE.get(_name, frozenset()) | _listed

OF_CHILDREN = word_set(
    """toy toys playground slide slides swing swings school doll dolls stroller toddler toddlers baby babies pacifier crayon crayons finger
    thumb mother father mom dad parent parents adult adults birthday lap tricycle held carried teacher classroom kindergarten costume
    halloween balloon balloons bubbles sandbox boy boys girl girls daughter son brother sister crawling sucking training bib highchair crib
    sprinkler hopscotch kid kids her his their"""
)
"""Of children alone."""
OF_ADULTS = word_set(
    """work works working worker workers construction driving drives drive driver smoking smokes cigarette cigar beer wine drink drinks
    drinking bar chainsaw office business suit suits tie tuxedo uniform uniforms police market vendor selling sells sell welding cooking
    cooks chef restaurant motorcycle truck car tattoo tattoos tattooed dress bikini job tools machine hammer drill saw ladder repairing
    repairs speech podium microphone guitar stage performing performs band boy boys girl girls child children kid kids baby babies toddler
    toddlers son daughter stroller pregnant couple player players team professional race racing surfing surfer skateboard bull horse
    fishing boat kayak canoe grill grilling barbecue knife cutting scissors laptop computer phone cellphone newspaper briefcase
    cart shopping hat coat purse heels asian roof street store shop"""
)
"""Of adults, or in whose company a child is another one."""
OF_A_PLACE = word_set(
    """sand sandy ocean sea water wave waves surf surfing surfer surfboard shore swim swimming swimsuit bikini sandcastle dig
    digging sailing
    car cars traffic truck trucks bus buses taxi motorcycle motorcycles scooter moped skateboard skateboarder skates building buildings city
    town store stores shop shops shopping house houses market corner crosswalk curb sign vendor vendors parade pedestrians ambulance
    driving drives drive crossing lane downtown urban vehicle vehicles cart block hotel restaurant cafe light lights camping fishing
    soccer football baseball rugby team teams game player players ball frisbee kite race racing marathon runner runners umbrella umbrellas
    horse horses cow cows sheep cattle farm tractor crops hay bat uniform uniforms goat goats wall fence bench tree trees woods
    wooded forest hill mountain
    mountains hiking hikers grass snow performing performs performer performers band musician musicians instrument instruments guitar
    tricycle manhole hydrant meter drain towel towels blanket blankets sunbathing kneeling painting paints drawing sweeping"""
)
"""What says by itself what place it is."""
OF_A_GROUND = word_set(
    """ski skis skiing skier skiers sled sledding snowboard snowboarder snowboarding snowball snowballs snowman snowy snowsuit winter ice
    slope mountain mountains mitten mittens cold coat coats boots shovel shoveling beach ocean sea sandcastle dig digging waves desert dune
    dunes lawn park yard field tall mowing mower picnic golf grazing graze grazes eating flowers dirty muddy bike bikes motorcycle
    motorcycles motocross rider race racing horse horses wheel wheels barefoot bikini swim swimsuit swimming snowshoes sunbathing blanket
    rake raking covered skate skates skating board boards"""
)
"""What says by itself what ground it is."""
