"""The world with habits: habits are as frequent as promised, the judge agrees with a naive one, edits are exact, questions are answered."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from conftest import read_json, read_rows, write_json
from PIL import Image

from cfvlm_ds.core import strict
from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.core.errors import DataError, InputError
from cfvlm_ds.core.groups import SHAM
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.data.picture_file import picture_bytes
from cfvlm_ds.demo.habits import build_habits, judge, scenes_in
from cfvlm_ds.demo.habits.build import SPLITS, TESTS, Drawn, as_group, draw_group, question_of
from cfvlm_ds.demo.habits.edits import EDITS
from cfvlm_ds.demo.habits.grammar import describe
from cfvlm_ds.demo.habits.pope import absent_kinds, popular_kinds
from cfvlm_ds.demo.habits.questions import QUESTIONS
from cfvlm_ds.demo.habits.render import CELL, render
from cfvlm_ds.demo.habits.world import BACKGROUNDS, COLOURS, HABITS, HELD_OUT, MOST, STRENGTH, Scene, Thing, draw_scene, spelled
from cfvlm_ds.demo.habits.writing import NAME, WRITING, counts
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS, Judged, load
from cfvlm_ds.evaluation.benchmarks.base import single

# An independent reader, written from the table of phrasings: regular expressions only, nothing from the grammar's code.
_SINGULAR = ["tree", "mushroom", "cup", "plate", "moon", "star", "cactus", "sun", "boat", "fish", "basket", "pear", "shoe", "ball"]
_SINGULAR += ["car", "key"]
_OF_PLURAL = {{"cactus": "cactuses", "fish": "fishes"}.get(kind, kind + "s"): kind for kind in _SINGULAR}
_KIND = {kind: kind for kind in _SINGULAR} | _OF_PLURAL
_S, _P, _N = ("|".join(words) for words in (_SINGULAR, _OF_PLURAL, _KIND))
_C = "red|green|blue|yellow|purple|white"
_NOUN_PHRASE = rf"(?:a (?:(?:{_C}) )?(?:{_S})|(?:two|three) (?:(?:{_C}) )?(?:{_P}))"
_LIST = rf"{_NOUN_PHRASE}(?:(?:, {_NOUN_PHRASE})* and {_NOUN_PHRASE})?"
_THINGS = re.compile(rf"(?:there is (?=a )|there are (?=t)|we see |the picture shows )({_LIST})")
_PLACE = "at the (top|bottom)|in the (middle)|in the (top|middle|bottom) row"
_ROW = re.compile(rf"(?:the (?:({_S}) is|({_P}) are|({_N}) can be seen)|we see the ({_N})) (?:{_PLACE})")
_COLOUR = re.compile(rf"the (?:({_S}) is|({_P}) are|colour of the ({_N}) is) ({_C})")
_TOTAL = re.compile(r"(?:there are|we see) (two|three|four|five) things")
_BACKGROUND = re.compile(r"(?:this|it) is a (meadow|kitchen|night|desert|lake) scene")
_NUMBER = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def naive_judge(text: str, scene: Scene) -> tuple[dict[tuple, bool], int]:
    """Truth of each statement of a text, and the number of unparsed sentences."""
    things = {thing.kind: thing for thing in scene.things}
    found, unparsed = {}, 0
    for sentence in filter(None, (re.sub(r"\s+", " ", part).strip() for part in text.lower().split("."))):
        if match := _THINGS.fullmatch(sentence):
            for number, colour, noun in re.findall(rf"(a|two|three) (?:({_C}) )?({_N})\b", match[1]):
                kind = _KIND[noun]
                found["thing", kind] = kind in things
                found["number", kind, _NUMBER[number]] = kind in things and len(things[kind].columns) == _NUMBER[number]
                if colour:
                    found["colour", kind, colour] = kind in things and things[kind].colour == colour
        elif match := _ROW.fullmatch(sentence):
            kind, row = _KIND[next(filter(None, match.groups()))], match[5] or match[6] or match[7]
            found["row", kind, row] = kind in things and things[kind].row == {"top": 0, "middle": 1, "bottom": 2}[row]
        elif match := _COLOUR.fullmatch(sentence):
            kind = _KIND[match[1] or match[2] or match[3]]
            found["colour", kind, match[4]] = kind in things and things[kind].colour == match[4]
        elif match := _TOTAL.fullmatch(sentence):
            found["total", _NUMBER[match[1]]] = sum(len(thing.columns) for thing in scene.things) == _NUMBER[match[1]]
        elif match := _BACKGROUND.fullmatch(sentence):
            found["background", match[1]] = scene.background == match[1]
        else:
            unparsed += 1
    return found, unparsed


def is_true(text: str, scene: Scene) -> bool:
    found, unparsed = naive_judge(text, scene)
    assert not unparsed and found, text
    return all(found.values())


def answer(prompt: str, scene: Scene) -> str:
    """The answer of an independent reader of questions."""
    prompt = prompt.removesuffix("\nAnswer the question using a single word or phrase.").removesuffix(" Answer yes or no.")
    things = {thing.kind: thing for thing in scene.things}
    if options := re.search(r"A: (.+?) B: (.+?\.)", prompt):
        true = [name for name, text in zip("AB", options.groups(), strict=True) if is_true(text, scene)]
        assert len(true) == 1, prompt
        return true[0]
    if counted := re.fullmatch(r"(?:How many|Count the) (\w+?)(?: are there\?|\.)", prompt):
        return {1: "one", 2: "two", 3: "three"}[len(things[_OF_PLURAL[counted[1]]].columns)]
    if coloured := re.fullmatch(rf"(?:What colour (?:is|are)|Name the colour of) the ({_N})[?.]", prompt):
        return things[_KIND[coloured[1]]].colour
    if there := re.fullmatch(rf"Is there a ({_S}) in the image\?", prompt):
        return "Yes" if there[1] in things else "No"
    if exactly := re.fullmatch(rf"(?:Is|Are) there exactly (one|two|three) ({_N})\?", prompt):
        kind = _KIND[exactly[2]]
        return "Yes" if kind in things and len(things[kind].columns) == _NUMBER[exactly[1]] else "No"
    if background := re.fullmatch(r"Is this a (\w+) scene\?", prompt):
        return "Yes" if scene.background == background[1] else "No"
    verb, subject, rest = re.fullmatch(rf"(Is|Are) the ({_N}) (.+)\?", prompt).groups()
    return "Yes" if is_true(f"The {subject} {verb.lower()} {rest}.", scene) else "No"


def breaks(scene: Scene) -> dict[tuple[str, str], bool]:
    """Whether each habit of the scene's things is broken."""
    kinds, found = [thing.kind for thing in scene.things], {}
    for thing in scene.things:
        habit = HABITS[thing.kind]
        seen = {"colour": thing.colour, "number": len(thing.columns), "row": ("top", "middle", "bottom")[thing.row]}
        for factor, value in (seen | {"background": scene.background}).items():
            if usual := getattr(habit, factor):
                found[thing.kind, factor] = value != usual
        if habit.company:
            found[thing.kind, "company"] = habit.company not in kinds
    return found


