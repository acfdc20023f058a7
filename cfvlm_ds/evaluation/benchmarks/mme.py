"""MME (Fu et al. 2023, arXiv 2306.13394): fourteen tasks with two yes/no questions per picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Row, Values, single
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, tag, together

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ENDINGS = (".jpg", ".png", ".jpeg")


def item(row: Row) -> Item:
    stem = PurePosixPath(row.file).stem
    folder = row.source.root / row.part / "images"  # smaller tasks keep pictures and questions in one folder
    folder = folder if folder.is_dir() else folder.parent
    name = next((file for ending in ENDINGS if (folder / (file := f"{stem}{ending}")).is_file()), f"{stem}.jpg")
    picture = f"{row.part}/{stem}"
    return single(
        f"{picture}/{row.number}",
        row.picture(name, folder.relative_to(row.source.root).as_posix()),
        YES_NO,
        picture,
        row.truth("answer", YES_NO),
        row.text("question"),
        task=row.part,
        picture=picture,
    )


def metrics(table: Sequence[Judged]) -> Values:
    """Return the score of each task (accuracy plus the percentage of pictures with both answers correct, at most 200), and sums of these
    scores.

    The sums are at most 2,000 for perception and 800 for cognition. A sum is left out if any of its tasks is missing.
    """
    if not table:
        return {}
    scores = {}
    for task, members in grouped(table, tag("task")).items():
        scores[task] = accuracy(members)["accuracy"] + (together(members, tag("picture")) or 0.0)
    parts = {"total": (*PERCEPTION, *COGNITION), "perception": PERCEPTION, "cognition": COGNITION}
    sums = {name: sum(scores[task] for task in tasks) for name, tasks in parts.items() if all(task in scores for task in tasks)}
    return {**sums, **{f"score/{task}": value for task, value in scores.items()}, **accuracy(table)}


MME = Benchmark(
    title="MME",
    files=tuple(File(f"{task}/**/*.txt", ("question", "answer"), part=task) for task in (*PERCEPTION, *COGNITION)),
    item=item,
    metrics=metrics,
    headline="perception",
    probes=("yes_no", "generate"),
    total=2374,
)
