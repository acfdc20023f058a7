"""The embedded world: edits are exact, truth is checked by an independent reader of captions, planted rates are what they claim."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import SHAM, CounterfactualGroup
from cfvlm_ds.data.cfgroup import from_row
from cfvlm_ds.demo.scenes import all_captions, all_texts, build_scenes
from cfvlm_ds.demo.scenes import render as drawing
from cfvlm_ds.demo.scenes.build import RULES, SceneGroup, as_group, draw_group
from cfvlm_ds.demo.scenes.edits import EDITS
from cfvlm_ds.demo.scenes.grammar import PHRASINGS, describe, holds, key, say, true_keys
from cfvlm_ds.demo.scenes.questions import QUESTIONS
from cfvlm_ds.demo.scenes.render import render
from cfvlm_ds.demo.scenes.world import BACKGROUNDS, COLOURS, HELD_OUT, RELATIONS, SHAPES, Rule, Scene, draw_plan, draw_scene, shake

SMALL = {"num_train": 24, "num_test": 16}
DESCRIBED = [split for split in RULES if split.removeprefix("test_") not in QUESTIONS]
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}


# An independent reader of captions: regular expressions only, nothing from the grammar.
_THING = re.compile(
    r"\b(a|two|three) (?:(small|large) )?(?:(striped|dotted|hollow) )?(red|green|blue|yellow|purple|cyan) "
    r"(circle|square|triangle|star|cross|diamond)(?:e?s)?\b"
)
_WORDS = {"left": "left", "right": "right", "above": "above", "below": "below", "top": "above", "bottom": "below", "front": "front"}


def read(caption: str) -> tuple[tuple, str, tuple]:
    """(x, relation of x to y, y)."""
    first, second = (match.groups() for match in _THING.finditer(caption))
    words = [_WORDS.get(word, word) for word in _THING.sub("THING", caption).split()]
    relation = next(word for word in words if word in OPPOSITE)
    # "left of a blue square we see ...", "a blue square with ... to the left": the relation is that of the second thing
    of_second = " with " in caption or (words.index(relation) < words.index("THING") and " and " not in caption)
    return (second, relation, first) if of_second else (first, relation, second)


def is_true(caption: str, scene: Scene) -> bool:
    """Whether the caption, as read above, is true of the scene's geometry."""
    x, relation, y = read(caption)

    def fits(said: tuple, index: int) -> bool:
        thing, (number, size, texture, colour, shape) = scene.things[index], said
        exact = (thing.count, thing.colour, thing.shape) == ({"a": 1, "two": 2, "three": 3}[number], colour, shape)
        return exact and size in (None, thing.size) and texture in (None, thing.texture)

    def stands(i: int, j: int) -> bool:
        (ax, ay), (bx, by) = scene.spots[i], scene.spots[j]
        if abs(ax - bx) < 12 and abs(ay - by) < 12:
            return relation == ("front" if scene.front == i else "behind")
        return {"left": bx - ax > 12, "right": ax - bx > 12, "above": by - ay > 12, "below": ay - by > 12}.get(relation, False)

    return any(fits(x, i) and fits(y, 1 - i) and stands(i, 1 - i) for i in (0, 1))


def drawn_scene(rng: Random, rule: Rule) -> Scene:
    return draw_scene(rng, rule, draw_plan(rng, rule))


def drawn_groups(split: str, number: int, **options: object) -> list[tuple[SceneGroup, CounterfactualGroup]]:
    config = ScenesConfig("unused", **options)
    drawn = [draw_group(config, split, index) for index in range(number)]
    return [(d, as_group(d, f"g{i}", tuple(Path(f"{i}-{k}.png") for k in range(len(d.pictured))))) for i, d in enumerate(drawn)]


