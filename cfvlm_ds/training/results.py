"""A run's results: the exported model, tables, scores and figures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from cfvlm_ds.core.config import RunConfig
from cfvlm_ds.core.errors import StorageError, unwritten
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Alive, Say
from cfvlm_ds.core.text import in_cell, one_line
from cfvlm_ds.core.untrusted import refuse_replacing
from cfvlm_ds.data import GroupStore
from cfvlm_ds.data.identity import Identity
from cfvlm_ds.data.stored_scores import write_scores
from cfvlm_ds.evaluation import Accuracy, GroupScores, table
from cfvlm_ds.evaluation.before_after import Change, changes_table, of_types, rows_table, to_table
from cfvlm_ds.evaluation.suite.results import Result
from cfvlm_ds.evaluation.suite.tables import markdown
from cfvlm_ds.evaluation.view import view_worst
from cfvlm_ds.export import export_adapter, export_hf
from cfvlm_ds.export.folder import CARD, refuse_others_model, stale_card, write_card
from cfvlm_ds.models import load_config, only_adapters_train
from cfvlm_ds.page.report import write_report_page
from cfvlm_ds.tracking.figures import learning_curves_figure
from cfvlm_ds.tracking.metrics_log import METRICS_FILE
from cfvlm_ds.training.card import card_of
from cfvlm_ds.training.run_start import CHANGES as OPTION_CHANGES

CHANGES = "before_after.json"
"""File with the accuracies before and after training."""

PAGE = "results.html"
"""HTML page that shows results.md and the figures."""
WORST = "worst"
"""Folder with an HTML page that shows the groups with the worst margins."""


def export_checkpoint(config: RunConfig, checkpoint: Path, say: Say, alive: Alive, dtype: torch.dtype) -> None:
    """Export a checkpoint as a Hugging Face folder, or as adapters if only adapters are trained.

    ``alive`` is called repeatedly during the export. ``dtype`` is the dtype in which the run evaluates; if the export has a different one,
    the printed line notes this.
    """
    model, (adapter, folder, _) = config.model, _exported(config)
    card = card_of(checkpoint, say, adapter=adapter)
    if adapter:
        exported = export_adapter(checkpoint, model.name_or_path, folder, model.lora, say, alive, card)
    else:
        exported = export_hf(checkpoint, model.name_or_path, folder, say, model.lora, alive, card)
    stored, note = load_config(model.name_or_path).dtype, ""
    if not adapter and stored not in (None, dtype):
        note = f" as {stored}; this run evaluates in {dtype}, so the export's NLL differs slightly".replace("torch.", "")
    say(f"exported to {exported}{note}")


def complete_card(config: RunConfig, checkpoint: Path, say: Say) -> None:
    """Add the evaluation results to the model card, which was exported before the evaluation."""
    adapter, folder, _ = _exported(config)
    card = card_of(checkpoint, say, adapter=adapter, evaluated=True)
    with harmless(folder / CARD, say):
        if card is not None and not write_card(folder, card):
            say(f"warning: {stale_card(folder, card) or f'{folder / CARD} has been edited and is left unchanged'}")


def refuse_export(config: RunConfig) -> None:
    """Raise ConfigError before training if the export's folder contains files that the export must not replace."""
    if config.train.export:
        _, folder, marker = _exported(config)
        remedy = "choose another train.output_dir, or set train.export to false"
        refuse_replacing(folder, marker, [Path(config.model.name_or_path).resolve()], remedy)
        refuse_others_model(folder, remedy)


def _exported(config: RunConfig) -> tuple[bool, Path, str]:
    """Return three values: whether a run exports adapters, the export's folder, and the name of the file by which the folder is recognised
    as an export.
    """
    adapter, run_dir = only_adapters_train(config.model), Path(config.train.output_dir)
    return adapter, *((run_dir / "adapter", "adapter_config.json") if adapter else (run_dir / "export", "config.json"))


def write_results(
    config: RunConfig,
    step: int,
    trained: str,
    splits: Mapping[str, GroupStore],
    results: Mapping[str, Sequence[Accuracy]],
    scores: Mapping[str, Sequence[GroupScores]],
    identities: Mapping[str, Identity],
    changes: Sequence[Change],
    say: Say,
    benchmarks: Sequence[Result],
    samples: str,
    warning: str,
) -> tuple[str, list[Path]]:
    """Write results.md, results.json, before_after.json and every split's scores into the run folder. If ``train.figures`` is set, also
    write a page that shows the worst groups. Return the first section of results.md, and the paths of results.md, results.json and
    before_after.json.

    results.md also contains the results in ``benchmarks``, the Markdown section ``samples``, and a ``warning`` about the training.
    ``trained`` gives the numbers of training groups and epochs. Raises StorageError if the disk is full.
    """
    run_dir = path = Path(config.train.output_dir)
    parts = [summary_of(config, f"{step} steps ({trained})", results, changes, warning)]
    if config.train.figures and _worst_groups(config, step, splits, scores, say):
        parts.append(
            f"Groups with the smallest margins per word after training: [{WORST}/index.html]({WORST}/index.html) in the run folder"
        )
    parts += ["## By edit type", rows_table(types)] if (types := of_types(changes)) else []
    parts += [samples] * bool(samples)
    parts += ["## All metrics, after training", table(results)] * bool(changes)
    parts += [markdown(benchmarks)] * bool(benchmarks)
    contents = {
        run_dir / "results.md": "\n\n".join(parts) + "\n",
        run_dir / "results.json": json.dumps({name: [vars(row) for row in rows] for name, rows in results.items()}, indent=1),
        run_dir / CHANGES: json.dumps(to_table(changes), indent=1),
    }
    try:
        for path, text in contents.items():
            replace(path, text.encode())
        (run_dir / "scores").mkdir(exist_ok=True)
        for split, groups in splits.items():
            stored = {group.id: score.stored() for group, score in zip(groups, scores[split], strict=True)}
            write_scores(path := run_dir / "scores" / f"{split}.jsonl", groups, stored, str(run_dir), identities[split])
    except OSError as error:
        raise StorageError(
            f"{unwritten(path, error)}; the training has finished: free some space, and the same command evaluates again"
        ) from error
    return parts[0], list(contents)


