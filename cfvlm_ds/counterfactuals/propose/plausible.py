"""What may stand in the place of a noun.

A picture of the edited caption must be thinkable: a giraffe on a wire is told from a photograph by its words alone.
"""

from __future__ import annotations

from cfvlm_ds.counterfactuals.propose.attributes import MADE_OF, PATTERNED, can_be
from cfvlm_ds.counterfactuals.propose.caption import Caption, Phrase
from cfvlm_ds.counterfactuals.propose.fitting import CUTLERY, CYCLES, EATEN, FITTING, INTO, OUTSIDE, At
from cfvlm_ds.counterfactuals.propose.siblings import BESIDE, INSTEAD, word_set
from cfvlm_ds.counterfactuals.propose.vocabulary import ALIKE, DETERMINERS, FOLLOWING, GENDERED, NEVER_PROPOSED, NOUNS, PEOPLE, SCENERY

OF_ONE_SEX = word_set(
    """dress dresses skirt skirts bikini bikinis beard beards bearded mustache moustache bald pregnant bra gown heels shirtless bride groom
    wedding makeup lipstick nun monk king queen husband wife father mother son daughter pigtail pigtails ponytail ponytails braids tutu sari
    topless ballerina ballerinas cheerleader cheerleaders hijab purse male female santa priest tuxedo breastfeeding"""
)
_ALIKE = {word: frozenset().union(*(group for group in ALIKE if word in group)) for _, word, _ in NOUNS.values()}


def is_compared(caption: Caption, phrase: Phrase) -> bool:
    """Whether there is something else that tells the size of a thing: a picture of a lone ball shows no size."""
    return any(each.noun != phrase.noun and caption.words[each.noun] not in SCENERY for each in caption.phrases)


def instead(caption: Caption, phrase: Phrase) -> frozenset[str]:
    """Singulars of what may stand in the place of a noun; none where it is what the rest of the caption needs."""
    at = At(caption, phrase)
    if at.said & BESIDE.get(at.one, frozenset()) or (at.category == "person" and at.said & (GENDERED | OF_ONE_SEX)) or _is_held(at):
        return frozenset()
    found = INSTEAD.get(at.one, frozenset()) - _ALIKE[at.one] - {at.one}
    found -= frozenset() if at.category == "shape" else NEVER_PROPOSED
    if at.category in FITTING:
        found = FITTING[at.category](at, found)
    if at.before in INTO:
        found -= word_set("plate fork knife spoon umbrella bicycle bike motorcycle tractor")
    return frozenset(each for each in found if _fits(caption, phrase, each))


def _is_held(at: At) -> bool:
    """Whether the words around a noun leave room for no other one."""
    if at.before in ("like", "as"):  # a sign that looks like a clock
        return True
    if at.before == "of" and at.category not in ("person", "shape", "reading") and at.earlier not in _WHOLE:
        return True  # a part of it
    if at.determiner == "one" and at.caption.words.count("one") > 1:
        return True  # "one cow standing and one lying"
    following = at.caption.words[at.phrase.noun + 1 : at.phrase.noun + 3]
    lit = following == ["is", "on"] and at.caption.word(at.phrase.noun + 3) in ("", "by", "and", "in", "at", "while")
    if lit or following == ["and", "another"]:
        return True
    if at.category == "shape" and following[:1] == [","] and not set(following[1:]) & (DETERMINERS | FOLLOWING):  # a square, white cake
        return True
    on = at.before in ("on", "onto", "riding", "rides", "ride")
    if at.category in _HELD_BY and at.before in _HELD_BY[at.category]:
        return True
    if at.after in ("signing", "making", "tasting", "racing"):  # of books
        return True
    if (at.category in ("bag", "vehicle", "tool") and at.said & _FASTENED) or (at.after == "of" and at.category != "dish"):
        return True  # a coat of paint, too
    a_part = at.earlier == "inside" or (at.earlier == "front" and at.caption.word(at.phrase.start - 3) != "in")
    if at.before == "of" and a_part and at.category in ("vehicle", "animal"):
        return True
    if at.category == "building" and at.after in ("on", "atop") and at.said & word_set("building buildings roof"):
        return True
    if at.one == "dog" and (at.before in _WALKED or (at.said & _WALKED and (at.before == "with" or at.said & PEOPLE))):
        return True
    if at.one == "dog" and at.determiner in ("his", "her", "their") and at.said & (OUTSIDE | word_set("plains")):
        return True
    if at.one in CYCLES and (on or at.determiner in ("his", "her", "their")):
        return True
    if at.one in ("tree", "bush"):  # what stands in the background, or where something is
        return at.determiner in ("", "some") or at.before in word_set("in under on up from beneath into of underneath")
    if at.one == "umbrella" and at.before in ("under", "beneath", "underneath", "by"):
        return True
    if at.one in ("sink", "bowl", "cup", "chair", "couch", "sofa", "bed") and at.before in INTO:
        return True
    if (at.one == "flower" and at.before == "of") or (at.one == "camera" and at.determiner == "the" and at.phrase.start > 0):
        return True
    if at.one in CUTLERY and at.said & EATEN:
        return True
    using = at.category == "tool" or (at.one in CUTLERY and bool(at.said & _USED))
    return at.before == "with" and using and at.earlier != "table"


