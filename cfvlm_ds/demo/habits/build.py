"""World with habits, written as a folder of ``cfgroup/1`` manifests. The pictures of each split are in an uncompressed tar file.

A habit is a usual attribute of a kind of thing, such as green for trees. In ``train`` and ``validation``, each thing in the first picture
follows each of its habits with probability ``strength`` (default 0.96). The test sets are balanced between two values of ``meta.habit``. In
"agrees" rows, no picture breaks a habit. In "contradicts" rows, every thing in the first picture breaks all of its habits, and the edit
changes the set of broken habits or an unusual value.

The prompts of ``test_agrees``, ``test_contradicts`` and ``test_combo`` ask for descriptions. In each first picture of ``test_combo``, one
thing has a colour that its kind never has in training. The other test sets ask questions. The folders ``pope`` (questions in POPE's format)
and ``habits`` (scenes to describe) are benchmarks on the first pictures of ``test_agrees`` and ``test_contradicts``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from cfvlm_ds.core.config import HabitsConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.groups import SHAM, Candidate, CounterfactualGroup, Edit, Prompt
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.data.picture_file import part_name, tar_member
from cfvlm_ds.demo.habits.edits import EDITS
from cfvlm_ds.demo.habits.grammar import describe, difference, judge, key, true_keys
from cfvlm_ds.demo.habits.pope import write_pope
from cfvlm_ds.demo.habits.questions import DESCRIBE, QUESTIONS, Asked, asking
from cfvlm_ds.demo.habits.render import render
from cfvlm_ds.demo.habits.world import Scene, draw_scene, scene_from, spelled
from cfvlm_ds.demo.habits.writing import NAME, write_scenes

SOURCE = "habits"
_DESCRIBED = ("test_agrees", "test_contradicts")
TESTS = (*_DESCRIBED, "test_combo", "test_yes_no_agrees", "test_yes_no_contradicts", "test_choice", "test_count", "test_colour")
"""Test sets. If a name contains "agrees" or "contradicts", all rows of the set are of this kind. In other sets, the two kinds alternate."""
SPLITS = ("train", "validation", *TESTS)
GENERATOR = 4
"""Version of the generator. Increment it when the same settings would give different data, so that older folders are not reused."""
_MAX_DRAWS = 20_000


@dataclass(frozen=True)
class Drawn:
    """A group before it is written: its scenes (the factual scene, the edited scenes and, in evaluation sets, a sham), the edit types, the
    texts, and the truth table ``match``, indexed by scene and text.

    If the group has descriptions, the first texts describe the factual scene and the edited scenes, and ``keys`` holds the keys of these
    texts (see ``grammar.key``). All other texts are answers to questions.
    """

    scenes: tuple[Scene, ...]
    edits: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    match: list[list[int]]
    keys: tuple[str, ...]

    @property
    def habit(self) -> str:
        """``agrees`` if no scene breaks a habit, else ``contradicts``."""
        return "contradicts" if any(scene.broken for scene in self.scenes) else "agrees"


def build_habits(config: HabitsConfig, progress: Say = print_line, alive: Alive = no_op) -> Path:
    """Write the manifests, ``images/``, ``pope/``, ``habits/`` and ``habits.json`` to ``config.out_dir`` unless they exist. Return the
    folder.

    The folder is built under a temporary name and renamed when it is complete. Two processes must not build a folder at the same time.
    ``alive`` is called for every group, so that waiting processes do not time out. Raises DataError if settings are incompatible or
    the folder contains other files. Ranges are checked where options are parsed.
    """
    if config.text_bias and config.num_counterfactuals:
        raise DataError("habits: text_bias needs num_counterfactuals: 0, because texts about edited pictures must be exact")
    if config.num_counterfactuals > len(EDITS):
        raise DataError(f"habits: num_counterfactuals must be at most {len(EDITS)}, because the edits of a group differ in type")
    out = Path(config.out_dir).resolve()
    settings = {"generator": GENERATOR} | {name: value for name, value in asdict(config).items() if name != "out_dir"}
    if _is_built(out, settings):
        return out
    sizes = {split: config.num_train if split == "train" else config.num_test for split in SPLITS}
    shown = Progress(progress, "world with habits", sum(sizes.values()), "groups")
    anchors = list[tuple[str, Scene, bytes]]()
    with whole_folder(out) as folder:
        (folder / "images").mkdir()
        for split, size in sizes.items():
            images = folder / "images" / f"{split}.tar"
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as manifest, open(images, "wb") as tar:
                for index in range(size):
                    alive()
                    drawn, group_id = draw_group(config, split, index), f"{split}-{index:06d}"
                    paths = []
                    for i, scene in enumerate(drawn.scenes):
                        content, name = png(scene), f"{group_id}-{i}.png"
                        paths.append(images.with_name(part_name(images.name, tar.tell() + tarfile.BLOCKSIZE, len(content))))
                        tar.write(tar_member(name, content))
                        if split in _DESCRIBED and i == 0:
                            anchors.append((name, scene, content))
                    meta = {"habit": drawn.habit, "scenes": [spelled(scene) for scene in drawn.scenes]}
                    row = to_row(as_group(drawn, group_id, paths), folder, meta)
                    manifest.write(json.dumps(row, ensure_ascii=False) + "\n")
                    shown.advance()
                tar.write(bytes(2 * tarfile.BLOCKSIZE))
        write_pope(folder / "pope", anchors, config.seed)
        write_scenes(folder / NAME, anchors)
        (folder / "habits.json").write_text(json.dumps({"settings": settings}, indent=2) + "\n", encoding="utf-8")
    progress(f"world with habits: {sum(sizes.values())} groups in {out}")
    return out


def png(scene: Scene) -> bytes:
    """Render a scene, and return the picture as PNG bytes."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def scenes_in(meta: Mapping[str, Any]) -> list[Scene]:
    """Return the scenes of a row's pictures from the row's metadata, which does not include the jitter."""
    return [scene_from(values) for values in meta["scenes"]]


