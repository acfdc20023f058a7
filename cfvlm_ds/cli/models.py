"""``cfvlm-ds score``, ``calibrate``, ``export`` and ``track``: commands to run before or after training.

``score``, ``calibrate`` and ``evaluate`` (evaluating.py) can be started with deepspeed, torchrun or srun; the ranks share the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cfvlm_ds.cli.options import ImageLimits, Reading, Scoring, add_function, model_named, say
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import replace, whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import num_ranks, own_rank
from cfvlm_ds.core.run_folder import recorded_model
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import own_output

if TYPE_CHECKING:
    from cfvlm_ds.batching.collator import Collator
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.core.groups import CounterfactualGroup
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.evaluation import GroupScores


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    for function in (_score, _calibrate, export, _track):
        add_function(commands, function)


def _score(
    model: str,
    manifest: str,
    *,
    out: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    scoring: Scoring,
    reading: Reading,
    limits: ImageLimits,
) -> None:
    """Write a manifest's reference scores (for DPO) and blind scores (for PMI).

    Example: cfvlm-ds score runs/quickstart/base runs/quickstart/world/train.jsonl

    Args:
        model: model folder or hub name, or run folder.
        manifest: training groups to score.
        out: file to write; by default MANIFEST.scores.jsonl.
        dtype: dtype of the weights, as in the training run; by default bfloat16 on a GPU and float32 on a CPU.
    """
    from cfvlm_ds.core.data_config import is_hub
    from cfvlm_ds.core.distributed import usual_dtype
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.data.identity import data_identity
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.data.stored_scores import is_written, score_lines
    from cfvlm_ds.models import fingerprint

    groups = sound_groups(manifest, reading.root, reading.format, scoring.limit, say)
    if is_hub(manifest) and not out:
        raise ConfigError(f"{manifest} is not a local file, so scores cannot be written next to it; name a file with --out")
    path = own_output(Path(out or f"{Path(manifest)}.scores.jsonl"), is_written, "score", manifest)
    loaded, adapter = model_named(model, limits)
    if adapter is not None:
        raise ConfigError(
            f"{adapter} contains only adapters, but stored scores need a whole model; merge them with `cfvlm-ds export` and name the result"
        )
    with whole_file(path) if own_rank() == 0 else open(os.devnull, "wb") as file:
        world = joined(scoring.zero3)
        weights = dtype or str(usual_dtype(world.device)).removeprefix("torch.")
        listed = Progress(say, "listing pictures", len(groups), "groups")
        checked = PictureTable.of_files((picture for group in listed.over(groups) for image in group.images for picture in image), say)
        scorer, collator, world = load_scorer(
            loaded, max_pixels=reading.max_pixels, checked=checked, world=world, zero3=scoring.zero3, dtype=weights
        )
        identity = data_identity(Progress(say, "computing the identity", len(groups), "groups").over(groups), groups.roots, checked)
        scores = _scores(model, groups, scorer, collator, world, scoring)
        if world.is_main:
            stored = {group.id: score.stored() for group, score in zip(groups, scores, strict=True)}
            file.writelines(score_lines(groups, stored, model, identity, made_by={**fingerprint(loaded), "dtype": weights}))
    if world.is_main:
        print(f"wrote {path}: {len(groups)} groups")


def _scores(
    model: str, groups: Sequence[CounterfactualGroup], scorer: Any, collator: Collator, world: World, scoring: Scoring
) -> Sequence[GroupScores]:
    """Return the scores of all groups. Raises ConfigError if any score is not finite."""
    from cfvlm_ds.evaluation import score_groups

    scores = score_groups(
        scorer, collator, groups, world, scoring.batch_size, max_tokens=scoring.max_tokens_per_forward, remedy=scoring.remedy
    )
    if broken := [group.id for group, score in zip(groups, scores, strict=True) if not score.finite]:
        raise ConfigError(
            f"{model}: scores of {len(broken)} of {len(groups)} groups are not finite, for example those of {broken[0]!r}; "
            "compare the model's weights and processor files with the published ones"
        )
    return scores


def _calibrate(model: str, manifest: str, *, out: str | None = None, scoring: Scoring, reading: Reading, limits: ImageLimits) -> None:
    """Measure how well a model separates true from false texts in a manifest, and print suitable margins and weights.

    Example: cfvlm-ds calibrate runs/quickstart/base runs/quickstart/world/train.jsonl --limit 500

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        manifest: training groups; with --limit, only the first groups are scored.
        out: YAML file for the recommended objective.
    """
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.evaluation import calibration

    if out:
        own_output(Path(out), calibration.is_block, "calibrate", manifest)
    groups = sound_groups(manifest, reading.root, reading.format, scoring.limit, say)
    scorer, collator, world = load_scorer(*model_named(model, limits), max_pixels=reading.max_pixels, zero3=scoring.zero3)
    scores = _scores(model, groups, scorer, collator, world, scoring)

    def length(group: CounterfactualGroup) -> int:
        factual = group.candidates[0]
        return len(collator.prompts.encoded(factual.prompt, factual.text, group.num_pictures, f"group {group.id!r}: text 0").text_ids)

    all_gaps = list(calibration.gaps(groups, scores, length))
    if not all_gaps:
        raise ConfigError(
            f"{manifest}: no group has both a true and a false text or image, so there is nothing to compare; "
            "`cfvlm-ds data check` lists its contents"
        )
    if not world.is_main:
        return
    advice = calibration.advise(all_gaps)
    compared = {gap.group for gap in all_gaps}
    idle = [group.id for group in groups if group.id not in compared]
    without = f"{len(idle)} of {len(groups)} groups have nothing to compare, for example {quoted(idle[0])}" if idle else ""
    few = (
        f"warning: only {len(all_gaps)} comparisons; below {calibration.FEW}, quantiles are unreliable"
        if len(all_gaps) < calibration.FEW
        else ""
    )
    reasons = "\n".join(f"- {reason}" for reason in advice.reasons)
    print("\n\n".join(part for part in (calibration.table(all_gaps), without, few, reasons, calibration.block(advice)) if part))
    if out:
        replace(Path(out), f"{calibration.block(advice)}\n".encode())


def export(run: str, *, adapter: bool = False, out: str | None = None, push: str | None = None) -> None:
    """Export a DeepSpeed checkpoint as a Hugging Face folder, and optionally push it to the hub.

    Example: cfvlm-ds export runs/quickstart --push me/quickstart

    Args:
        run: run folder, or one of its checkpoints.
        adapter: export only the LoRA adapters, in peft's format, instead of the model with merged adapters.
        out: folder to write; by default RUN/export, or RUN/adapter with --adapter.
        push: repository USER/NAME on the Hugging Face hub; a new repository is private.
    """
    from cfvlm_ds.checkpoint import damaged, description, incomplete, newest
    from cfvlm_ds.export import export_adapter, export_hf
    from cfvlm_ds.export.folder import refuse_others_model
    from cfvlm_ds.training.card import card_of

    path = Path(run)
    run_dir = path.parent if path.name.startswith("checkpoint-") else path
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder (no config.yaml); name a run's output_dir or one of its checkpoints")
    model = recorded_model(run_dir)
    checkpoint = path if path != run_dir else newest(run_dir)
    if defect := incomplete(checkpoint) or damaged(checkpoint, description(checkpoint)["files"]):
        raise ConfigError(f"{checkpoint}: {defect}; export another checkpoint")
    folder = Path(out or run_dir / ("adapter" if adapter else "export"))
    refuse_others_model(folder)
    write = export_adapter if adapter else export_hf
    card = card_of(checkpoint, print, adapter=adapter, repo=push)
    print(f"exported to {write(checkpoint, model.name_or_path, folder, say=say, lora=model.lora, card=card)}")
    if push:
        from cfvlm_ds.export import hub

        print(f"pushed to {hub.push(folder, push, say)}")


def _track(run: str) -> None:
    """Send a finished run's undelivered data to MLflow, or copy the run to the server that MLFLOW_TRACKING_URI points to.

    Example: cfvlm-ds track runs/quickstart

    Args:
        run: run folder.
    """
    from cfvlm_ds.tracking import deliver

    if not deliver(Path(run)):
        raise StorageError("MLflow did not receive everything (see above); run the same command again to continue")


def joined(zero3: bool = False) -> World:
    """Connect to the other ranks that a launcher has started, and return their ``World``. Without a launcher, this process is the only
    rank.
    """
    from cfvlm_ds.core.distributed import World, own_device

    if num_ranks() > 1 or zero3:
        from cfvlm_ds import engine

        return engine.start()
    return World(0, 1, 0, own_device())


def load_scorer(
    model: ModelConfig,
    adapter: Path | None = None,
    *,
    max_pixels: int,
    checked: PictureTable | None = None,
    world: World | None = None,
    zero3: bool = False,
    dtype: str | None = None,
) -> tuple[Any, Collator, World]:
    """Load a model on every rank, on the GPU if there is one, and return the scorer, its collator and the ``World``.

    ``adapter`` is a folder of adapters for the model; ``dtype`` names the weights' dtype (see ``usual_dtype``). With ``zero3``, the model
    is partitioned over all ranks. If ``world`` is None, the ranks are first connected to each other.
    """
    import torch

    from cfvlm_ds.batching.collator import load_collator
    from cfvlm_ds.core.distributed import usual_dtype
    from cfvlm_ds.models import Scorer, attach_adapters, family_of, load_model
    from cfvlm_ds.training.self_check import refuse_unusable

    world = world or joined(zero3)
    precision = getattr(torch, dtype) if dtype else usual_dtype(world.device)
    if zero3:
        from cfvlm_ds import engine

        if adapter is not None:
            raise ConfigError(
                f"{adapter} contains only adapters, but --zero3 needs a whole model; merge them with `cfvlm-ds export` and name the result"
            )
        scorer: Any = engine.in_parts(model, precision, world)
    else:
        loaded = load_model(model, precision)
        if adapter is not None:
            loaded = attach_adapters(loaded, adapter)
        scorer = Scorer(loaded, family_of(loaded.config)).to(world.device).eval()
    collator = load_collator(model, "full", max_pixels, checked=checked)
    refuse_unusable(scorer, collator, model.name_or_path, world.device)
    return scorer, collator, world
