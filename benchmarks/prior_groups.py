"""Manifests of cut-out pictures: natural captions for a base model, counterfactual groups for fine-tuning, and evaluation sets for both.

In a counterfactual group, the natural picture and text come first, so the metric ``factual`` is the accuracy on natural pictures. The
changed picture and text come second, so the group's other comparison is on a picture that contradicts the prior. Each text is true of only
one picture, so a model has to look at the pictures to choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from prior_pictures import Scene, Thing, things

from cfvlm_ds.core.files import whole_folder

EDITS = ("colour", "count", "place", "side")
"""Types of edits. Language cannot predict ``side`` (left or right), so it is the control."""
DESCRIBE = (
    "Describe the image.",
    "What do you see?",
    "What is in this picture?",
    "Write a caption for the image.",
    "Say what the picture shows.",
)
ASK = ("{q}", "{q} Answer yes or no.", "Yes or no: {q}", "Look at the image. {q}")
ASKED = 0.4
"""For each type of question, the share of suitable natural pictures that get one."""
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
MANIFESTS = ("natural", "train", "validation", "test", "yes_no", "names", "names_new")
Sizes = dict[str, int]
Row = dict[str, Any]


class Maker:
    """Generator of scenes and captions. It writes each picture to ``folder``."""

    def __init__(self, all_things: Sequence[Thing], folder: Path, rng: Random) -> None:
        self.things, self.folder, self.rng = all_things, folder, rng
        self.pictures = 0

    def row(
        self, name: str, scenes: Sequence[Scene], texts: Sequence[tuple[str, str]], truth: Sequence[Sequence[int]], edit: Row | None = None
    ) -> Row:
        """Build a row in the package's own format from scenes, (prompt, text) pairs and a truth table with one row per scene."""
        seed = self.rng.random()  # shared by the pictures of a group, so that they differ only in the edit
        images = [{"id": f"i{at}", "path": self._picture(each, Random(seed))} for at, each in enumerate(scenes)]
        said = [{"id": f"t{at}", "prompt": prompt, "text": text} for at, (prompt, text) in enumerate(texts)]
        match = [[f"i{i}", f"t{t}", value] for i, line in enumerate(truth) for t, value in enumerate(line)]
        about = {"edits": [{"image": "i1", "text": "t1", **edit}]} if edit else {}
        shown = {"things": sorted({thing.name for each in scenes for thing in each.things})}
        return {"id": name, "images": images, "texts": said, "match": match, **about, "meta": shown}

    def _picture(self, shown: Scene, rng: Random) -> str:
        self.pictures += 1
        path = self.folder / "pictures" / f"{self.pictures // 1000:03d}" / f"{self.pictures:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.drawn(rng).save(path)
        return str(path.relative_to(self.folder))

    # natural pictures -------------------------------------------------------------------------------------------------------------------

    def natural(self, name: str) -> Row:
        """Build a row with a natural picture, its caption, and questions with true answers."""
        rng = self.rng
        kind = rng.choice(("one", "one", "one", "several", "place", "side"))
        if kind == "several":
            thing, number = rng.choice([each for each in self.things if each.is_counted and not each.alone]), rng.randint(2, 4)
            shown = Scene((thing,) * number, ("",) * number, "grid")
            caption, there = f"{NUMBERS[number]} {thing.plural}", [thing]
        elif kind in ("place", "side"):
            shown, (caption, _) = self._two(kind, self.things)
            there = list(shown.things)
        else:
            thing = rng.choice(self.things)
            shown = self._alone(thing)
            caption, there = thing.phrase(thing.colour if rng.random() < 0.7 else ""), [thing]
        texts = [(rng.choice(DESCRIBE), caption)]
        if rng.random() < ASKED:
            texts.append(self._there(rng.choice(there), there))
        if kind == "one" and there[0].colour and rng.random() < ASKED:
            texts.append(self._colour_asked(there[0], rng.choice((there[0].colour, rng.choice(there[0].colours))), there[0].colour))
        return self.row(name, [shown], texts, [[1] * len(texts)])

    def _alone(self, thing: Thing) -> Scene:
        """Return a scene with one thing, which has any size and place or, as in scenes with several things, fills a quarter."""
        return Scene((thing,), ("",), self.rng.choice(("free", "grid")))

    def _there(self, thing: Thing, there: Sequence[Thing]) -> tuple[str, str]:
        """Return a yes/no question about the presence of a thing, and the answer. Half of the questions are about absent things."""
        if self.rng.random() < 0.5:
            thing = self.rng.choice([each for each in self.things if each.name not in {seen.name for seen in there}])
        return self._asked(there_question(thing)), "yes" if thing in there else "no"

    def _colour_asked(self, thing: Thing, asked: str, shown: str) -> tuple[str, str]:
        return self._asked(colour_question(thing, asked)), "yes" if asked == shown else "no"

    def _asked(self, question: str) -> str:
        return self.rng.choice(ASK).format(q=question)

    def _two(self, kind: str, among: Sequence[Thing]) -> tuple[Scene, tuple[str, str]]:
        """Return a scene with two things in their usual order, its caption, and the caption for the reverse order."""
        rng = self.rng
        counted = [each for each in among if each.is_counted]
        if kind == "place":
            first = rng.choice([each for each in counted if each.in_sky])
            second = rng.choice([each for each in counted if not each.in_sky])
            words, layout = ("above", "below"), "above"
        else:
            first, second = rng.sample(counted, 2)
            words, layout = ("to the left of", "to the right of"), "left"
        shown = Scene((first, second), ("", ""), layout)
        if rng.random() < 0.5:
            first, second, words = second, first, words[::-1]
        usual, other = (f"{first.phrase()} {word} {second.phrase()}" for word in words)
        return shown, (usual, other)

    # counterfactuals --------------------------------------------------------------------------------------------------------------------

    def group(self, name: str, edit: str, among: Sequence[Thing], as_question: bool = False) -> Row:
        """Build a group of a natural picture and its text, and a copy of each with one change. With ``as_question`` (only for ``colour``),
        the texts are the answers to a yes/no question about the two pictures instead.
        """
        rng = self.rng
        if edit == "colour":
            thing = rng.choice([each for each in among if each.colours])
            other = rng.choice(thing.colours)
            layout = rng.choice(("free", "grid"))
            scenes = [Scene((thing,), (colour,), layout) for colour in ("", other)]
            texts, words = [thing.phrase(thing.colour), thing.phrase(other)], (thing.colour, other)
            if as_question:
                return self._question(name, scenes, colour_question(thing, rng.choice(words)), words)
        elif edit == "count":
            thing, number = rng.choice([each for each in among if each.is_counted and each.alone]), rng.randint(2, 4)
            scenes = [Scene((thing,) * each, ("",) * each, "grid") for each in (1, number)]
            texts, words = [thing.phrase(), f"{NUMBERS[number]} {thing.plural}"], ("one", NUMBERS[number])
        else:
            usual, (caption, other) = self._two(edit, among)
            scenes = [usual, Scene(usual.things[::-1], usual.colours, usual.layout)]
            texts, words = [caption, other], (word_of(caption), word_of(other))
        prompt = rng.choice(DESCRIBE)
        about = {"type": edit, "from": words[0], "to": words[1]}
        return self.row(name, scenes, [(prompt, text) for text in texts], [[1, 0], [0, 1]], about)

    def _question(self, name: str, scenes: Sequence[Scene], question: str, words: tuple[str, str]) -> Row:
        """Build a group with a question that names one of two ``words``. The first picture shows the first word, and the first text is the
        answer for this picture.
        """
        answers = ["yes", "no"] if f" {words[0]}?" in question else ["no", "yes"]
        prompt = self._asked(question)
        about = {"type": "colour", "from": words[0], "to": words[1]}
        return self.row(name, scenes, [(prompt, answer) for answer in answers], [[1, 0], [0, 1]], about)

    def there_group(self, name: str, among: Sequence[Thing]) -> Row:
        """Build a group of two pictures with one thing each, and a question about the presence of one of the things."""
        first, second = self.rng.sample(list(among), 2)
        asked = self.rng.choice((first, second))
        prompt, answers = self._asked(there_question(asked)), ("yes", "no") if asked is first else ("no", "yes")
        about = {"type": "there", "from": first.name, "to": second.name}
        scenes = [self._alone(each) for each in (first, second)]
        return self.row(name, scenes, [(prompt, answer) for answer in answers], [[1, 0], [0, 1]], about)

    def names_group(self, name: str, among: Sequence[Thing]) -> Row:
        """Build a group of two natural pictures of different things, with the things' names as texts. Both things have the same colour if
        possible.
        """
        first = self.rng.choice(list(among))
        others = [each for each in among if each is not first]
        second = self.rng.choice([each for each in others if each.colour == first.colour] or others)
        prompt = self.rng.choice(DESCRIBE)
        about = {"type": "name", "from": first.name, "to": second.name}
        scenes = [self._alone(each) for each in (first, second)]
        return self.row(name, scenes, [(prompt, each.phrase()) for each in (first, second)], [[1, 0], [0, 1]], about)


