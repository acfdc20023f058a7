"""The benchmark of real priors, without a training: its pictures show what their texts say and nothing else tells; its arms; its tables."""

from __future__ import annotations

import colorsys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import prior_groups
import pytest
import real_prior
import torch
from conftest import read_json, read_rows, write_json
from cut_outs import SHOWN, write_cut_outs
from PIL import Image

from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.data import read_manifest
from cfvlm_ds.evaluation.metrics import accuracies
from cfvlm_ds.evaluation.scoring import GroupScores

SIZES = {"natural": 60, "train": 80, "validation": 8, "test": 48, "yes_no": 40, "names": 6}
ROUNDED = {"red": 0, "orange": 28, "yellow": 50, "green": 115, "blue": 215, "purple": 275, "pink": 335, "brown": 22}
"""The hue, in degrees, that a reader expects of a named colour."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    prior_groups.write_pictures(write_cut_outs(folder / "cut_outs"), folder / "data", SIZES)
    return folder / "data"


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return read_rows(data / f"{name}.jsonl")


def degrees(picture: np.ndarray) -> float:
    """The median hue of the pixels that are not grey, by the standard library."""
    hues = [(hue, saturation) for hue, saturation, _ in (colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in picture.reshape(-1, 3))]
    turned = [360 * hue for hue, saturation in hues if saturation > 0.3]
    return float(np.median([hue if hue < 350 else hue - 360 for hue in turned]))


def test_a_recoloured_picture_has_the_hue_of_its_name_and_nothing_else_changes(data):
    seen = Counter[str]()
    for row in rows(data, "train") + rows(data, "test"):
        if row["edits"][0]["type"] != "colour":
            continue
        before, after = (np.asarray(Image.open(data / image["path"]).convert("RGB")).astype(int) for image in row["images"])
        for picture, colour, most in ((before, row["edits"][0]["from"], 22), (after, row["edits"][0]["to"], 12)):
            assert abs((degrees(picture) - ROUNDED[colour] + 180) % 360 - 180) < most, (row["id"], colour)
            seen[colour] += 1
        grey = np.ptp(before, axis=-1) == 0
        assert np.abs(before - after)[grey].max() <= 4, "the ground, and what has no colour"
        assert (np.ptp(after, axis=-1) == 0).mean() == pytest.approx(grey.mean(), abs=0.03), "the same shape"
    assert len(seen) == len(ROUNDED) and min(seen.values()) > 1


def test_copies_are_what_the_texts_say(data):
    """Counted by the pixels that are not of the ground, which is the colour of the corner that stays free, or of most."""
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for row in rows(data, "train"):
        edit = row["edits"][0]
        pictures = [np.asarray(Image.open(data / image["path"]).convert("RGB")).astype(int) for image in row["images"]]
        shown = []
        for picture in pictures:
            ground = Counter(map(tuple, picture.reshape(-1, 3))).most_common(1)[0][0]
            there = np.abs(picture - np.array(ground)).sum(-1) > 12
            shown.append([int(part.sum() > 60) for half in np.array_split(there, 2) for part in np.array_split(half, 2, axis=1)])
        if edit["type"] == "count":
            assert [sum(each) for each in shown] == [1, numbers[edit["to"]]], row["id"]
            (first,) = [at for at, seen in enumerate(shown[0]) if seen]
            rows_, columns = (slice(30 * half, 30 * half + 30) for half in divmod(first, 2))
            assert (pictures[0][rows_, columns] == pictures[1][rows_, columns]).all(), "the first copy stays"


def test_held_out_things_are_in_no_counterfactual_of_training(data):
    things = read_json(data / "things.json")
    held_out = {name for name, each in things.items() if each["held_out"]}
    assert 3 <= len(held_out) < len(SHOWN) / 2 and things.keys() == SHOWN.keys()
    shown = {name: {thing for row in rows(data, name) for thing in row["meta"]["things"]} for name in (*SIZES, "names_new")}
    assert not held_out & (shown["train"] | shown["validation"] | shown["names"])
    assert not (shown["test"] | shown["yes_no"] | shown["names_new"]) - held_out
    assert held_out <= shown["natural"], "natural pictures have all of them"


def test_nothing_but_the_pictures_tells(data):
    """Each text is true once and false once; yes and no are the first answer about equally often, of what is usual too."""
    for name in ("train", "validation", "test", "yes_no", "names", "names_new"):
        for group in read_manifest(data / f"{name}.jsonl"):
            assert group.match == ((1, 0), (0, 1)) and len({candidate.prompt for candidate in group.candidates}) == 1 < len(
                {each.text for each in group.candidates}
            )
    for row in rows(data, "yes_no"):
        asked = f" {row['edits'][0]['from']}" in row["texts"][0]["prompt"]
        assert row["texts"][0]["text"] == ("yes" if asked else "no") and (asked or f" {row['edits'][0]['to']}" in row["texts"][0]["prompt"])
    answers = Counter((row["edits"][0]["type"], row["texts"][0]["text"]) for row in rows(data, "yes_no"))
    assert set(answers) == {(kind, answer) for kind in ("there", "colour") for answer in ("yes", "no")}
    assert all(count >= 4 for count in answers.values())
    kinds = Counter(row["edits"][0]["type"] for row in rows(data, "test"))
    assert kinds == {"colour": 12, "count": 12, "place": 12, "side": 12}
    usual = Counter(row["edits"][0]["from"] for row in rows(data, "test") + rows(data, "train") if row["edits"][0]["type"] == "side")
    assert min(usual["left"], usual["right"]) > 8, "no side is usual"


def test_the_pages_say_what_the_records_say(tmp_path):
    """Each table is the one that its command prints, of the runs that the command makes."""
    names = {f"{arm}-{rate}-seed{seed}" for (arm, rate), seeds in real_prior.SHOWN.items() for seed in range(seeds)}
    assert names == {name for name in real_prior.read_records(real_prior.RECORDS / real_prior.RUNS) if "-seed" in name}
    tried = {f"{arm}-{rate}-seed0" for arm, rates in real_prior.TRIED.items() for rate in rates}
    assert tried == real_prior.read_records(real_prior.RECORDS / real_prior.RATE_RUNS).keys()
    originals = [page.read_text() for page in real_prior.PAGES]
    copies = [tmp_path / page.name for page in real_prior.PAGES]
    for text, copy in zip(originals, copies, strict=True):
        copy.write_text(text.replace("| base |  |  | 9", "| base |  |  | 8"))
        assert copy.read_text() != text
    real_prior.renew_pages(copies, zip(real_prior.COMMANDS.values(), real_prior.tables(real_prior.RECORDS), strict=True))
    assert [copy.read_text() for copy in copies] == originals, "run --report"


def test_agree_and_conflict_are_the_two_comparisons_of_each_group(tmp_path):
    """By the package's own metrics of scores made by hand: four groups of a colour; three natural and one changed picture are right."""
    found = [[[-1, -2], [-2, -1]], [[-1, -2], [-1, -2]], [[-1, -2], [-1, -2]], [[-2, -1], [-1, -2]]]
    images, texts = ((Path("a"),), (Path("b"),)), (Candidate("?", "x"), Candidate("?", "y"))
    groups = [CounterfactualGroup(f"g{at}", images, texts, ((1, 0), (0, 1)), (Edit("colour", 1, 1),)) for at in range(4)]
    blank = torch.tensor([-1.0, -2.0])
    results = accuracies(groups, [GroupScores(torch.tensor(each, dtype=torch.float32), blank) for each in found])
    write_json(tmp_path / "results.json", {"test": [vars(row) for row in results]})
    colour = real_prior.accuracies(tmp_path / "results.json")["test"]["colour"]
    assert (colour["agree"], colour["conflict"], colour["group"]) == (75, 25, 25)
    assert (colour["blind_agree"], colour["blind_conflict"]) == (100, 0)


def test_a_description_states_its_first_colour_or_number():
    """Two groups a kind: of four changed pictures one text is right, two state what is usual, and one states nothing."""
    edits = [("colour", "yellow", "blue"), ("colour", "red", "green"), ("count", "one", "three"), ("count", "one", "two")]
    rows = [
        {"edits": [{"type": kind, "from": usual, "to": changed}], "images": [{"path": f"{n}a"}, {"path": f"{n}b"}]}
        for n, (kind, usual, changed) in enumerate(edits)
    ]
    texts = {"0a": "a Yellow banana", "0b": "a blue or yellow banana", "1a": "a purple rose, not red", "1b": "red rose"}
    texts |= {"2a": "a castle", "2b": "an old castle", "3a": "One cat", "3b": "cats"}
    found = real_prior.statements(rows, texts)
    assert found == {"colour": {"agree": 100, "conflict": 50, "habit": 50}, "count": {"agree": 100, "conflict": 0, "habit": 50}}