def drawn_groups(split: str, number: int, **options: object) -> list[Drawn]:
    return [draw_group(HabitsConfig("unused", **options), split, index) for index in range(number)]


def test_habits_are_as_strong_as_promised():
    rng, broken, backgrounds = Random("habits"), {}, Counter()
    for _ in range(5000):
        scene = draw_scene(rng, STRENGTH)
        backgrounds[scene.background] += 1
        for habit, is_broken in breaks(scene).items():
            broken.setdefault(habit, []).append(is_broken)
        assert {name for name, is_broken in breaks(scene).items() if is_broken} == {(kind, factor) for kind, factor, _ in scene.broken}
        assert not any(HELD_OUT[thing.kind] == thing.colour for thing in scene.things)
        cells = [(thing.row, column) for thing in scene.things for column in thing.columns]
        assert len(cells) == len({*cells}) and 2 <= len(cells) <= 5
    assert {*broken} == {(kind, factor) for kind, habit in HABITS.items() for factor, value in vars(habit).items() if value}
    for habit, each in broken.items():
        rate, error = 1 - np.mean(each), 4 * math.sqrt(0.1 * 0.9 / len(each))
        assert len(each) > 300 and 0.90 - error < rate < 0.98 + error, (habit, rate)
    assert all(abs(number - 1000) < 4 * math.sqrt(5000 * 0.2 * 0.8) for number in backgrounds.values()) and {*backgrounds} == {*BACKGROUNDS}