_WHOLE = word_set(
    """picture pictures photo photos photograph image view up shot painting drawing portrait reflection group groups bunch couple pair
    row rows line lot lots pile stack number set variety collection display kind type front ahead full herd pack flock one two
    three four five some many all most inside outside left right hundreds dozen dozens lineup fleet assortment array selection mix
    family series crowd team trio handful plenty bowl bowls plate plates basket box boxes made consisting half statue sculpture
    model"""
)
"""Before "of" and a noun, which is not a part of it then."""
_UPON = word_set("on onto riding rides ride")
_HELD_BY = {
    "animal": _UPON,
    "sport": _UPON,
    "dish": _UPON,
    "device": _UPON | word_set("in at for to facing towards toward"),  # smiling at the camera
    "shape": word_set("in"),  # people stand in a circle, and in a square
    "furniture": word_set("at"),
    "plant": word_set("on onto"),
    "building": word_set("in inside into"),
    "appliance": word_set("in into inside outside of"),
    "bag": word_set("on onto under underneath beneath"),
    "tool": word_set("in on of"),
    "vehicle": word_set("walking walks walk walked pushing pushes push carrying carries carry lifting lifts lift wheeling wheels"),
}
_FASTENED = word_set("attached mounted mounts mounting fastened tied strapped bolted towed towing tows")
_WALKED = word_set("walking walks walk running runs run jogging jogs")
_USED = word_set("cutting cuts cut slicing eating eats spreading stirring")


def _fits(caption: Caption, phrase: Phrase, noun: str) -> bool:
    """Whether what is said of a noun may be said of another one."""
    words = [caption.words[place] for place in phrase.adjectives]
    if caption.word(phrase.noun + 1) in ("is", "are"):
        words += caption.words[phrase.noun + 2 : phrase.noun + 4]
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
    **dict.fromkeys(("empty", "full"), word_set("bowl cup bottle vase plate basket")),
    **dict.fromkeys(("open", "closed"), word_set("book newspaper map")),
    **dict.fromkeys(("ripe", "sliced"), INSTEAD["carrot"] | INSTEAD["apple"]),
    **dict.fromkeys(("striped", "dotted", "plaid", "checkered"), PATTERNED | INSTEAD["circle"]),
    "fresh": INSTEAD["carrot"] | INSTEAD["apple"],
    "long": word_set("table bench desk couch bus truck"),
    "round": word_set("plate bowl table"),
}
"""Adjective -> the nouns of which it may be said."""
_COLOURS = frozenset(
    ["red", "green", "blue", "yellow", "purple", "cyan", "orange", "pink", "brown", "black", "white", "gray", "grey"]
) | word_set("violet beige tan silver gold golden turquoise maroon")
_MATERIALS = word_set("wooden metal plastic glass stone brick leather")
