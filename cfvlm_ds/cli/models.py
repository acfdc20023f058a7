"""``cfvlm-ds score``, ``evaluate`` and ``export``: what is done with a model after, or before, its training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvlm_ds.cli.options import add_command, add_data_options, add_model_options, model_of, positive, said_format
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.run_folder import recorded_model
from cfvlm_ds.core.untrusted import output_file
from cfvlm_ds.core.verbosity import shows_progress

if TYPE_CHECKING:
    from cfvlm_ds.batching.collator import Collator
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.models import Scorer


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    for name, function, text in (
        ("score", _score, "write reference and blind scores of a manifest, for DPO and PMI"),
        ("evaluate", _evaluate, "accuracies by edit type, with rows for chance and for what language alone achieves"),
    ):
        example = f"cfvlm-ds {name} runs/quickstart/export runs/quickstart/scenes/test_iid.jsonl"
        command = add_command(commands, name, function, text, example)
        taken = ", or folder of adapters" if name == "evaluate" else ""
        command.add_argument("model", help=f"model folder or hub name, run folder{taken}")
        command.add_argument("manifest", nargs="+" if name == "evaluate" else None)
        command.add_argument("--out", help="file to write (score: default MANIFEST.scores.jsonl; evaluate: JSON, default none)")
        command.add_argument("--batch_size", type=positive, default=16, help="groups per batch (default 16)")
        limit = "tokens per forward at most; a larger batch is scored in several (default: one forward per batch)"
        command.add_argument("--max_tokens_per_forward", type=positive, metavar="N", help=limit)
        text = "score the first N groups alone, as the option limit of a data set does"
        command.add_argument("--limit", type=positive, metavar="N", help=text)
        if name == "evaluate":
            text = "leave out the row of another group's image, which costs one more image and its texts per group"
            command.add_argument("--no_shuffled", action="store_true", help=text)
        add_data_options(command)
        add_model_options(command)

    command = add_command(commands, "export", _export, "a DeepSpeed checkpoint as a Hugging Face folder", "cfvlm-ds export runs/quickstart")
    command.add_argument("run", help="run folder, or one of its checkpoints")
    command.add_argument(
        "--adapter", action="store_true", help="only the LoRA adapters, in peft's format, instead of merged into the model"
    )
    command.add_argument("--out", help="folder to write (default RUN/export, or RUN/adapter)")


def _score(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.data.identity import data_identity
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.data.stored_scores import write_scores
    from cfvlm_ds.evaluation import score_groups
    from cfvlm_ds.models import fingerprint

    groups = sound_groups(arguments.manifest, arguments.root, said_format(arguments.manifest, arguments.format), arguments.limit)
    model, adapter = model_of(arguments)
    if adapter is not None:
        raise ConfigError(f"{adapter} holds adapters, and stored scores belong to one model; merge them with `cfvlm-ds export`, name that")
    out = output_file(Path(arguments.out or f"{arguments.manifest}.scores.jsonl"))
    checked = PictureTable.of_files(picture for group in groups for image in group.images for picture in image)
    scorer, collator, world = load_scorer(model, max_pixels=arguments.max_pixels, checked=checked)
    identity = data_identity(groups, groups.roots, checked)
    scores = score_groups(scorer, collator, groups, world, **_batches(arguments))
    if broken := [group.id for group, score in zip(groups, scores, strict=True) if not score.finite]:
        raise ConfigError(
            f"{arguments.model}: scores of {len(broken)} of {len(groups)} groups are not finite, such as of {broken[0]!r}, and are not "
            "written; compare the model's weights and processor files with the published ones"
        )
    stored = {group.id: score.stored() for group, score in zip(groups, scores, strict=True)}
    write_scores(out, groups, stored, arguments.model, identity, made_by=fingerprint(model))
    print(f"wrote {out}: {len(groups)} groups")


def _evaluate(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data import named_apart, sound_groups
    from cfvlm_ds.evaluation import evaluate, table

    if arguments.out:
        output_file(Path(arguments.out))
    splits = {
        name: sound_groups(path, arguments.root, said_format(path, arguments.format), arguments.limit)
        for name, path in named_apart(arguments.manifest).items()
    }
    scorer, collator, world = load_scorer(*model_of(arguments), max_pixels=arguments.max_pixels)
    results, _ = evaluate(scorer, collator, splits, world, shuffled=not arguments.no_shuffled, **_batches(arguments))
    print(table(results))
    if arguments.out:
        found = {split: [vars(row) for row in rows] for split, rows in results.items()}
        replace(Path(arguments.out), json.dumps(found, indent=1).encode())


def _export(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.checkpoint import damaged, description, incomplete, newest
    from cfvlm_ds.export import export_adapter, export_hf
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
    write = export_adapter if arguments.adapter else export_hf
    say = print if shows_progress() else lambda message: None
    card = card_of(checkpoint, print, adapter=arguments.adapter)
    print(f"exported to {write(checkpoint, model.name_or_path, out, say=say, lora=model.lora, card=card)}")


def _batches(arguments: argparse.Namespace) -> dict[str, Any]:
    remedy = f"lower --batch_size ({arguments.batch_size}), set --max_tokens_per_forward, --model.max_pixels or --model.max_tiles"
    return {"batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens_per_forward, "remedy": remedy}


def load_scorer(
    model: ModelConfig, adapter: Path | None = None, *, max_pixels: int, checked: PictureTable | None = None
) -> tuple[Scorer, Collator, Any]:
    """A model, with the adapters of a folder if one is named, in one process, on the GPU if there is one."""
    import torch

    from cfvlm_ds.batching.collator import load_collator
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.models import Scorer, attach_adapters, family_of, load_model
    from cfvlm_ds.training.self_check import refuse_unusable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if adapter is not None:
        loaded = attach_adapters(loaded, adapter)
    scorer, collator = Scorer(loaded, family_of(loaded.config)).to(device).eval(), load_collator(model, "full", max_pixels, checked=checked)
    refuse_unusable(scorer, collator, model.name_or_path, device)
    return scorer, collator, World(0, 1, 0, device)
