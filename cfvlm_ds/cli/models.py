"""``cfvlm-ds score``, ``calibrate``, ``evaluate``, ``compare`` and ``export``: what is done with a model after, or before, its training.

``score``, ``calibrate`` and ``evaluate`` may be started by deepspeed, torchrun or srun: then all ranks share the work.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cfvlm_ds.cli import benchmarks
from cfvlm_ds.cli.options import add_command, add_data_options, add_model_options, model_of, positive, say
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import num_ranks, own_rank
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.run_folder import recorded_model
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import own_output
from cfvlm_ds.core.verbosity import shows_progress

if TYPE_CHECKING:
    from cfvlm_ds.batching.collator import Collator
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.core.groups import CounterfactualGroup
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.evaluation import GroupScores


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    world = "runs/quickstart/scenes"
    for name, function, text, of, taken, written in (
        (
            "score", _score, "write reference and blind scores of a manifest, for DPO and PMI",
            f"base {world}/train.jsonl", "groups to score: those to train on", "file to write (default MANIFEST.scores.jsonl)",
        ),
        (
            "calibrate", _calibrate, "by how much a model tells true from false in a manifest, and the margins and weights that fit it",
            f"base {world}/train.jsonl --limit 500", "groups to train on, or some of them (--limit)",
            "YAML file to write, with the recommended objective (default none)",
        ),
        (
            "evaluate", _evaluate, "accuracies by edit type, with rows for chance and for what language alone achieves",
            f"export {world}/test_iid.jsonl", "groups to evaluate; or --benchmarks in their place",
            "JSON file to write (default none); with --benchmarks a folder",
        ),
    ):  # fmt: skip
        command = add_command(commands, name, function, text, f"cfvlm-ds {name} runs/quickstart/{of}")
        adapters = "" if name == "score" else ", or folder of adapters"
        command.add_argument("model", help=f"model folder or hub name, run folder{adapters}")
        command.add_argument("manifest", nargs="+" if name == "evaluate" else None, help=taken)
        command.add_argument("--out", help=written)
        command.add_argument("--batch_size", type=positive, default=16, help="groups per batch (default 16)")
        default = "one forward per batch" + ", or 16384 for benchmarks" * (name == "evaluate")
        limit = f"tokens per forward at most; a larger batch is scored in several (default: {default})"
        command.add_argument("--max_tokens_per_forward", type=positive, metavar="N", help=limit)
        text = "score the first N groups alone, as the option limit of a data set does"
        text += "; of a benchmark about N items, spread over all of it" * (name == "evaluate")
        command.add_argument("--limit", type=positive, metavar="N", help=text)
        if name == "evaluate":
            text = "leave out the row of another group's image, which costs one more image and its texts per group"
            command.add_argument("--no_shuffled", action="store_true", help=text)
            benchmarks.add_options(command)
        command.add_argument("--zero3", action="store_true", help="keep the model in parts over all ranks, where one GPU does not hold it")
        add_data_options(command)
        add_model_options(command)

    benchmarks.add(commands)
    command = add_command(commands, "export", _export, "a DeepSpeed checkpoint as a Hugging Face folder", "cfvlm-ds export runs/quickstart")
    command.add_argument("run", help="run folder, or one of its checkpoints")
    command.add_argument(
        "--adapter", action="store_true", help="only the LoRA adapters, in peft's format, instead of merged into the model"
    )
    command.add_argument("--out", help="folder to write (default RUN/export, or RUN/adapter)")
    text = "send MLflow what it lacks of a run that has ended, or copy the run to the server in MLFLOW_TRACKING_URI"
    command = add_command(commands, "track", _track, text, "cfvlm-ds track runs/quickstart")
    command.add_argument("run", help="run folder")


def _score(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.core.data_config import is_hub
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.data.identity import data_identity
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.data.stored_scores import is_written, score_lines
    from cfvlm_ds.evaluation import score_groups
    from cfvlm_ds.models import fingerprint

    groups = sound_groups(arguments.manifest, arguments.root, arguments.format, arguments.limit, say)
    if is_hub(arguments.manifest) and not arguments.out:
        raise ConfigError(f"{arguments.manifest} is no file here, beside which scores are written; name one with --out")
    out = own_output(Path(arguments.out or f"{Path(arguments.manifest)}.scores.jsonl"), is_written, "score", arguments.manifest)
    model, adapter = model_of(arguments)
    if adapter is not None:
        raise ConfigError(f"{adapter} holds adapters, and stored scores belong to one model; merge them with `cfvlm-ds export`, name that")
    with whole_file(out) if own_rank() == 0 else open(os.devnull, "wb") as file:
        where = _where(arguments)
        listed = Progress(say, "pictures of rows", len(groups), "groups")
        checked = PictureTable.of_files((picture for group in listed.over(groups) for image in group.images for picture in image), say)
        scorer, collator, world = load_scorer(model, checked=checked, **where)
        identity = data_identity(groups, groups.roots, checked, Progress(say, "identity", len(groups), "groups").advance)
        scores = score_groups(scorer, collator, groups, world, **_batches(arguments))
        _refuse_nonfinite(arguments.model, groups, scores)
        if world.is_main:
            stored = {group.id: score.stored() for group, score in zip(groups, scores, strict=True)}
            file.writelines(score_lines(groups, stored, arguments.model, identity, made_by=fingerprint(model)))
    if world.is_main:
        print(f"wrote {out}: {len(groups)} groups")


def _refuse_nonfinite(model: str, groups: Sequence[CounterfactualGroup], scores: Sequence[GroupScores]) -> None:
    if broken := [group.id for group, score in zip(groups, scores, strict=True) if not score.finite]:
        raise ConfigError(
            f"{model}: scores of {len(broken)} of {len(groups)} groups are not finite, such as of {broken[0]!r}, and nothing is made of "
            "them; compare the model's weights and processor files with the published ones"
        )


def _calibrate(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.evaluation import calibration, score_groups

    if arguments.out:
        own_output(Path(arguments.out), calibration.is_block, "calibrate", arguments.manifest)
    groups = sound_groups(arguments.manifest, arguments.root, arguments.format, arguments.limit, say)
    scorer, collator, world = load_scorer(*model_of(arguments), **_where(arguments))
    scores = score_groups(scorer, collator, groups, world, **_batches(arguments))
    _refuse_nonfinite(arguments.model, groups, scores)

    def length(group: CounterfactualGroup) -> int:
        factual = group.candidates[0]
        return len(collator.prompts.encoded(factual.prompt, factual.text, group.num_pictures, f"group {group.id!r}: text 0").text_ids)

    found = list(calibration.gaps(groups, scores, length))
    if not found:
        raise ConfigError(
            f"{arguments.manifest}: no group has a text or an image that is false beside a true one, so that there is nothing to compare; "
            "`cfvlm-ds data stats` says what it holds"
        )
    if not world.is_main:
        return
    advice = calibration.advise(found)
    compared = {gap.group for gap in found}
    idle = [group.id for group in groups if group.id not in compared]
    without = f"{len(idle)} of {len(groups)} groups have nothing to compare, such as {quoted(idle[0])}" if idle else ""
    few = f"warning: {len(found)} comparisons, and below {calibration.FEW} quantiles say little" if len(found) < calibration.FEW else ""
    reasons = "\n".join(f"- {reason}" for reason in advice.reasons)
    print("\n\n".join(part for part in (calibration.table(found), without, few, reasons, calibration.block(advice)) if part))
    if arguments.out:
        replace(Path(arguments.out), f"{calibration.block(advice)}\n".encode())


def _evaluate(arguments: argparse.Namespace) -> None:
    if benchmarks.asked_for(arguments):
        benchmarks.evaluate(arguments, joined, load_scorer, _batches(arguments))
        return
    from cfvlm_ds.data import named_apart, sound_groups
    from cfvlm_ds.evaluation import evaluate, table

    manifests = named_apart(arguments.manifest)
    if arguments.out:
        of_run = (Path(arguments.out).parent / "config.yaml").is_file()  # whose own results.json has the same form
        own_output(Path(arguments.out), lambda file: not of_run and _is_evaluated(file), "evaluate", *manifests.values())
    splits = {name: sound_groups(path, arguments.root, arguments.format, arguments.limit, say) for name, path in manifests.items()}
    scorer, collator, world = load_scorer(*model_of(arguments), **_where(arguments))
    results, _ = evaluate(scorer, collator, splits, world, shuffled=not arguments.no_shuffled, **_batches(arguments))
    if world.is_main:
        print(table(results))
    if arguments.out and world.is_main:
        found = {split: [vars(row) for row in rows] for split, rows in results.items()}
        replace(Path(arguments.out), json.dumps(found, indent=1).encode())


def _is_evaluated(file: IO[bytes]) -> bool:
    """Whether a file has tables of accuracies by split, and nothing else."""
    found = parse_json(file.read().decode())
    return bool(found) and all(row.keys() >= {"name", "num", "metrics"} for rows in found.values() for row in rows)


def _export(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.checkpoint import damaged, description, incomplete, newest
    from cfvlm_ds.export import export_adapter, export_hf
    from cfvlm_ds.export.folder import refuse_others_model
    from cfvlm_ds.training.card import card_of

    given = Path(arguments.run)
    run_dir = given.parent if given.name.startswith("checkpoint-") else given
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder (no config.yaml); name a run's output_dir or one of its checkpoints")
    model = recorded_model(run_dir)
    checkpoint = given if given != run_dir else newest(run_dir)
    if defect := incomplete(checkpoint) or damaged(checkpoint, description(checkpoint)["files"]):
        raise ConfigError(f"{checkpoint}: {defect}; export another checkpoint")
    out = Path(arguments.out or run_dir / ("adapter" if arguments.adapter else "export"))
    refuse_others_model(out)
    write = export_adapter if arguments.adapter else export_hf
    say = print if shows_progress() else lambda message: None
    card = card_of(checkpoint, print, adapter=arguments.adapter)
    print(f"exported to {write(checkpoint, model.name_or_path, out, say=say, lora=model.lora, card=card)}")


def _track(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.tracking import deliver

    if not deliver(Path(arguments.run)):
        raise StorageError("MLflow did not get everything, as reported above; the same command continues")


def _batches(arguments: argparse.Namespace) -> dict[str, Any]:
    remedy = f"lower --batch_size ({arguments.batch_size}), set --max_tokens_per_forward, --model.max_pixels or --model.max_tiles"
    return {"batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens_per_forward, "remedy": remedy}


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"max_pixels": arguments.max_pixels, "world": joined(arguments.zero3), "zero3": arguments.zero3}


def joined(zero3: bool = False) -> World:
    """The ranks that a launcher has started, which meet here, or this process alone."""
    import torch

    from cfvlm_ds.core.distributed import World

    if num_ranks() > 1 or zero3:
        from cfvlm_ds import engine

        return engine.start()
    return World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def load_scorer(
    model: ModelConfig,
    adapter: Path | None = None,
    *,
    max_pixels: int,
    checked: PictureTable | None = None,
    world: World | None = None,
    zero3: bool = False,
) -> tuple[Any, Collator, World]:
    """A model, with the adapters of a folder if one is named, on every rank, on the GPU if there is one; with ``zero3`` in parts over all
    of them. Without a ``world`` this process is the only one."""
    import torch

    from cfvlm_ds.batching.collator import load_collator
    from cfvlm_ds.models import Scorer, attach_adapters, family_of, load_model
    from cfvlm_ds.training.self_check import refuse_unusable

    world = world or joined()
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    if zero3:
        from cfvlm_ds import engine

        if adapter is not None:
            raise ConfigError(f"{adapter} holds adapters, and --zero3 takes a whole model; merge them with `cfvlm-ds export`, name that")
        scorer: Any = engine.in_parts(model, dtype, world)
    else:
        loaded = load_model(model, dtype)
        if adapter is not None:
            loaded = attach_adapters(loaded, adapter)
        scorer = Scorer(loaded, family_of(loaded.config)).to(world.device).eval()
    collator = load_collator(model, "full", max_pixels, checked=checked)
    refuse_unusable(scorer, collator, model.name_or_path, world.device)
    return scorer, collator, world