def summary_of(config: RunConfig, trained: str, results: Mapping[str, Sequence[Accuracy]], changes: Sequence[Change], warning: str) -> str:
    """Return the first section of results.md: model, data, amount of training (``trained``), objective, a note if options were changed on
    resume, a ``warning`` about the training, if any, and the accuracies before and after training.
    """
    run_dir = Path(config.train.output_dir)
    changed = f" Options were changed on resume; see {OPTION_CHANGES}." if (run_dir / OPTION_CHANGES).is_file() else ""
    lines = [
        f"# {in_cell(run_dir.absolute().name)}",
        "",
        f"{config.model.name_or_path} after {trained} on {config.data.trained_on}; objective: {config.loss}.{changed}",
        "",
        *[warning, ""] * bool(warning),
    ]
    if not results:
        return "\n".join([*lines, _NO_SETS])
    if missing := [name for name in results if not any(each.set == name for each in changes)]:
        reason = "no comparison, or not evaluated on the same data before the first step"
        if not config.train.eval_on_start:
            reason = "train.eval_on_start is false"
        lines += [f"Not compared with the model before training: {', '.join(missing)} ({reason}).", ""]
    if not changes:
        return "\n".join([*lines, table(results)])
    files = {name: each.path for name, each in config.data.evaluation_sets.items()}
    size = load_config(config.model.name_or_path).get_text_config().vocab_size
    return "\n".join([*lines, changes_table(changes, files=files, vocabulary=size)])


def write_results_page(run_dir: Path, figures: Sequence[Path], say: Say) -> None:
    """Write results.html, which shows results.md and the figures in a browser. If this fails, print a warning."""
    with harmless(run_dir / PAGE, say):
        text = (run_dir / "results.md").read_text(encoding="utf-8")
        shown = "\n\n".join(f"![{path.stem}]({path.name})" for path in figures)
        write_report_page(run_dir / PAGE, run_dir.absolute().name, f"{text}\n\n## Figures\n\n{shown}" if figures else text)


@contextlib.contextmanager
def harmless(path: Path, say: Say) -> Iterator[None]:
    """Turn any exception raised in the block, which writes ``path``, into a warning. Drawing libraries can fail on unusual captions or
    numbers.
    """
    try:
        yield
    except Exception as error:
        say(f"warning: {path} could not be written ({type(error).__name__}: {one_line(str(error), 300)}); the run continues")


def _worst_groups(
    config: RunConfig, step: int, splits: Mapping[str, GroupStore], scores: Mapping[str, Sequence[GroupScores]], say: Say
) -> bool:
    """Write the page that shows the worst groups, and return True if it was written. If this fails, print a warning."""
    if not any(map(len, splits.values())):
        return False
    run_dir = Path(config.train.output_dir)
    with harmless(run_dir / WORST, say):
        view_worst(run_dir, step, splits, scores, run_dir / WORST, config.data.max_pixels, say)
        return True
    return False


def description(summary: str, files: Sequence[Path]) -> str:
    """Return the run's description for MLflow: ``summary`` and the figures. A summary that is too long is cut at the end of a line."""
    figures = [f"![{path.stem}](get-artifact?path={path.name}&run_uuid=RUN_ID)" for path in files if path.suffix == ".png"]
    if len(summary) > _MOST_DESCRIBED:
        summary = summary[:_MOST_DESCRIBED].rpartition("\n")[0] + "\n\nresults.md has the whole table."
    return "\n\n".join([summary, _METRICS, *figures[:6]])


_MOST_DESCRIBED = 4000
"""Maximum length of the summary in the description, in characters. MLflow accepts tags of up to 5,000 characters."""
_METRICS = """\
- loss: the weighted sum of the terms; detail/eval/SET/loss is the same for SET, but only of the terms that SET has comparisons for
  (results.md names any others)
- learning_rate: of the last step; the parameter train.learning_rate is the rate that was set
- grad_norm: before clipping
- eval_SET_METRIC: accuracy in %, a mean of edit types (the tables above give the number of groups), or nll in nats per token if the set has
  no accuracy; detail/eval/SET/nll exists for every set"""
"""Explanations of the metrics in ``Main/`` for the description."""
_NO_SETS = (
    "No evaluation sets. Add one with `--data.evaluation.NAME FILE`, in any format that training reads, for example with rows held out "
    "from the training data."
)


def draw_curves(run_dir: Path, results: Mapping[str, Sequence[Accuracy]], samples: Mapping[str, str], say: Say) -> list[Path]:
    """Draw the learning curves and return their path in a list. If this fails, print a warning and return an empty list. ``samples`` maps
    each metric of ``EvaluationSample`` to its sample size, as text.
    """
    path = run_dir / "learning_curves.png"
    counts = {
        f"eval/{name}/{metric}": f"{n} groups" for name, rows in results.items() for row in rows[-1:] for metric, n in row.groups.items()
    }
    with harmless(path, say):
        learning_curves_figure(path, run_dir / METRICS_FILE, {**counts, **samples})
        return [path]
    return []
