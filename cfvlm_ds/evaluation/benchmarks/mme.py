"""MME (Fu et al. 2023, arXiv 2306.13394): fourteen tasks, two yes/no questions on each picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import MIB, read_bytes
from cfvlm_ds.evaluation.benchmarks.base import YES_NO, Benchmark, File, Item, Judged, Published, Values, one_hot
from cfvlm_ds.evaluation.benchmarks.metrics import accuracy, grouped, tag, together
from cfvlm_ds.evaluation.benchmarks.source import Source

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ENDINGS = (".jpg", ".png", ".jpeg")
TOTAL = 2374


def items(source: Source) -> Iterator[Item | DataError]:
    count = 0
    for task in (*PERCEPTION, *COGNITION):
        folder = source.root / task
        questions, pictures = folder / "questions_answers_YN", folder / "images"
        if not (questions.is_dir() and pictures.is_dir()):
            questions = pictures = folder  # smaller tasks have both in one folder
        files = sorted(questions.glob("*.txt"))
        if not files:
            yield DataError(f"{folder}: no .txt file with questions; docs/benchmarks says where the files are and where they belong")
        for path in files:
            for found in _of_picture(source, task, path, pictures):
                count += not isinstance(found, DataError)
                yield found
    if count and count != TOTAL:
        source.notes.append(f"{source.root} has {count} questions, and the official release {TOTAL}: another revision")


def _of_picture(source: Source, task: str, path: Path, pictures: Path) -> Iterator[Item | DataError]:
    picture = next((each for ending in ENDINGS if (each := pictures / f"{path.stem}{ending}").is_file()), pictures / f"{path.stem}.jpg")
    if not picture.is_file():
        source.absent[picture] = DataError(f"{path}: no picture {picture} or .png; put it there")
    try:
        lines = [line for line in read_bytes(path, MIB).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        yield DataError(f"{path}: cannot be read ({error}); get the official file again")
        return
    for number, line in enumerate(lines, 1):
        question, separator, answer = line.rpartition("\t")
        gold = [text.lower() for text in YES_NO].index(said) if (said := answer.strip().lower()) in ("yes", "no") else None
        if not separator or gold is None or not question.strip():
            yield DataError(f"{path}:{number}: a line must be a question, a tab, and Yes or No, not {line!r}; get the official file again")
            continue
        marks = {"task": task, "picture": f"{task}/{path.stem}"}
        yield Item(
            f"{task}/{path.stem}/{number}",
            ((picture,),),
            YES_NO,
            (one_hot(gold, 2),),
            question.strip(),
            tags=marks,
            cluster=marks["picture"],
        )


def metrics(table: Sequence[Judged]) -> Values:
    """Of each task the accuracy plus that of pictures with both answers right, at most 200; their sums, at most 2,000 and 800, where no
    task is absent."""
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
    files=tuple(File(f"{task}/*.txt") for task in (*PERCEPTION, *COGNITION)),
    licence="research only, on request",
    items=items,
    metrics=metrics,
    headline="perception",
    probes=("yes_no", "generate"),
    published=(
        Published("perception", "LLaVA-1.5-7B", 1510.7, "haotian-liu/LLaVA, MODEL_ZOO"),
        Published("perception", "LLaVA-1.5-13B", 1531.3, "haotian-liu/LLaVA, MODEL_ZOO"),
    ),
    traps=(
        "scores are sums up to 2,000 and 800, and random answers have 750 and 300",
        "the questions contain their instruction; nothing is added",
    ),
)