def is_true(text: str, row: Mapping[str, Any]) -> bool | None:
    """Return whether a text is true of a row's first picture, or None if the text is empty or a sentence is outside the grammar. Used by
    `data sample --judge`.
    """
    verdict = judge(text, scenes_in(row["meta"])[0])
    return None if verdict.unparsed or not verdict.statements else all(verdict.statements.values())


def _is_built(out: Path, settings: Mapping[str, object]) -> bool:
    record = out / "habits.json"
    if record.exists():
        if (found := read_json(record).get("settings")) != settings:
            raise DataError(f"{out} contains a world with other settings ({found}); choose another out_dir or delete the folder")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and was not made by build_habits; choose another out_dir")
    return False


def draw_group(config: HabitsConfig, split: str, index: int) -> Drawn:
    """Draw group ``index`` of a split. The result does not depend on ``config.out_dir`` or the number of groups.

    Outside ``train``, groups cycle through the edit types. Raises DataError if no scene allows the edits.
    """
    rng, held_out, mixed = Random(f"{config.seed}/{split}/{index}"), split == "test_combo", not split.endswith(("_agrees", "_contradicts"))
    agrees = split.endswith("_agrees") or (mixed and index % 2 == 0)
    if split == "train":
        drawn_by = {kind: rng.random() for kind in EDITS}
        edits = sorted(EDITS, key=drawn_by.__getitem__, reverse=True)[: config.num_counterfactuals]
    else:
        turns = QUESTIONS.get(question_of(split), tuple(EDITS))
        edits = [turns[(index // 2 if mixed else index) % len(turns)]]
    for _ in range(_MAX_DRAWS):
        anchor = draw_scene(rng, float(agrees) if split in TESTS else config.strength, held_out)
        edited = [scene for kind in edits if (scene := EDITS[kind](anchor, rng, held_out)) is not None]
        if len(edited) < len(edits):
            continue
        if split in TESTS:
            # "agrees" rows break no habit; in "contradicts" rows, the first scene breaks habits and the edit changes which, or how
            first, second = anchor.broken, edited[0].broken
            if (first or second) if agrees else (not first or first == second):
                continue
        sham = [] if split == "train" else [replace(anchor, seed=rng.getrandbits(32))]
        if drawn := _with_texts(config, split, (anchor, *edited, *sham), tuple(edits), rng):
            return drawn
    raise DataError(f"habits: no scene allows the edits {', '.join(edits)} together; lower num_counterfactuals")


def question_of(split: str) -> str:
    """Return the kind of question that a split asks. The result is not in ``QUESTIONS`` if the split asks for descriptions."""
    return split.removeprefix("test_").removesuffix("_agrees").removesuffix("_contradicts")


def _with_texts(config: HabitsConfig, split: str, scenes: tuple[Scene, ...], edits: tuple[str, ...], rng: Random) -> Drawn | None:
    """Add descriptions, questions or both to scenes. Return None if the question or the descriptions cannot distinguish the scenes."""
    pictures, question = scenes, question_of(split)
    if split == "train" and config.text_bias:
        scenes = (scenes[0].as_usual(config.text_bias, rng),)
    if question in QUESTIONS:
        asked = _asked(scenes, edits, [question], 1, rng)
        return Drawn(scenes, edits, *asked[0], ()) if asked else None
    texts, prompt = describe(scenes[: 1 + len(edits)], str(rng.random())), rng.choice(DESCRIBE)
    candidates = tuple(Candidate(prompt, text) for text in texts)
    match = [[int(all(judge(text, scene).statements.values())) for text in texts] for scene in scenes] if edits else [[1]]
    if any(match[0][k] and match[k][0] for k in range(1, len(texts))):
        return None  # the caption does not mention what was edited
    kinds = ["yes_no", *QUESTIONS]  # yes/no counts twice, because most edit types change its answer
    for answers, truths in _asked(scenes, edits, kinds, config.num_questions, rng) if split == "train" else ():
        candidates += answers
        match = [line + more for line, more in zip(match, truths, strict=True)]
    return Drawn(pictures, edits, candidates, match, tuple(key(scene.things) for scene in scenes[: len(texts)]))


def _asked(scenes: tuple[Scene, ...], edits: tuple[str, ...], kinds: list[str], number: int, rng: Random) -> list[Asked]:
    """Build up to ``number`` different questions about the group's first edit, or about new edits if it has none."""
    asked = dict[Prompt, Asked]()
    for _ in range(4 * number):
        if len(asked) == number:
            break
        kind = rng.choice(kinds)
        edit = edits[0] if edits else rng.choice(QUESTIONS[kind])
        other = None if edits else EDITS[edit](scenes[0], rng, False)
        shown = (*scenes, other) if other else scenes
        if edit not in QUESTIONS[kind] or len(shown) == 1:
            continue
        if found := asking(kind, edit, shown, rng):
            asked.setdefault(found[0][0].prompt, (found[0], found[1][: len(scenes)]))
    return list(asked.values())


def as_group(drawn: Drawn, group_id: str, images: Sequence[Path]) -> CounterfactualGroup:
    """Convert a drawn group to a ``CounterfactualGroup`` with the pictures ``images``."""
    texts = [candidate.text for candidate in drawn.candidates]
    edits = []
    for k, kind in enumerate(drawn.edits, start=1):
        own = k if k < (len(drawn.keys) or 2) else None  # a question has two answers
        edits.append(Edit(kind, k, own, *difference(texts[0], texts[k])))
    edits += [Edit(SHAM, image=i) for i in range(1 + len(drawn.edits), len(images))]
    return CounterfactualGroup(
        group_id,
        tuple((image,) for image in images),
        drawn.candidates,
        tuple(map(tuple, drawn.match)),
        tuple(edits),
        source=SOURCE,
        keys=(*drawn.keys, *[""] * (len(texts) - len(drawn.keys))) if drawn.keys else (),
        exclude=tuple(sorted({*drawn.keys}.union(*map(true_keys, drawn.scenes)))) if drawn.keys else (),
    )