def there_question(thing: Thing) -> str:
    return f"Is there {thing.phrase()} in the picture?"


def colour_question(thing: Thing, colour: str) -> str:
    return f"Is the {thing.name} {colour}?" if thing.takes_article else f"Are the {thing.name} {colour}?"


def word_of(caption: str) -> str:
    return next(word for word in ("above", "below", "left", "right") if f" {word} " in caption)


def write_pictures(source: Path, folder: Path, sizes: Sizes, seed: int = 0) -> None:
    """Write all MANIFESTS, their pictures, and things.json, unless the folder exists."""
    if folder.exists():
        return
    found = things(source)
    with whole_folder(folder) as partial:
        for name, rows in manifests(found, partial, sizes, seed):
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        listed = {
            each.name: {"colour": each.colour, "held_out": each.held_out, "alone": each.alone, "colours": each.colours} for each in found
        }
        (partial / "things.json").write_text(json.dumps(listed, indent=0) + "\n")


def manifests(found: Sequence[Thing], folder: Path, sizes: Sizes, seed: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name and rows of each manifest. Training and validation groups edit only training things; test groups edit only held-out
    things.
    """
    maker = Maker(found, folder, Random(f"{seed}/pictures"))
    known, new = ([each for each in found if each.held_out is held_out] for held_out in (False, True))

    def edited(name: str, among: Sequence[Thing], questions: float) -> list[Row]:
        rows = []
        for at in range(sizes[name]):
            edit = EDITS[at % len(EDITS)]
            rows.append(maker.group(f"{name}-{at}", edit, among, edit == "colour" and maker.rng.random() < questions))
        maker.rng.shuffle(rows)
        return rows

    makers: dict[str, Callable[[], list[Row]]] = {
        "natural": lambda: [maker.natural(f"natural-{at}") for at in range(sizes["natural"])],
        "train": lambda: edited("train", known, 0.3),
        "validation": lambda: edited("validation", known, 0.0),
        "test": lambda: edited("test", new, 0.0),
        "yes_no": lambda: [
            maker.there_group(f"there-{at}", new) if at % 2 else maker.group(f"asked-{at}", "colour", new, True)
            for at in range(sizes["yes_no"])
        ],
        "names": lambda: [maker.names_group(f"names-{at}", known) for at in range(sizes["names"])],
        "names_new": lambda: [maker.names_group(f"names_new-{at}", new) for at in range(sizes["names"])],
    }
    for name in MANIFESTS:
        yield name, makers[name]()
