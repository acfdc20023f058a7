"""What a noun can be like: no photograph shows a purple horse, and no wall is striped like a cat."""

from __future__ import annotations

from cfvlm_ds.counterfactuals.propose.siblings import lines, word_set

_CAN_BE = """
dog dogs puppy puppies pup pups rabbit rabbits bunny goat goats sheep lamb donkey: black white brown gray tan
lab labs labrador labradors terrier terriers poodle spaniel collie shepherd hound hounds bulldog beagle mutt: black white brown gray tan
husky dachshund chihuahua pug boxer dalmatian mastiff doggie doggy animal animals calf foal stallion mare llama: black white brown gray tan
ears spot spots patch patches tail tails paws fur mane markings: black white brown gray tan
cat cats kitten kittens: black white gray orange brown tan
horse horses pony ponies: black white brown gray tan
cow cows bull bulls hen hens chicken chickens rooster: black white brown
pig pigs: pink black brown white
duck ducks: white brown black yellow
mouse rat: gray white black brown
bird birds: red blue green yellow black white brown gray tan
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
sidewalk sidewalks pavement road roads street streets path paths: gray brown black white
court courts: green blue red brown gray
rock rocks: gray brown black white red
egg eggs: white brown
mushroom mushrooms: white brown red
tree trees bush bushes shrub shrubs shrubbery hedge hedges vegetation brush reeds crops:
snow: white
grass: green brown
mud dirt: brown
cactus cactuses mountain mountains sand gull whale owl eagle hawk flamingo retriever planet gnu:
"""
CAN_BE: dict[str, frozenset[str]] = {}
"""Noun -> the colours that it has; any where it is not listed."""
for _names, _listed in lines(_CAN_BE):
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
for _names, _listed in lines(_MADE_OF):
    MADE_OF.update(dict.fromkeys(_names, _listed))
PATTERNED = word_set(
    """shirt shirts tie ties dress dresses hat hats scarf scarves jacket jackets coat coats sweater skirt pants shorts socks umbrella
    umbrellas towel towels blanket blankets rug curtain curtains pillow pillows couch sofa chair chairs bag cup cups bowl bowls plate plates
    vase vases floor wall ball balls tent tablecloth apron robe wallpaper flag cloth mug box"""
)
"""What patterns are made on: a striped cat is no other cat with dots."""


def can_be(noun: str, colour: str) -> bool:
    """Whether there are things of a kind that have a colour."""
    return noun not in CAN_BE or {"grey": "gray"}.get(colour, colour) in CAN_BE[noun]
