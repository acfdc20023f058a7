"""Scenes as an ordinary folder of ``cfgroup/1`` manifests and PNG files, in the same form as real data.

Splits: ``train``, ``validation`` and ``test_iid`` (planted correlation 90 %), ``test_corr50`` and ``test_corr10`` (the same at 50 % and 10
%), all without held-out combinations, and ``test_combo`` (50 %; the factual scene of every group has a held-out combination). The groups of
``test_yes_no``, ``test_choice`` and ``test_count`` ask questions about scenes like those of ``test_combo``. A share of the training groups
asks questions as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import ImageChops

from cfvlm_ds.core.config import ScenesConfig
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.groups import SHAM, CounterfactualGroup, Edit
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.data.cfgroup import to_row
from cfvlm_ds.demo.scenes.edits import EDITS
from cfvlm_ds.demo.scenes.grammar import PHRASINGS, describe, difference
from cfvlm_ds.demo.scenes.questions import QUESTIONS, asking, describing
from cfvlm_ds.demo.scenes.render import render
from cfvlm_ds.demo.scenes.world import GRID, Rule, Scene, draw_plan, draw_scene, shake

SOURCE = "scenes"
RULES = {
    "train": Rule(0.9),
    "test_iid": Rule(0.9),
    "test_combo": Rule(0.5, held_out="must"),
    "test_corr50": Rule(0.5),
    "test_corr10": Rule(0.1),
    "test_yes_no": Rule(0.5, held_out="must"),
    "test_choice": Rule(0.5, held_out="must"),
    "test_count": Rule(0.5, held_out="must"),
    "validation": Rule(0.9),
}
GENERATOR = 5
"""Version of the generator. It is incremented whenever the same settings would produce other data, so older folders are not reused."""

_MIN_CHANGED = 24  # pixels of a 48 x 48 image that an edit must change visibly, scaled with the area
_VISIBLE = 24  # smallest visible change, in levels of grey
_MAX_DRAWS = 2000  # one in seven scenes allows the rarest edit, one in forty the two rarest together


@dataclass(frozen=True)
class SceneGroup:
    """A group before it is written: ``scenes`` are the anchor and its K edited scenes, ``edits`` the types of the K edits.

    All captions have the same ``phrasing``. ``question`` is one of QUESTIONS, or "" if the image is described, and ``wording`` is the seed
    of the question's wording.
    """

    scenes: tuple[Scene, ...]
    edits: tuple[str, ...]
    sham: Scene | None
    phrasing: int
    a_first: bool
    question: str
    wording: str

    @property
    def pictured(self) -> tuple[Scene, ...]:
        """Scenes that get an image, in the group's image order."""
        return self.scenes if self.sham is None else (*self.scenes, self.sham)


def build_scenes(config: ScenesConfig, progress: Callable[[str], object] = print_line, alive: Callable[[], object] = lambda: None) -> Path:
    """Write the manifests, ``images/`` and ``scenes.json`` to ``config.out_dir`` unless they exist, and return that folder.

    The folder is built under another name and renamed when it is complete. Only one process at a time may build a folder. Raises DataError
    for settings that cannot be built, or if the folder contains something else. ``alive`` is called for every group.
    """
    _check(config)
    out = Path(config.out_dir).resolve()
    settings = settings_of(config)
    if is_complete(out, settings):
        return out
    sizes = {split: config.num_train if split == "train" else config.num_test for split in RULES}
    shown = Progress(progress, "scenes", sum(sizes.values()), "groups")
    with whole_folder(out) as folder:
        for split, size in sizes.items():
            (folder / "images" / split).mkdir(parents=True)
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as manifest:
                for index in range(size):
                    alive()
                    drawn, group_id = draw_group(config, split, index), f"{split}-{index:05d}"
                    paths = tuple(folder / "images" / split / f"{group_id}-{i}.png" for i in range(len(drawn.pictured)))
                    for path, scene in zip(paths, drawn.pictured, strict=True):
                        render(scene, config.image_size).save(path, compress_level=1)
                    group = as_group(drawn, group_id, paths)
                    if drawn.question and split == "train":
                        group = replace(group, weight=config.question_weight)
                    manifest.write(json.dumps(to_row(group, folder), ensure_ascii=False) + "\n")
                    shown.advance()
        (folder / "scenes.json").write_text(json.dumps({"settings": settings}, indent=2) + "\n", encoding="utf-8")
    progress(f"scenes: {sum(sizes.values())} groups in {out}")
    return out


