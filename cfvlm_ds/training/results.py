"""Results of a run: the exported model, tables, scores and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.conversation import readable
from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import replace, write_if_possible
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.data import open_image
from cfvlm_ds.data.identity import Identity
from cfvlm_ds.data.stored_scores import write_scores
from cfvlm_ds.evaluation import UNLABELLED, Accuracy, GroupScores, changes, table
from cfvlm_ds.evaluation.suite.results import Result
from cfvlm_ds.evaluation.suite.tables import markdown
from cfvlm_ds.export import export_adapter, export_hf
from cfvlm_ds.export.folder import CARD, refuse_others_model, refuse_replacing, write_card
from cfvlm_ds.models import only_adapters_train
from cfvlm_ds.tracking.figures import learning_curves_figure, score_matrix_figure
from cfvlm_ds.training.card import card_of
from cfvlm_ds.training.evaluator import Splits

Say = Callable[[str], object]
START = "results_start.json"
"""File of the accuracies before the first step."""


def export_checkpoint(config: RunConfig, checkpoint: Path, say: Say, alive: Callable[[], object]) -> None:
    """Export a checkpoint as a Hugging Face folder, or as adapters if only adapters are trained. ``alive`` is called meanwhile."""
    model, (folder, _) = config.model, _exported(config)
    card = card_of(checkpoint, say, adapter=only_adapters_train(model))
    if only_adapters_train(model):
        exported = export_adapter(checkpoint, model.name_or_path, folder, model.lora, say, alive, card)
    else:
        exported = export_hf(checkpoint, model.name_or_path, folder, say, model.lora, alive, card)
    say(f"exported to {exported}")


def complete_card(config: RunConfig, checkpoint: Path, say: Say) -> None:
    """Add the results of the evaluation, which follows the export, to the export's card."""
    folder, marker = _exported(config)
    card = card_of(checkpoint, say, adapter=only_adapters_train(config.model), evaluated=True)
    try:
        if card is not None and (folder / marker).is_file() and not write_card(folder, card):
            say(f"warning: {folder / CARD} was not written by this package, and stays as it is")
    except OSError as error:
        say(f"warning: {unwritten(folder / CARD, error)}; the export is whole without the results in it")


def refuse_export(config: RunConfig) -> None:
    """Raise ConfigError if the export could not be written to its folder after the training."""
    if config.train.export:
        folder, marker = _exported(config)
        remedy = "choose another train.output_dir, or set train.export to false"
        refuse_replacing(folder, marker, [Path(config.model.name_or_path).resolve()], remedy)
        refuse_others_model(folder, remedy)


def _exported(config: RunConfig) -> tuple[Path, str]:
    """Return the folder of a run's export and the file that marks an export."""
    name, marker = ("adapter", "adapter_config.json") if only_adapters_train(config.model) else ("export", "config.json")
    return Path(config.train.output_dir) / name, marker


def write_results(
    config: RunConfig,
    splits: Splits,
    results: Mapping[str, Sequence[Accuracy]],
    scores: Mapping[str, Sequence[GroupScores]],
    identities: Mapping[str, Identity],
    benchmarks: Sequence[Result] = (),
) -> list[Path]:
    """Write results.md, results.json and the scores of every split into the run folder; return the first two paths.

    results.md also contains the results of ``benchmarks``. Raises StorageError on a full disk.
    """
    run_dir = Path(config.train.output_dir)
    path = tables = run_dir / "results.md"
    try:
        replace(path, (text_of(run_dir, results, benchmarks) + "\n").encode())
        path = rows = run_dir / "results.json"
        replace(path, json.dumps({name: [vars(row) for row in accuracies] for name, accuracies in results.items()}, indent=1).encode())
        (run_dir / "scores").mkdir(exist_ok=True)
        for split, groups in splits.items():
            stored = {group.id: score.stored() for group, score in zip(groups, scores[split], strict=True)}
            write_scores(path := run_dir / "scores" / f"{split}.jsonl", groups, stored, str(run_dir), identities[split])
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; the training is done: make room, and the same command evaluates again") from error
    return [tables, rows]


def write_start(run_dir: Path, results: Mapping[str, Sequence[Accuracy]] | None, say: Say) -> None:
    """Write the accuracies before the first step, which the tables at the end show; without any, delete those of an earlier run."""
    if results is None:
        (run_dir / START).unlink(missing_ok=True)
        return
    accuracies = {split: {row.name: row.metrics for row in rows} for split, rows in results.items()}
    write_if_possible(run_dir / START, json.dumps(accuracies, indent=1), say)


def text_of(run_dir: Path, results: Mapping[str, Sequence[Accuracy]], benchmarks: Sequence[Result] = ()) -> str:
    """Return the tables of a run: accuracies, the changes since its start if that was evaluated, and benchmarks."""
    parts = [
        *([table(results), _changed(run_dir / START, results)] if results or not benchmarks else []),
        *([markdown(benchmarks)] if benchmarks else []),
    ]
    return "\n\n".join(part for part in parts if part)


def _changed(start: Path, results: Mapping[str, Sequence[Accuracy]]) -> str:
    return changes(read_json(start), results) if start.is_file() else ""


def draw_figures(run_dir: Path, splits: Splits, scores: Mapping[str, Sequence[GroupScores]], max_pixels: int, say: Say) -> list[Path]:
    """Draw the figures and return the paths of those that could be drawn. A failure is a warning."""
    drawn: list[Path] = []

    def attempt(name: str, draw: Callable[[Path], None]) -> None:
        path = run_dir / name
        try:
            draw(path)
            drawn.append(path)
        except Exception as error:  # a drawing library may fail on any caption or number
            say(f"warning: {path} could not be drawn ({type(error).__name__}: {' '.join(str(error).split())}); the run goes on")

    attempt("learning_curves.png", lambda path: learning_curves_figure(path, run_dir / "metrics.jsonl"))
    for split, groups in splits.items():
        shown = partial(samples, groups, scores[split], max_pixels)
        attempt(f"scores-{split}.png", lambda path, shown=shown: score_matrix_figure(path, shown()))  # type: ignore[misc]
    return drawn


def samples(groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores], max_pixels: int) -> list[dict[str, Any]]:
    """Return one group of each edit type, at most four types, in the form that score_matrix_figure takes."""
    first: dict[str, int] = {}
    for index, group in enumerate(groups):
        first.setdefault(group.edits[0].type if group.edits else UNLABELLED, index)
    return [
        {
            "title": f"{kind}: {groups[index].id}",
            "images": [[open_image(picture, max_pixels) for picture in pictures] for pictures in groups[index].images],
            "captions": _captions(groups[index]),
            "scores": scores[index].logp.tolist(),
            "match": groups[index].match,
        }
        for kind, index in list(first.items())[-4:]
    ]


def _captions(group: CounterfactualGroup) -> list[str]:
    """Return the texts, preceded by their prompts if the group has several prompts."""
    single_prompt = len(set(group.prompt_ids)) == 1
    return [candidate.text if single_prompt else f"{readable(candidate.prompt)} {candidate.text}" for candidate in group.candidates]