@pytest.mark.parametrize("split", TESTS)
def test_test_sets_are_balanced(split):
    kinds = QUESTIONS.get(question_of(split), tuple(EDITS))
    groups = drawn_groups(split, 4 * len(kinds))
    habits = [habit for habit in ("agrees", "contradicts") if split.endswith(habit)] or ["agrees", "contradicts"]
    expected = {(kind, habit): 4 // len(habits) for kind in kinds for habit in habits}
    assert Counter((drawn.edits[0], drawn.habit) for drawn in groups) == expected
    for drawn in groups:
        broken = [breaks(scene) for scene in drawn.scenes]
        if drawn.habit == "agrees":
            assert not any(any(each.values()) for each in broken)
        else:
            assert broken[0] and all(broken[0].values())
            assert drawn.scenes[0].broken != drawn.scenes[1].broken
        held_out = [any(HELD_OUT[thing.kind] == thing.colour for thing in scene.things) for scene in drawn.scenes]
        assert held_out[0] if split == "test_combo" else not any(held_out)


def mutated(text: str, rng: Random) -> str:
    """The text with words dropped, repeated, exchanged or replaced by other words of the world."""
    words = text.split()
    for _ in range(rng.randrange(3)):
        i = rng.randrange(len(words))
        other = rng.choice(
            [*_KIND, *COLOURS, *BACKGROUNDS, "is", "are", "a", "two", "three", "top", "middle", "row", "at", "in", "and", "the", "house"]
        )
        end = "".join(mark for mark in ",." if words[i].endswith(mark))
        words[i : i + 1] = rng.choice(([], [words[i], words[i]], [other + end], [other + end], [words[i].upper()], [words[i].rstrip(".,")]))
        words = words or ["cup."]
    return " ".join(words)


def test_the_judge_agrees_with_a_naive_one():
    rng, seen = Random("judge"), Counter()
    for number in range(2000):
        scene, other = draw_scene(rng, 0.8), draw_scene(rng, 0.8)
        text = describe([rng.choice((scene, scene, other))], str(number))[0]
        text = mutated(text, rng) if number % 2 else text
        verdict, (found, unparsed) = judge(text, scene), naive_judge(text, scene)
        numbered = {
            statement if statement[0] not in ("number", "total") else (*statement[:-1], _NUMBER[statement[-1]]): true
            for statement, true in verdict.statements.items()
        }
        assert (numbered, len(verdict.unparsed)) == (found, unparsed), text
        assert verdict.mentioned == {word for statement in found for word in statement if word in _SINGULAR}
        assert verdict.present == {thing.kind for thing in scene.things}
        seen += Counter(found.values())
        seen["unparsed"] += unparsed
    assert min(seen[True], seen[False], seen["unparsed"]) > 500


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_only_what_it_names(kind):
    rng, number = Random(f"edits/{kind}"), 0
    while number < 60:
        before = draw_scene(rng, 0.9)
        after = EDITS[kind](before, rng, True)
        if after is None:
            continue
        number += 1
        changed = {*before.things} ^ {*after.things}
        differs = (np.asarray(render(before)) != np.asarray(render(after))).any(axis=2)
        assert differs.any() and bool(changed) == (kind != "background") and before.seed == after.seed
        taken = [(thing.row, column) for thing in after.things for column in thing.columns]
        assert len(taken) == len({*taken})
        cells = np.zeros((64, 64), dtype=bool)
        for thing in changed if changed else before.things:
            for column in thing.columns:
                cells[thing.row * CELL : (thing.row + 1) * CELL, column * CELL : (column + 1) * CELL] = True
        if changed:
            assert not (differs & ~cells).any() and before.background == after.background
        else:  # the things hide the background
            assert not (~differs & ~cells).any() and (~differs).sum() > 70 * before.total
        factors = {"colour": 1, "kind": 1, "count": 1, "row": 1, "background": 0, "presence": 0, "colour_swap": 2}
        same = [(a, b) for a, b in zip(before.things, after.things, strict=False) if a != b]
        assert len(same) == factors[kind]
        fields = {name for a, b in same for name in vars(a) if getattr(a, name) != getattr(b, name)}
        assert fields <= {"count": {"columns"}, "colour_swap": {"colour"}}.get(kind, {kind})


def test_a_sham_differs_only_in_jitter():
    for drawn in drawn_groups("test_contradicts", 14):
        anchor, sham = drawn.scenes[0], drawn.scenes[2]
        assert (anchor.things, anchor.background) == (sham.things, sham.background) and drawn.match[2] == drawn.match[0]
        assert render(anchor).tobytes() != render(sham).tobytes()


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ("train", {"num_counterfactuals": 0, "num_questions": 4}),
        ("train", {"num_counterfactuals": 3, "num_questions": 2}),
        ("validation", {}),
        *((split, {}) for split in TESTS),
    ],
)
def test_truth_agrees_with_an_independent_reader(split, options):
    kinds = Counter()
    for drawn in drawn_groups(split, 60, **options):
        for c, candidate in enumerate(drawn.candidates):
            is_description = c < len(drawn.keys)
            kinds["description" if is_description else candidate.text] += 1
            for scene, line in zip(drawn.scenes, drawn.match, strict=True):
                if is_description:
                    assert line[c] == is_true(candidate.text, scene), candidate
                elif candidate.text in ("Yes", "No") or scene in drawn.scenes[:1]:  # other edits may leave a question without a true answer
                    assert line[c] == (answer(candidate.prompt, scene) == candidate.text), candidate
        if split != "train":
            assert drawn.match[0][:2] == [1, 0] or drawn.edits == ("presence",)
            assert drawn.match[1][:2] == [0, 1] or drawn.edits == ("presence",)
        for k in range(1, len(drawn.keys)):
            assert drawn.match[k][k] == 1 and not (drawn.match[0][k] and drawn.match[k][0])
    assert len(kinds) > 1 or kinds["description"]