def _check(config: ScenesConfig) -> None:
    if config.num_train < 1 or config.num_test < 1 or config.num_counterfactuals < 1:
        raise DataError("scenes: num_train, num_test and num_counterfactuals must be at least 1")
    if config.image_size < GRID:
        raise DataError(f"scenes: image_size must be at least {GRID}, or things cannot be distinguished, but is {config.image_size}")
    for name in ("sham_share", "question_share"):
        if not 0 <= (share := getattr(config, name)) <= 1:
            raise DataError(f"scenes: {name} must be between 0 and 1, not {share}")
    if not 0 < config.question_weight < float("inf"):
        raise DataError(f"scenes: question_weight must be a positive number, not {config.question_weight}")
    weights = config.edit_weights
    if weights is not None and (set(weights) - set(EDITS) or any(w < 0 for w in weights.values()) or not sum(weights.values())):
        raise DataError(f"scenes: edit_weights must be non-negative and not all 0; the types are {', '.join(EDITS)}")


def draw_group(config: ScenesConfig, split: str, index: int) -> SceneGroup:
    """Draw group ``index`` of a split. It depends only on the arguments, but not on ``out_dir`` or the number of groups.

    The type of the first edit is drawn before the scene (in tests, types take turns), so types that rarely apply are as frequent as others.
    The types of the other edits are drawn from those that apply. Raises DataError if no scene allows that many edits of the weighted types.
    """
    rng, rule = Random(f"{config.seed}/{split}/{index}"), RULES[split]
    test = split != "train"
    weights = dict.fromkeys(EDITS, 1.0) if test or config.edit_weights is None else {k: config.edit_weights.get(k, 0.0) for k in EDITS}
    first = list(EDITS)[index % len(EDITS)] if test else rng.choices(list(weights), list(weights.values()))[0]
    first = "count" if split == "test_count" else first
    num_edits = 1 if test else config.num_counterfactuals
    plan = draw_plan(rng, rule)
    may_hold_out = rule.held_out != "never"
    for _ in range(_MAX_DRAWS):
        anchor = draw_scene(rng, rule, plan)
        edits = _draw_edits(rng, anchor, first, num_edits, weights, may_hold_out, config.image_size)
        if edits is not None:
            break
    else:
        raise DataError(
            f"scenes: no scene allows {num_edits} different edits of these types; lower num_counterfactuals or weight more types"
        )
    sham = shake(anchor, rng) if test or rng.random() < config.sham_share else None
    scenes = (anchor, *(scene for _, scene in edits))
    phrasing, a_first = rng.randrange(len(PHRASINGS)), rng.random() < 0.5
    # Questions have a separate generator, so the scenes and captions of a seed do not depend on them.
    wording = f"{config.seed}/{split}/{index}/asked"
    question = split.removeprefix("test_")
    if question not in QUESTIONS:
        asked = Random(f"{wording}/kind")
        is_asked = not test and asked.random() < config.question_share
        question = asked.choice([kind for kind in QUESTIONS if kind != "count" or first == "count"]) if is_asked else ""
    return SceneGroup(scenes, tuple(kind for kind, _ in edits), sham, phrasing, a_first, question, wording)


