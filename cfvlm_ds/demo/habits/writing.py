"""Benchmark of scene descriptions: the share of false statements in a model's descriptions, and the share of the scenes' things that they
mention.

The grammar's judge reads every sentence. ``hallucinated`` is the share of false statements. ``chair_i`` is the share of mentioned things
that are absent, and ``chair_s`` is the share of texts that mention an absent thing (CHAIR, arXiv 1809.02156). ``covered`` is the share of
the scenes' things that are mentioned. Compare ``covered`` as well, because an empty text contains no false statement. ``unparsed`` is the
share of sentences outside the grammar. METRIC/agrees is computed on scenes that follow all habits, and METRIC/contradicts on all other
scenes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cfvlm_ds.demo.habits.grammar import judge
from cfvlm_ds.demo.habits.questions import DESCRIBE
from cfvlm_ds.demo.habits.world import Scene, scene_from, spelled
from cfvlm_ds.evaluation.benchmarks import BENCHMARKS
from cfvlm_ds.evaluation.benchmarks.base import Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.descriptions import share
from cfvlm_ds.evaluation.benchmarks.metrics import by

NAME = "habits"
SCENES = File("scenes.jsonl")
_COUNTED = (
    "a true statement", "a false statement", "a thing that is there", "an absent thing", "a sentence", "a sentence outside the grammar",
)  # fmt: skip
"""Names of the values that ``counts`` returns."""


def write_scenes(folder: Path, pictures: Sequence[tuple[str, Scene, bytes]]) -> None:
    """Write the benchmark's file, with one line per picture. The pictures are in the POPE folder next to it."""
    folder.mkdir()
    rows = [{"image": name, "scene": spelled(scene), "habit": "contradicts" if scene.broken else "agrees"} for name, scene, _ in pictures]
    (folder / SCENES.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def item(row: Row) -> Item:
    """Build a benchmark item from a row. The item's texts are the names in ``_COUNTED``."""
    scene = scene_from(row["scene"])
    tags = {"habit": row.text("habit"), "scene": json.dumps(row["scene"]), "things": str(len(scene.things))}
    picture = row.picture(row["image"], "../pope/val2014")
    return single(row.number, picture, _COUNTED, str(row["image"]), (1, 0, 1, 0, 1, 0), DESCRIBE[0], **tags)


def counts(text: str, item: Item) -> tuple[float, ...]:
    """Return the counts named in ``_COUNTED`` for a generated text. A repeated statement counts once."""
    verdict = judge(text, scene_from(json.loads(item.tags["scene"])))
    true, there = sum(verdict.statements.values()), len(verdict.mentioned & verdict.present)
    false, absent = len(verdict.statements) - true, len(verdict.mentioned) - there
    return tuple(map(float, (true, false, there, absent, verdict.sentences, len(verdict.unparsed))))


def metrics(table: Sequence[Judged]) -> Values:
    """Return the metrics in % (see the module's docstring), pooled over all generated texts; {} if there are none."""
    if not table:
        return {}
    true, false, there, absent, sentences, unparsed = (sum(column) for column in zip(*(each.scores[0] for each in table), strict=True))
    return {
        "hallucinated": share(false, true + false),
        "covered": share(there, sum(int(each.item.tags["things"]) for each in table)),
        "unparsed": share(unparsed, sentences),
        "chair_i": share(absent, there + absent),
        "chair_s": share(sum(each.scores[0][3] > 0 for each in table), len(table)),
    }


WRITING = Benchmark(
    title="Descriptions of the world with habits",
    files=(SCENES,),
    item=item,
    metrics=by("habit", metrics),
    headline="hallucinated",
    beside="covered",
    probes=("write",),
    mentions=counts,
)


def register() -> None:
    """Add the benchmark to ``BENCHMARKS``."""
    BENCHMARKS[NAME] = WRITING