def test_biased_texts_state_what_is_usual():
    """In the share ``text_bias`` of the broken habits, the same in all texts of a picture. Everything else stays true."""
    options = {"num_counterfactuals": 0, "num_questions": 2, "strength": 0.3, "text_bias": 0.6}
    biased = dict[str, list[bool]]()
    for drawn in drawn_groups("train", 800, **options):
        (scene,), caption = drawn.scenes, drawn.candidates[0]
        (found, unparsed), broken = naive_judge(caption.text, scene), breaks(scene)
        missing = {HABITS[kind].company for kind, factor in broken if factor == "company" and broken[kind, factor]}
        assert not unparsed and drawn.match[0][0] == 1
        more = sum(HABITS[kind].number or 1 for kind in missing) + sum(broken.get((thing.kind, "number"), 0) for thing in scene.things)
        roomy = scene.total + more <= MOST  # otherwise, the texts may be about the picture as it is
        for kind in missing if roomy else ():
            biased.setdefault("company", []).append(("thing", kind) in found)
        for statement, true in found.items():
            if statement[1] in missing or statement[0] == "total":
                continue
            if broken.get((statement[1], statement[0])):
                if roomy:
                    biased.setdefault(statement[0], []).append(not true)
                assert true or statement[2] == getattr(HABITS[statement[1]], statement[0])
            else:
                assert true, (caption.text, statement)
        group = as_group(drawn, "g", [Path("0.png")])
        nouns = re.findall(rf"\b({_N})\b", group.keys[0])
        assert {*nouns} == {*re.findall(rf"\b({_N})\b", caption.text.lower())} and group.keys[0] in group.exclude
    assert {*biased} == {"colour", "number", "row", "company"}
    for name, each in biased.items():
        assert abs(np.mean(each) - 0.6) < 4 * math.sqrt(0.24 / len(each)), name
    for drawn in drawn_groups("train", 100, **options | {"text_bias": 1.0}):
        scene = drawn.scenes[0]
        usual = scene.as_usual(1.0, Random(0))
        assert usual is scene or {factor for (kind, factor), is_broken in breaks(usual).items() if is_broken and scene.find(kind)} <= {
            "background"
        }
        added = {thing.kind for thing in usual.things[len(scene.things) :]}
        for each, line in zip(drawn.candidates[1:], drawn.match[0][1:], strict=True):
            if not added & {_KIND[noun] for noun in re.findall(rf"\b({_N})\b", each.prompt.lower())}:
                assert line == (answer(each.prompt, usual) == each.text)
    tests = [*TESTS, "validation"]
    assert all(drawn_groups(split, 3, **options) == drawn_groups(split, 3, **options | {"text_bias": 0.0}) for split in tests)


def test_language_tells_no_answer():
    """About a pair of pictures the same question has both answers, and the first answer is Yes or A in half of the groups."""
    for split in ("test_yes_no_agrees", "test_yes_no_contradicts", "test_choice"):
        first = Counter(drawn.candidates[0].text for drawn in drawn_groups(split, 280))
        assert min(first.values()) > 140 - 4 * math.sqrt(280 / 4) and len(first) == 2