def content(folder: Path) -> dict[str, object]:
    """Manifest texts and pixels, by relative path."""
    found: dict[str, object] = {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.jsonl")}
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = (image.mode, image.size, image.tobytes())
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_scenes(ScenesConfig(str(tmp_path_factory.mktemp("scenes") / "world"), **SMALL), progress=lambda _: None)


def test_more_groups_leave_the_first_ones_alone(built, tmp_path):
    more = build_scenes(ScenesConfig(str(tmp_path / "more"), num_train=30, num_test=16))
    assert (more / "train.jsonl").read_text().startswith((built / "train.jsonl").read_text())


def boxes(scene: Scene, index: int) -> list[tuple[int, int, int, int]]:
    """Pixel boxes (left, top, right, bottom) outside which thing ``index`` paints nothing; one for each member of a cluster."""
    half = drawing._half_width(drawing._sample_radius(scene.things[index], scene.looks[index].scale, 48), 48)
    return [drawing._box_at(x, y, half, 48) for x, y in drawing._centres(scene, index)]


def test_content_is_pinned():
    """The same on every platform and Python version. If this changes on purpose, raise build.GENERATOR."""
    digest = hashlib.sha256()
    for split in RULES:
        for drawn, group in drawn_groups(split, 8, num_counterfactuals=3, sham_share=0.5, question_share=0.5):
            texts = [[vars(c) for c in group.candidates], group.keys, group.exclude]
            digest.update(json.dumps([*texts, group.match, [vars(e) for e in group.edits]]).encode())
            for scene in drawn.pictured:
                digest.update(render(scene, 48).tobytes())
    digest.update(render(drawn.scenes[0], 224).tobytes())
    assert digest.hexdigest() == "2afc9797e5d52079b658f3ffb90736bdf58d774c1a6816b61fe563da0aaad86a"


def test_manifest_is_an_ordinary_one(built):
    for split in RULES:
        lines = (built / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == SMALL["num_train" if split == "train" else "num_test"]
        for line in lines:
            group = from_row(json.loads(line), built)
            assert all(cell is not None for row in group.match for cell in row)
            for (path,) in group.images:
                with Image.open(path) as image:
                    assert (image.mode, image.size) == ("RGB", (48, 48))


@pytest.mark.parametrize("kind", EDITS)
def test_edit_changes_only_what_it_names(kind):
    rng, rule, number = Random(f"edits/{kind}"), Rule(0.3, held_out="may"), 0
    while number < 200:
        before = drawn_scene(rng, rule)
        after = EDITS[kind](before, rng, True)
        if after is None:
            continue
        number += 1
        changed = {name for name in vars(before) if name != "things" and getattr(before, name) != getattr(after, name)}
        for index, (was, now) in enumerate(zip(before.things, after.things, strict=True)):
            changed |= {f"{index}.{name}" for name in vars(was) if getattr(was, name) != getattr(now, name)}
        factor = kind.removesuffix("_swap")
        both, one = {f"0.{factor}", f"1.{factor}"}, ({f"0.{factor}"}, {f"1.{factor}"})
        assert changed in {"relation": ({"spots"},), "depth": ({"front"},)}.get(kind, one if factor == kind else (both,))

        phrasing, a_first = rng.randrange(len(PHRASINGS)), rng.random() < 0.5
        texts = [say(describe(scene, a_first), phrasing) for scene in (before, after)]
        old, new = texts[0].split(), texts[1].split()
        assert texts[0] != texts[1]
        if kind.endswith("_swap") or (kind in ("relation", "depth") and phrasing == PHRASINGS.index("{at} {x} and {at_other} {y}")):
            assert Counter(old) == Counter(new)
        if kind != "depth":  # "in front of" / "behind" differ in length
            assert len(old) == len(new)
            assert sum(a != b for a, b in zip(old, new, strict=True)) <= (
                2 if kind.endswith("_swap") or kind in ("count", "relation") else 1
            )

        pixels = [np.asarray(render(scene, 48)).astype(int) for scene in (before, after)]
        differs = (pixels[0] != pixels[1]).any(axis=2)
        near = np.zeros_like(differs)
        for scene in (before, after):
            for index in (0, 1):
                if changed & {"spots", "front", f"{index}.{kind.removesuffix('_swap')}"}:
                    for left, top, right, bottom in boxes(scene, index):
                        near[max(top, 0) : bottom, max(left, 0) : right] = True
        assert differs.any() and not (differs & ~near).any()


@pytest.mark.parametrize("split", DESCRIBED)
def test_truth_tables_agree_with_an_independent_reader(split):
    for drawn, group in drawn_groups(split, 80, num_counterfactuals=4, sham_share=0.5):
        for scene, row in zip(drawn.pictured, group.match, strict=True):
            assert [bool(cell) for cell in row] == [is_true(candidate.text, scene) for candidate in group.candidates]
        for k in range(1, len(group.candidates)):
            assert (group.match[k][k], group.match[0][k], group.match[k][0]) == (1, 0, 0)


def answer(prompt: str, scene: Scene) -> str:
    """The answer of an independent reader of questions."""
    if options := re.search(r"A: (.+) B: (.+?)(?: Which one fits the image\?)?$", prompt):
        true = [name for name, text in zip("AB", options.groups(), strict=True) if is_true_or_there(text, scene)]
        assert len(true) == 1, prompt
        return true[0]
    if counted := re.search(r"(?:How many|Count the) (\w+)s(?: are there\?| do you see\?|\.)$", prompt):
        noun = {"crosse": "cross"}.get(counted.group(1), counted.group(1))
        return {1: "one", 2: "two", 3: "three"}[sum(thing.count for thing in scene.things if thing.shape == noun)]
    asked = re.search(r"\b(?:is|are) (?:there )?(.+)\?", prompt)
    assert asked and (asked.group(1).startswith(("two ", "three ")) == (" are " in f" {prompt}")), prompt
    return "yes" if is_true_or_there(asked.group(1), scene) else "no"


def is_true_or_there(text: str, scene: Scene) -> bool:
    """Whether a caption is true, or whether a thing that is named alone is there."""
    things = [match.groups() for match in _THING.finditer(text)]
    if len(things) == 2:
        return is_true(text, scene)
    ((number, size, texture, colour, shape),) = things
    exact = [t for t in scene.things if (t.count, t.colour, t.shape) == ({"a": 1, "two": 2, "three": 3}[number], colour, shape)]
    return any(size in (None, t.size) and texture in (None, t.texture) for t in exact)


def asked(split: str, number: int, **options: object) -> list[tuple[SceneGroup, CounterfactualGroup]]:
    return [(drawn, group) for drawn, group in drawn_groups(split, number, **options) if drawn.question]


@pytest.mark.parametrize(
    ("split", "options"),
    [("train", {"question_share": 1.0, "num_counterfactuals": 3, "sham_share": 0.5}), *((f"test_{kind}", {}) for kind in QUESTIONS)],
)
def test_answers_agree_with_an_independent_reader(split, options):
    groups = asked(split, 300, **options)
    assert len(groups) == 300
    for drawn, group in groups:
        assert len({candidate.prompt for candidate in group.candidates}) == 1 and len(group.candidates) == 2
        right = [answer(group.candidates[0].prompt, scene) for scene in drawn.scenes[:2]]
        assert right == [candidate.text for candidate in group.candidates], group.candidates[0].prompt
        assert group.match[:2] == ((1, 0), (0, 1))
        if drawn.question == "yes_no":  # whatever else is pictured answers one or the other
            expected = [answer(group.candidates[0].prompt, scene) for scene in drawn.pictured]
            assert [group.candidates[line.index(1)].text for line in group.match] == expected


@pytest.mark.parametrize("kind", QUESTIONS)
def test_language_tells_no_answer(kind):
    """Of both pictures the same is asked and the answers differ, so any reader of prompts is right once; nor does a place tell."""
    groups = asked("train", 1200, question_share=1.0, edit_weights={"count": 1.0} if kind == "count" else None)
    texts = [tuple(candidate.text for candidate in group.candidates) for drawn, group in groups if drawn.question == kind]
    assert len(texts) > 300 and all(first != second for first, second in texts)
    given = Counter(text for pair in texts for text in pair)
    if kind != "count":  # whose numbers are asked two at a time: each picture of a pair has its own
        first = Counter(first for first, _ in texts)
        assert given[texts[0][0]] == given[texts[0][1]] == len(texts) and first[texts[0][0]] / len(texts) == pytest.approx(0.5, abs=0.06)


def test_questions_are_a_share_of_training_and_change_no_scene():
    plain, mixed = (drawn_groups("train", 600, question_share=share) for share in (0.0, 0.4))
    assert not any(drawn.question for drawn, _ in plain)
    kinds = Counter(drawn.question for drawn, _ in mixed)
    assert set(kinds) == {"", *QUESTIONS} and 1 - kinds[""] / 600 == pytest.approx(0.4, abs=0.06)
    for (before, told), (after, group) in zip(plain, mixed, strict=True):
        assert (before.scenes, before.phrasing) == (after.scenes, after.phrasing)
        assert after.question or told == group
    assert len({group.candidates[0].prompt for _, group in plain}) == 5


def test_checker_sees_every_way_to_be_wrong():
    rng, rule, outcomes = Random("wrong"), Rule(0.5, held_out="may"), Counter()
    for _ in range(400):
        a, b = drawn_scene(rng, rule), drawn_scene(rng, rule)
        claim, phrasing = describe(b, rng.random() < 0.5), rng.randrange(len(PHRASINGS))
        assert holds(claim, b) and is_true(say(claim, phrasing), b)
        assert holds(claim, a) == is_true(say(claim, phrasing), a)
        outcomes[holds(claim, a)] += 1
    assert outcomes[False] > 390


def test_keys_say_which_captions_are_true_of_a_picture():
    """As an independent reader finds them: of other scenes that differ in one thing, or in what is left unsaid, and of any other."""
    rng, rule, outcomes = Random("keys"), Rule(0.5, held_out="may"), Counter()
    for _ in range(300):
        scene = drawn_scene(rng, rule)
        plainer = replace(scene, things=tuple(replace(t, texture=rng.choice((t.texture, "plain")), size="medium") for t in scene.things))
        edited = EDITS[rng.choice(list(EDITS))](scene, rng, True) or scene
        for other in (scene, plainer, edited, drawn_scene(rng, rule)):
            claim, phrasing = describe(other, rng.random() < 0.5), rng.randrange(len(PHRASINGS))
            true = is_true(say(claim, phrasing), scene)
            assert (key(claim) in true_keys(scene)) == true, (key(claim), scene)
            outcomes[true] += 1
        assert len(true_keys(scene)) in (1, 2, 4)
    assert min(outcomes.values()) > 300


@pytest.mark.parametrize("split", ["train", "test_count"])
def test_groups_exclude_what_is_true_of_one_of_their_pictures(split):
    """Of all captions of the split, and of all numbers, by the reader; keys are the same for every phrasing of what is said."""
    found = drawn_groups(split, 60, num_counterfactuals=2, sham_share=0.5, question_share=0.3)
    captions = [(text.text, own) for d, g in found if not d.question for text, own in zip(g.candidates, g.keys, strict=True)]
    for drawn, group in found:
        if not drawn.question:
            assert len(group.keys) == len(group.candidates)
            for text, said in captions:
                assert (said in group.exclude) == any(is_true(text, scene) for scene in drawn.pictured)
        elif drawn.question == "count":
            true = {answer(group.candidates[0].prompt, scene) for scene in drawn.pictured}
            assert not group.keys and {*group.exclude} == true - {candidate.text for candidate in group.candidates}


def test_edits_name_the_words_that_changed():
    for _, group in drawn_groups("test_corr50", 64):
        edit = group.edits[0]
        old, new = (Counter(candidate.text.split()) for candidate in group.candidates)
        if edit.type.endswith("_swap"):
            assert old == new and Counter(edit.source.split()) == Counter(edit.target.split())
        else:
            assert old - Counter(edit.source.split()) == new - Counter(edit.target.split())
        assert edit.source != edit.target


def planted(scene: Scene) -> bool:
    """Whether the earlier shape is left, above or in front."""
    a, b = scene.things
    return (scene.relation in ("left", "above", "front")) == (SHAPES.index(a.shape) < SHAPES.index(b.shape))


@pytest.mark.parametrize(("split", "rate"), [("train", 0.9), ("test_iid", 0.9), ("test_corr50", 0.5), ("test_corr10", 0.1)])
def test_planted_correlation(split, rate):
    config = ScenesConfig("unused")
    scenes = [draw_group(config, split, index).scenes[0] for index in range(1200)]
    assert np.mean([planted(scene) for scene in scenes]) == pytest.approx(rate, abs=0.04)
    looks = Counter((thing.colour, thing.shape) for scene in scenes for thing in scene.things)
    assert len(looks) == 30 and max(looks.values()) < 2 * min(looks.values()), "no other correlation"


def test_held_out_combinations_never_occur_outside_their_split():
    assert len(HELD_OUT) == 6 and {c for c, _ in HELD_OUT} == set(COLOURS) and {s for _, s in HELD_OUT} == set(SHAPES)
    for split in DESCRIBED:
        seen: set[tuple[str, str]] = set()
        for drawn, group in drawn_groups(split, 300, num_counterfactuals=2):
            per_scene = [{(t.colour, t.shape) for t in scene.things} for scene in drawn.pictured]
            said = {(thing[3], thing[4]) for c in group.candidates for thing in (read(c.text)[0], read(c.text)[2])}
            seen |= set().union(*per_scene) | said
            assert split != "test_combo" or per_scene[0] & HELD_OUT
        assert (seen & HELD_OUT == HELD_OUT) if split == "test_combo" else not seen & HELD_OUT
        assert split != "train" or len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)


def test_edit_types_are_balanced():
    for split in set(RULES) - {"train", "test_count"}:
        kinds = Counter(group.edits[0].type for _, group in drawn_groups(split, 45))
        assert kinds == dict.fromkeys(EDITS, 5)
    kinds = Counter(drawn.edits[0] for drawn, _ in drawn_groups("train", 800))
    assert set(kinds) == set(EDITS) and min(kinds.values()) > 60
    weighted = Counter(
        kind for drawn, _ in drawn_groups("train", 40, num_counterfactuals=2, edit_weights={"colour": 1, "size": 3}) for kind in drawn.edits
    )
    assert set(weighted) == {"colour", "size"}


def test_sham_says_the_same_and_looks_different():
    for drawn, group in drawn_groups("test_iid", 40):
        edit = group.edits[-1]
        assert (edit.type, edit.image, edit.text) == (SHAM, 2, None)
        assert group.match[2] == group.match[0] == (1, 0)
        assert drawn.sham is not None and drawn.sham.things == drawn.scenes[0].things
        assert render(drawn.sham, 48).tobytes() != render(drawn.scenes[0], 48).tobytes()
    shares = [drawn.sham is not None for drawn, _ in drawn_groups("train", 200, sham_share=0.25)]
    assert 0.15 < np.mean(shares) < 0.35
    assert not any(drawn.sham for drawn, _ in drawn_groups("train", 20))


def test_shaking_keeps_the_scene_graph():
    rng = Random("shake")
    for _ in range(200):
        scene = drawn_scene(rng, Rule(0.5))
        sham = shake(scene, rng)
        assert (sham.things, sham.relation, sham.backdrop.kind) == (scene.things, scene.relation, scene.backdrop.kind)
        assert describe(sham, True) == describe(scene, True)


def test_scenes_are_varied_and_things_stay_on_the_canvas():
    rng, scenes = Random("varied"), []
    for _ in range(500):
        scenes.append(drawn_scene(rng, Rule(0.5)))
    assert {s.relation for s in scenes} == set(RELATIONS) and {s.backdrop.kind for s in scenes} == set(BACKGROUNDS)
    assert {len(s.distractors) for s in scenes} == {0, 1, 2}
    for scene in scenes:
        covered = [box for index in (0, 1) for box in boxes(scene, index)]
        assert all(min(box) >= -1 and max(box) <= 49 for box in covered)
        for mark in scene.distractors:
            x, y = mark.x, mark.y
            assert not any(box[0] < x + 3 and x - 3 < box[2] and box[1] < y + 3 and y - 3 < box[3] for box in covered)


@pytest.mark.parametrize("image_size", [64, 112, 224])
def test_other_image_sizes(image_size):
    for split in ("train", "test_combo"):
        for drawn, _ in drawn_groups(split, 16, image_size=image_size, sham_share=1.0):
            assert all(render(scene, image_size).size == (image_size, image_size) for scene in drawn.pictured)


def test_captions_cover_the_grammar_in_few_words():
    captions = all_captions(0, 3000)
    assert captions == all_captions(0, 3000) != all_captions(1, 3000)
    words = {word for caption in captions for word in caption.split()}
    assert {*COLOURS, *SHAPES, "crosses", "circles", "small", "large", "striped", "dotted", "hollow", "two", "three", "behind"} <= words
    assert {(t[3], t[4]) for c in captions for t in (read(c)[0], read(c)[2])} >= HELD_OUT
    assert all(7 <= len(caption.split()) <= 18 and caption == caption.lower() for caption in captions)


def test_a_tokenizer_sees_what_is_asked():
    words = {word.strip("?:.") for text in all_texts(0, 300) for word in text.split()}
    asked_words = {word.strip("?:.") for _, group in drawn_groups("train", 400, question_share=1.0) for c in group.candidates
                   for word in f"{c.prompt} {c.text}".split()}  # fmt: skip
    assert asked_words <= words


def test_killed_build_is_built_again(tmp_path):
    config, lines = ScenesConfig(str(tmp_path / "world"), num_train=2, num_test=8), []

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfvlm_ds.demo.scenes.build.as_group", killed)
        with pytest.raises(KeyboardInterrupt):
            build_scenes(config)
    assert not list(tmp_path.iterdir())
    (tmp_path / "world.partial" / "images").mkdir(parents=True)  # what a kill -9 leaves
    built = build_scenes(config, progress=lines.append)
    assert (built / "scenes.json").exists() and [p.name for p in tmp_path.iterdir()] == ["world"] and len(lines) == 1
    stamp = (built / "scenes.json").stat().st_mtime_ns
    assert build_scenes(config, progress=lines.append) == built and (built / "scenes.json").stat().st_mtime_ns == stamp and len(lines) == 1


def test_refuses_a_folder_that_holds_something_else(built, tmp_path):
    with pytest.raises(DataError, match=r"other settings.*choose another out_dir"):
        build_scenes(ScenesConfig(str(built), **SMALL, seed=5))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not made by build_scenes"):
        build_scenes(ScenesConfig(str(tmp_path), **SMALL))
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_train": 0},
        {"image_size": 16},
        {"sham_share": 2.0},
        {"question_share": -1},
        {"edit_weights": {"color": 1.0}},
        {"edit_weights": {}},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        build_scenes(ScenesConfig("unused", **wrong))


def test_asking_for_more_edits_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("cfvlm_ds.demo.scenes.build._MAX_DRAWS", 50)
    with pytest.raises(DataError, match="num_counterfactuals"):
        draw_group(ScenesConfig("unused", num_counterfactuals=3, edit_weights={"depth": 1.0}), "train", 0)
