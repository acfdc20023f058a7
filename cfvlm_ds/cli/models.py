"""``cfvlm-ds score``, ``calibrate``, ``export``, ``track`` and ``describe``: commands to run before or after training.

``score``, ``calibrate`` and ``evaluate`` (evaluating.py) can be started with deepspeed, torchrun or srun; the ranks share the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cfvlm_ds.cli.options import ImageLimits, Positive, Reading, Scoring, add_function, model_named, say
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.conversation import DESCRIBE
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.errors import ConfigError, DataError, StorageError
from cfvlm_ds.core.files import whole_file
from cfvlm_ds.core.progress import Progress
from cfvlm_ds.core.ranks import num_ranks, own_rank
from cfvlm_ds.core.run_folder import recorded_model
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.text import quoted
from cfvlm_ds.core.untrusted import own_output

if TYPE_CHECKING:
    from cfvlm_ds.batching.collator import Collator
    from cfvlm_ds.core.distributed import World
    from cfvlm_ds.core.groups import CounterfactualGroup, Groups
    from cfvlm_ds.data.picture_index import PictureTable
    from cfvlm_ds.evaluation import GroupScores


def add(commands: Any) -> None:
    """Register this module's commands."""
    for function in (_score, _calibrate, export, _track, _describe):
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
    """Score the groups of a manifest, and write their reference scores (for DPO) and their blind scores on a blank image (for PMI).

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


def _scores(model: str, groups: Groups, scorer: Any, collator: Collator, world: World, scoring: Scoring) -> Sequence[GroupScores]:
    """Return the scores of all groups. Raises ConfigError if any score is not finite."""
    from cfvlm_ds.evaluation import Batching, score_groups

    batching = Batching(scoring.batch_size, scoring.max_tokens_per_forward, remedy=scoring.remedy)
    scores = score_groups(scorer, collator, groups, world, batching)
    if broken := [group.id for group, score in zip(groups, scores, strict=True) if not score.finite]:
        raise ConfigError(
            f"{model}: scores of {len(broken)} of {len(groups)} groups are not finite, for example those of {broken[0]!r}; "
            "compare the model's weights and processor files with the published ones"
        )
    return scores


def _calibrate(model: str, manifest: str, *, scoring: Scoring, reading: Reading, limits: ImageLimits) -> None:
    """Measure how well a model separates the true texts and images of a manifest from the false ones.

    Example: cfvlm-ds calibrate runs/quickstart/base runs/quickstart/world/train.jsonl --limit 500

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        manifest: training groups; with --limit, only the first groups are scored.
    """
    from cfvlm_ds.data import sound_groups
    from cfvlm_ds.evaluation import calibration

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
    compared = {gap.group for gap in all_gaps}
    idle = [group.id for group in groups if group.id not in compared]
    without = f"{len(idle)} of {len(groups)} groups have nothing to compare, for example {quoted(idle[0])}" if idle else ""
    few = (
        f"warning: only {len(all_gaps)} comparisons; below {calibration.FEW}, quantiles are unreliable"
        if len(all_gaps) < calibration.FEW
        else ""
    )
    parts = calibration.table(all_gaps), calibration.advice(all_gaps), without, few, calibration.warning(all_gaps)
    print("\n\n".join(part for part in parts if part))


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
    from cfvlm_ds.export.folder import refuse_others_model, stale_card
    from cfvlm_ds.training.card import card_of

    if push is not None and not (len(parts := push.split("/")) == 2 and all(parts)):
        raise ConfigError(f"--push {push} must have the form USER/NAME")
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
    if stale := stale_card(folder, card):
        if push:
            raise ConfigError(stale)
        say(f"warning: {stale}")
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
    """Return the ``World``. The process group is initialized only if a launcher has started several ranks or ``zero3`` is set; otherwise,
    this process is the only rank.
    """
    from cfvlm_ds.core.distributed import World, own_device

    if num_ranks() > 1 or zero3:
        from cfvlm_ds import engine

        return engine.start()
    return World(0, 1, own_device())


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
    is partitioned over all ranks. If ``world`` is None, ``joined`` creates it.
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
    collator = load_collator(model, max_pixels, checked=checked)
    refuse_unusable(scorer, collator, model.name_or_path, world.device)
    return scorer, collator, world


SomePictures = Annotated[list[str], ("nargs", "*"), ("metavar", "PICTURE")]


def _describe(
    model: str,
    picture: SomePictures,
    *,
    prompt: str = DESCRIBE,
    choices: list[str] | None = None,
    max_new_tokens: Positive = 128,
    limits: ImageLimits,
) -> None:
    """Have a model write texts about pictures, or rank given texts by their likelihood. If no pictures are given, their paths are read from
    standard input.

    Example: cfvlm-ds describe runs/quickstart dog.jpg --choices "a dog on a sofa" "a sofa on a dog"

    Args:
        model: model folder or hub name, run folder, or folder of adapters.
        picture: picture files; give them before the options.
        prompt: question or instruction.
        choices: texts to rank by their log-likelihood as answers to the prompt, instead of generating a text.
        max_new_tokens: maximum number of tokens to generate.
    """
    if num_ranks() > 1:
        raise ConfigError(f"describe runs in one process, but {num_ranks()} were started; start only one")
    if missing := [each for each in picture if not Path(each).is_file()]:
        raise ConfigError(f"{missing[0]} is not a file; name the model first, then image files")
    if choices and (misplaced := [each for each in choices if Path(each).is_file()]):
        raise ConfigError(f"--choices: {misplaced[0]} is a file, not a text; put pictures before the options")
    if choices and len(set(choices)) < max(2, len(choices)):
        raise ConfigError("--choices must be at least two texts, all different; correct it")
    from cfvlm_ds.demo.family_checkpoints import is_random
    from cfvlm_ds.evaluation.generation import write
    from cfvlm_ds.models import load_config

    config, adapter = model_named(model, limits)
    scorer, collator, world = load_scorer(config, adapter, max_pixels=DataConfig().max_pixels)
    if is_random(Path(config.name_or_path)):
        say(f"note: {config.name_or_path} is a small model with random weights; its texts mean nothing")
    stored, loaded = load_config(config.name_or_path).dtype, scorer.model.dtype
    if stored not in (None, loaded):
        names = [str(dtype).removeprefix("torch.") for dtype in (loaded, stored)]
        say(f"note: computed in {names[0]}, as by evaluate; transformers loads the weights in {names[1]} by default")
    failed = 0
    for path in picture or iter(_line, ""):
        try:
            answer = (
                _preferences(scorer, collator, world, Path(path), prompt, choices)
                if choices
                else write(scorer.model, collator, world.device, (Path(path),), prompt, max_new_tokens, do_sample=False)
            )
        except DataError as error:
            failed += 1
            print_line(f"error: {path}: {error}", error=True)
        else:
            print(f"{path}\n{answer}\n", flush=True)
    if failed and not (sys.stdin and sys.stdin.isatty() and not picture):
        raise DataError(f"{failed} pictures could not be described; see the errors above")


def _line() -> str:
    if sys.stdin is None:  # standard input is closed
        return ""
    if sys.stdin.isatty():
        print("picture (empty line to quit): ", end="", flush=True)
    return sys.stdin.readline().strip()


def _preferences(scorer: Any, collator: Any, world: Any, picture: Path, prompt: str, choices: list[str]) -> str:
    """Return a table of the texts (most likely first), followed by the preferred text and a legend of the columns."""
    from cfvlm_ds.core.groups import Candidate, CounterfactualGroup
    from cfvlm_ds.evaluation import score_groups

    texts = tuple(Candidate(prompt, text) for text in choices)
    group = CounterfactualGroup(str(picture), ((picture,),), texts, ((1, *(None for _ in choices[1:])),))
    (scores,) = score_groups(scorer, collator, [group], world, label="choices")
    rows = sorted(zip(scores.logp[0].tolist(), scores.blank.tolist(), choices, strict=True), reverse=True)
    lines = [f"{'nats':>9} {'behind':>9} {'blank':>9} {'gain':>9}  text"]
    lines += [f"{seen:9.2f} {rows[0][0] - seen:9.2f} {blank:9.2f} {seen - blank:9.2f}  {quoted(text)}" for seen, blank, text in rows]
    gained = max(rows, key=lambda row: row[0] - row[1])[2]
    preferred = f"preferred: {quoted(rows[0][2])} by nats, which the metric pair compares"
    if gained != rows[0][2]:
        preferred += f"; by gain, which leaves out the language prior: {quoted(gained)}"
    return "\n".join([*lines, preferred, _COLUMNS])


_COLUMNS = (
    "nats: log p(text | picture), usually lower for a longer text; behind: distance to the first row; blank: nats on a blank picture; "
    "gain: nats - blank"
)