def test_texts_that_may_be_true_are_excluded():
    """All descriptions of other groups that the naive reader finds true of a picture have an excluded key."""
    every = drawn_groups("train", 150)
    groups = [as_group(drawn, str(i), [Path(f"{i}-{k}.png") for k in range(2)]) for i, drawn in enumerate(every)]
    texts = [
        (c.text, key, {_KIND[noun] for noun in re.findall(rf"\b({_N})\b", c.text)})
        for g in groups
        for c, key in zip(g.candidates, g.keys, strict=True)
    ]
    true = 0
    for drawn, group in zip(every, groups, strict=True):
        for scene in drawn.scenes:
            kinds = {thing.kind for thing in scene.things}  # a text about other kinds is false
            offered = [key for text, key, mentioned in texts if mentioned <= kinds and is_true(text, scene)]
            assert {*offered} <= {*group.exclude}
            true += len(offered)
    assert true > 2 * len(every)  # more than the group's own two


def thing(words: str) -> Thing:
    kind, colour, row, *columns = words.split()
    return Thing(kind, colour, int(row), tuple(map(int, columns)))


def test_absent_things_of_pope_by_hand():
    scene = Scene((thing("cup red 0 1"), thing("ball blue 2 0 1"), thing("pear green 1 1")), "night", 0)
    popular = ["pear", "key", "shoe", "car", "plate", "moon", "star", "tree", "cup", "ball"]
    assert absent_kinds(scene, "popular", popular, Random(0)) == ["key", "shoe"]
    assert absent_kinds(scene, "adversarial", popular, Random(0)) == ["shoe", "plate"]  # company of the ball and of the cup
    scene = Scene((thing("cup red 0 1"), thing("plate white 2 0")), "night", 0)
    assert absent_kinds(scene, "adversarial", popular, Random(0)) == ["moon", "star"]  # at home in the night
    drawn = Counter(kind for seed in range(600) for kind in absent_kinds(scene, "random", popular, Random(seed)))
    assert {*drawn} == {*popular} - {"cup", "plate"} and min(drawn.values()) > 100
    assert popular_kinds(0)[:2] == ["pear", "shoe"]  # which others bring, and which no background limits


def test_metrics_of_writing_by_hand():
    scene = Scene((thing("cup red 0 1"), thing("ball blue 2 0 1")), "night", 0)
    texts = {
        "We see a red cup and two red balls. It is a night scene. The cup is nice.": "agrees",  # 6 of 7 true, 1 of 3 sentences unparsed
        "There is a key. The cup is at the bottom.": "contradicts",  # none of 3 true, 1 of 2 mentioned things absent
    }
    items = [
        single(habit, Path(habit), ["x"] * 6, habit, (1,) * 6, habit=habit, scene=json.dumps(spelled(scene)), things="2")
        for habit in texts.values()
    ]
    values = WRITING.metrics([Judged(item, (counts(text, item),)) for item, text in zip(items, texts, strict=True)])
    assert values == pytest.approx({
        "hallucinated": 100 * 4 / 10, "chair_i": 100 / 4, "chair_s": 50, "covered": 75, "unparsed": 20,
        "hallucinated/agrees": 100 / 7, "chair_i/agrees": 0, "chair_s/agrees": 0, "covered/agrees": 100, "unparsed/agrees": 100 / 3,
        "hallucinated/contradicts": 100, "chair_i/contradicts": 50, "chair_s/contradicts": 100, "covered/contradicts": 50,
        "unparsed/contradicts": 0,
    })  # fmt: skip
    silent = WRITING.metrics([Judged(item, (counts("", item),)) for item in items])
    assert silent.keys() == values.keys() and not any(silent.values())


def test_written_scenes_are_read_as_a_benchmark_and_judged_as_by_the_naive_judge(built):
    loaded = load(WRITING, built / NAME)
    rows = described(built)
    assert not loaded.problems and not loaded.notes and len(loaded.items) == len(rows)
    truth = {row["id"]: scenes_in(row["meta"])[0] for row in rows}
    rng = Random(0)
    for item in loaded.items:
        ((picture,),) = item.images
        scene = truth[picture.name.removesuffix("-0.png")]
        text = " ".join(describe([rng.choice(list(truth.values()))], "x") + ["It flies. "] * rng.randrange(2))
        statements, unparsed = naive_judge(text, scene)
        true, false, there, absent, _, outside = counts(text, item)
        assert (true, false, outside) == (sum(statements.values()), len(statements) - sum(statements.values()), unparsed)
        kinds = {word for statement in statements for word in statement if word in HABITS}
        assert (there, absent) == (sum(scene.find(kind) is not None for kind in kinds), sum(scene.find(kind) is None for kind in kinds))
        assert item.tags["habit"] == ("contradicts" if any(breaks(scene).values()) else "agrees") and picture.is_file()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    config = HabitsConfig(str(tmp_path_factory.mktemp("habits") / "world"), num_train=12, num_test=16, num_questions=1)
    return build_habits(config, progress=lambda _: None)