def as_group(drawn: SceneGroup, group_id: str, images: tuple[Path, ...]) -> CounterfactualGroup:
    """Build the group with its truth table, which is computed from the scene graphs."""
    rng = Random(drawn.wording)
    if drawn.question:
        texts = asking(drawn.question, drawn.pictured, drawn.phrasing, drawn.a_first, rng)
    else:
        texts = describing(drawn.pictured, len(drawn.scenes), drawn.phrasing, drawn.a_first, rng)
    claims = [describe(scene, drawn.a_first) for scene in drawn.scenes]
    edits = []
    for k, kind in enumerate(drawn.edits, start=1):
        own = k if k < len(texts.candidates) else None  # a question has two answers, whatever the number of scenes
        before, after = difference(claims[0], claims[k], drawn.phrasing)
        edits.append(Edit(kind, image=k, text=own, source=before, target=after))
    if drawn.sham is not None:
        edits.append(Edit(SHAM, image=len(drawn.scenes)))
    pictures = tuple((image,) for image in images)
    group = CounterfactualGroup(group_id, pictures, texts.candidates, texts.match, tuple(edits), source=SOURCE)
    return replace(group, keys=texts.keys, exclude=texts.exclude)


def _is_visible(before: Scene, after: Scene, image_size: int) -> bool:
    grey = ImageChops.difference(render(before, image_size), render(after, image_size)).convert("L")
    return sum(grey.histogram()[_VISIBLE:]) >= _MIN_CHANGED * image_size**2 // GRID**2


def _draw_edits(
    rng: Random, anchor: Scene, first: str, num_edits: int, weights: Mapping[str, float], may_hold_out: bool, image_size: int
) -> list[tuple[str, Scene]] | None:
    """Draw ``num_edits`` different visible edits, of different types if possible; None if the anchor does not allow them."""
    edits: list[tuple[str, Scene]] = []
    queue = [first]
    for _ in range(len(EDITS) * num_edits):
        queue = queue or _shuffled(rng, weights)
        kind = queue.pop(0)
        scene = EDITS[kind](anchor, rng, may_hold_out)
        if scene is None or not _is_visible(anchor, scene, image_size):
            if not edits:
                return None  # the first type is required: draw another scene
        elif all(describe(scene, True) != describe(other, True) for _, other in edits):
            edits.append((kind, scene))
        if len(edits) == num_edits:
            return edits
    return None


def _shuffled(rng: Random, weights: Mapping[str, float]) -> list[str]:
    """Shuffle the types with a positive weight; heavier ones tend to come earlier."""
    left = {kind: weight for kind, weight in weights.items() if weight > 0}
    order = []
    while left:
        order.append(rng.choices(list(left), list(left.values()))[0])
        del left[order[-1]]
    return order


def settings_of(config: ScenesConfig) -> dict[str, object]:
    return {"generator": GENERATOR} | {key: value for key, value in asdict(config).items() if key != "out_dir"}


def config_in(out: Path) -> ScenesConfig | None:
    """Read the settings of the scenes in a folder, or return None if there are none. Raises DataError if another revision drew them."""
    settings = _recorded(out)
    if settings and settings.pop("generator") != GENERATOR:
        raise DataError(f"{out} contains scenes from another revision; draw them again in another folder")
    return ScenesConfig(str(out), **settings) if settings else None


def is_complete(out: Path, settings: dict[str, object]) -> bool:
    """Return True if the folder has these scenes, False if it is empty or missing. Raises DataError if it contains anything else."""
    if recorded := _recorded(out):
        if recorded != settings:
            raise DataError(f"{out} contains scenes with other settings ({recorded}); choose another out_dir or delete the folder")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and was not made by build_scenes; choose another out_dir")
    return False


def _recorded(out: Path) -> dict[str, Any]:
    """Read the settings in a folder of scenes, with the version of the generator that drew them; {} if the folder has no scenes."""
    record = out / "scenes.json"
    if not record.exists():
        return {}
    try:
        return {"generator": None} | read_json(record)["settings"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{record}: not settings of scenes ({type(error).__name__}: {error}); draw them again in another folder") from error