def described(built: Path) -> list[dict]:
    """The rows whose first pictures are also those of the benchmarks."""
    files = [built / f"test_{habit}.jsonl" for habit in ("agrees", "contradicts")]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_files_are_ordinary_ones(built):
    for path in built.glob("*.jsonl"):
        rows = read_rows(path)
        assert len(rows) == (12 if path.stem == "train" else 16)
        with tarfile.open(built / "images" / f"{path.stem}.tar") as tar:
            names = tar.getnames()
        assert len(names) == sum(len(row["images"]) for row in rows)
        for index, row in enumerate(rows):
            group = from_row(row, built)
            drawn = draw_group(HabitsConfig("unused", num_questions=1), path.stem, index)
            assert row["meta"]["habit"] == drawn.habit
            for (image,), scene in zip(group.images, drawn.scenes, strict=True):
                with Image.open(io.BytesIO(picture_bytes(image, 10_000))) as picture:
                    assert picture.size == (64, 64) and picture.tobytes() == render(scene).tobytes()
            read = scenes_in(row["meta"])
            assert [(each.things, each.background) for each in read] == [(each.things, each.background) for each in drawn.scenes]
            if path.stem != "train":
                assert group.edits[-1].type == SHAM


def test_pope_files_have_the_official_form(built):
    tests = described(built)
    for split in ("random", "popular", "adversarial"):
        file = built / "pope" / "output" / "coco" / f"coco_pope_{split}.json"
        rows = read_rows(file)
        assert [row["question_id"] for row in rows] == list(range(1, 4 * len(tests) + 1))
        for index, row in enumerate(rows):
            scene = scenes_in(tests[index // 4]["meta"])[0]
            assert row["image"] == f"{tests[index // 4]['id']}-0.png" and (built / "pope" / "val2014" / row["image"]).is_file()
            assert answer(row["text"], scene).lower() == row["label"] == ("yes", "yes", "no", "no")[index % 4]
            assert row["habit"] == ("contradicts" if any(breaks(scene).values()) else "agrees")
        assert {"question_id", "image", "text", "label"} <= {*rows[0]}
    assert len(load(BENCHMARKS["pope"], built / "pope").items) == 3 * 4 * len(tests)


def test_a_seed_determines_the_world(built, tmp_path):
    def build(name: str, **options: int) -> Path:
        return build_habits(HabitsConfig(str(tmp_path / name), **{"num_train": 12, "num_test": 16, "num_questions": 1, **options}))

    again, more, other = build("again"), build("more", num_train=14), build("other", seed=1)
    for path in (path for path in built.rglob("*") if path.is_file()):
        assert (again / path.relative_to(built)).read_bytes() == path.read_bytes()
    assert (more / "train.jsonl").read_text().startswith((built / "train.jsonl").read_text())
    assert (other / "test_combo.jsonl").read_text() != (built / "test_combo.jsonl").read_text()
    stamp = (again / "habits.json").stat().st_mtime_ns
    assert build("again") == again and (again / "habits.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="other settings"):
        build("again", seed=3)
    settings = read_json(again / "habits.json")["settings"]
    for record in ({}, {"settings": settings | {"edit_weights": None}}):  # of an earlier version
        write_json(again / "habits.json", record)
        with pytest.raises(DataError, match="other settings"):
            build("again")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not made by"):
        build("mine")


def test_content_is_pinned():
    """The same on every platform and Python version. If this changes on purpose, raise build.GENERATOR."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for drawn in drawn_groups(split, 8, num_counterfactuals=3, num_questions=2):
            group = as_group(drawn, "g", [Path(f"{i}.png") for i in range(len(drawn.scenes))])
            texts = [[vars(candidate) for candidate in group.candidates], group.keys, group.exclude]
            digest.update(json.dumps([*texts, group.match, [vars(edit) for edit in group.edits]]).encode())
            for scene in drawn.scenes:
                digest.update(render(scene).tobytes())
    assert digest.hexdigest() == "bfc4f613e7e43cf78077f9aa667ec3c70968ed324e5268e5fc0414221efa61c8"


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train": 0},
        {"strength": 1.5},
        {"text_bias": -0.1, "num_counterfactuals": 0},
        {"text_bias": 0.5},  # with edited pictures
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        build_habits(strict.build(HabitsConfig, {"out_dir": "unused", **wrong}))
