"""Commands: ``train.py`` for the launcher, ``cfvlm-ds`` for everything else. Bad input ends with one sentence and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvlm_ds import stopping
from cfvlm_ds.config import IMAGE_LIMITS, BuildConfig, ConfigError, DataConfig, ModelConfig, ScenesConfig, parse_config
from cfvlm_ds.errors import mask_tracebacks
from cfvlm_ds.groups import DataError
from cfvlm_ds.run_folder import named_model, recorded_model
from cfvlm_ds.untrusted import output_file, write_text

if TYPE_CHECKING:
    from cfvlm_ds.collate import Collator
    from cfvlm_ds.models import Scorer

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart.yaml"


def train_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of train.py: bare, it runs examples/quickstart.yaml."""
    arguments = _with_quickstart(sys.argv[1:] if argv is None else argv)
    mask_tracebacks()
    _print_anything()
    stopping.install()
    _exit_cleanly(lambda: run(arguments))


def _with_quickstart(argv: Sequence[str]) -> list[str]:
    """The options of a run: small changes of the quickstart, or where they name a model, data or a file of options, these and no others."""
    given = {option[2:].partition("=")[0] for option in argv if option.startswith("--")}
    if given & {"model", "data"} or any(name == own or name.startswith(f"{own}.") for name in given for own in _OF_ONES_OWN):
        return list(argv)
    # Its max_steps would win over epochs that were asked for.
    by_epochs = ["--train.max_steps", "-1"] if "train.num_train_epochs" in given and "train.max_steps" not in given else []
    return ["--config", str(QUICKSTART), *by_epochs, *argv]


_OF_ONES_OWN = ("config", "model.name_or_path", *(f"data.{name}" for name in ("train", "evaluation", "format", "root", "scores")))


def run(arguments: Sequence[str]) -> None:
    """Parse, build what the configuration asks to be built, train."""
    from cfvlm_ds.objectives import OBJECTIVES

    config = parse_config(arguments, OBJECTIVES, prog="train.py")
    if config.train.dry_run:
        from cfvlm_ds.dry_run import dry_run

        print(dry_run(config))
        return
    from cfvlm_ds.engine import start
    from cfvlm_ds.training import train
    from cfvlm_ds.validation import validate

    world = start()
    if config.build.scenes or config.build.tiny_llava:
        validate(config, world)
        if world.is_main:
            build(config.build)
        world.wait()
    train(config, world)


def build(config: BuildConfig) -> None:
    """Write the embedded world and the small model, where they are asked for and not there yet."""
    if config.scenes is not None:
        from cfvlm_ds.scenes import build_scenes

        build_scenes(config.scenes)
    if config.tiny_llava is not None:
        from cfvlm_ds.models.tiny import build_tiny_llava
        from cfvlm_ds.scenes import all_captions

        build_tiny_llava(config.tiny_llava, all_captions(seed=0, num_captions=5000))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of cfvlm-ds."""
    parser = argparse.ArgumentParser(prog="cfvlm-ds", description="Data, scores, evaluation and export for counterfactual fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True)

    data = commands.add_parser("data", help="build or check manifests").add_subparsers(dest="action", required=True)
    command = _command(data, "build", _data_build, "write the embedded world of scenes", "cfvlm-ds data build scenes --num_train 4000")
    _fields(command, ScenesConfig)
    command = _command(data, "check", _data_check, "report everything wrong with a manifest", "cfvlm-ds data check groups.jsonl")
    command.add_argument("manifest")
    _data_options(command)
    command.add_argument("--model", help="model folder or hub name; also checks that every text fits its window")
    _model_options(command)

    command = _command(commands, "tiny", _tiny, "write a small random model for smoke tests", "cfvlm-ds tiny qwen2_5_vl runs/tiny-qwen")
    command.add_argument("family", help="a model type such as llava, llava_onevision, qwen2_vl, qwen3_vl, internvl")
    command.add_argument("out_dir", help="folder to write")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")

    for name, function, text in (
        ("score", _score, "write reference and blind scores of a manifest, for DPO and PMI"),
        ("evaluate", _evaluate, "accuracies by edit type, with rows for chance and for what language alone achieves"),
    ):
        command = _command(commands, name, function, text, f"cfvlm-ds {name} runs/quickstart/export runs/quickstart/scenes/test_iid.jsonl")
        taken = ", or folder of adapters" if name == "evaluate" else ""
        command.add_argument("model", help=f"model folder or hub name, run folder{taken}")
        command.add_argument("manifest", nargs="+" if name == "evaluate" else None)
        command.add_argument("--out", help="file to write (score: default MANIFEST.scores.jsonl; evaluate: JSON, default none)")
        command.add_argument("--batch_size", type=_positive, default=16, help="groups per batch (default 16)")
        limit = "tokens per forward at most; a larger batch is scored in several (default: one forward per batch)"
        command.add_argument("--max_tokens_per_forward", type=_positive, metavar="N", help=limit)
        if name == "evaluate":
            text = "leave out the row of another group's image, which costs one more image and its texts per group"
            command.add_argument("--no_shuffled", action="store_true", help=text)
        _data_options(command)
        _model_options(command)

    command = _command(commands, "export", _export, "a DeepSpeed checkpoint as a Hugging Face folder", "cfvlm-ds export runs/quickstart")
    command.add_argument("run", help="run folder, or one of its checkpoints")
    command.add_argument(
        "--adapter", action="store_true", help="only the LoRA adapters, in peft's format, instead of merged into the model"
    )
    command.add_argument("--out", help="folder to write (default RUN/export, or RUN/adapter)")

    cluster = commands.add_parser("cluster", help="what slurm/launch.sh asks").add_subparsers(dest="action", required=True)
    command = _command(
        cluster, "check", _cluster_check, "check the nodes of a job, one task each", "cfvlm-ds cluster check runs/mine/nodes"
    )
    command.add_argument("folder", help="shared folder for one line per node")
    command.add_argument("--timeout_s", type=float, default=30.0, help="seconds for the meeting, and for the collective (default 30)")
    text = "the output_dir that options of train.py mean"
    command = _command(cluster, "output_dir", _cluster_output_dir, text, "cfvlm-ds cluster output_dir -- --config examples/quickstart.yaml")
    command.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py, behind --")

    arguments = parser.parse_args(argv)
    mask_tracebacks()
    _print_anything()
    _exit_cleanly(lambda: _files_named(lambda: arguments.function(arguments)))


def _data_build(arguments: argparse.Namespace) -> None:
    build(BuildConfig(scenes=ScenesConfig(**_values(arguments, ScenesConfig))))


def _tiny(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.models.small import write_small

    print(f"wrote {write_small(arguments.family, Path(arguments.out_dir), arguments.seed)}")


def _data_check(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data import check_manifest

    collator = _load_collator(_model(arguments)[0], arguments.max_pixels) if arguments.model else None
    report = check_manifest(
        arguments.manifest,
        arguments.root,
        arguments.format,
        lengths=collator,
        max_pixels=arguments.max_pixels,
    )
    print(report)
    if not report.ok:
        more = len(report.problems) - 1
        raise DataError(report.problems[0] + (f" ({more} more, listed above)" if more else ""))


def _score(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.data import data_roots, read_manifest
    from cfvlm_ds.data.identity import data_identity
    from cfvlm_ds.data.pictures import PictureTable
    from cfvlm_ds.data.scores import write_scores
    from cfvlm_ds.evaluation import score_groups

    groups = read_manifest(arguments.manifest, arguments.root, arguments.format)
    from cfvlm_ds.models import fingerprint

    model, adapter = _model(arguments)
    if adapter is not None:
        raise ConfigError(f"{adapter} holds adapters, and stored scores belong to one model; merge them with `cfvlm-ds export`, name that")
    out = output_file(Path(arguments.out or f"{arguments.manifest}.scores.jsonl"))
    scorer, collator, world = _load_scorer(model, max_pixels=arguments.max_pixels)
    collator.checked = PictureTable.of_files(picture for group in groups for image in group.images for picture in image)
    identity = data_identity(groups, data_roots(arguments.manifest, arguments.root), collator.checked)
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
    from cfvlm_ds.data import named_apart, read_manifest
    from cfvlm_ds.evaluation import evaluate, table

    if arguments.out:
        output_file(Path(arguments.out))
    splits = {name: read_manifest(path, arguments.root, arguments.format) for name, path in named_apart(arguments.manifest).items()}
    scorer, collator, world = _load_scorer(*_model(arguments), max_pixels=arguments.max_pixels)
    results, _ = evaluate(scorer, collator, splits, world, shuffled=not arguments.no_shuffled, **_batches(arguments))
    print(table(results))
    if arguments.out:
        write_text(Path(arguments.out), json.dumps({split: [vars(row) for row in rows] for split, rows in results.items()}, indent=1))


def _export(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.checkpoint import damaged, description, incomplete, newest
    from cfvlm_ds.export import export_adapter, export_hf

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
    print(f"exported to {write(checkpoint, model.name_or_path, out, lora=model.lora)}")


def _cluster_check(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.cluster import check

    line = check(Path(arguments.folder), arguments.timeout_s)
    sys.stdout.flush()
    os._exit(0 if line == "ok" else 1)  # tearing down torch takes longer than the check


def _cluster_output_dir(arguments: argparse.Namespace) -> None:
    from cfvlm_ds.objectives import OBJECTIVES

    options = arguments.options[1:] if arguments.options[:1] == ["--"] else arguments.options
    print(Path(parse_config(_with_quickstart(options), OBJECTIVES, prog="train.py").train.output_dir).absolute())


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _batches(arguments: argparse.Namespace) -> dict[str, Any]:
    remedy = f"lower --batch_size ({arguments.batch_size}), set --max_tokens_per_forward, --model.max_pixels or --model.max_tiles"
    return {"batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens_per_forward, "remedy": remedy}


def _load_collator(model: ModelConfig, max_pixels: int) -> Collator:
    from cfvlm_ds.collate import load_collator

    return load_collator(model, "full", max_pixels)


def _load_scorer(model: ModelConfig, adapter: Path | None = None, *, max_pixels: int) -> tuple[Scorer, Collator, Any]:
    """A model, with the adapters of a folder if one is named, in one process, on the GPU if there is one."""
    import torch

    from cfvlm_ds.distributed import World
    from cfvlm_ds.models import Scorer, attach_adapters, family_of, load_model
    from cfvlm_ds.self_check import refuse_unusable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if adapter is not None:
        loaded = attach_adapters(loaded, adapter)
    scorer, collator = Scorer(loaded, family_of(loaded.config)).to(device).eval(), _load_collator(model, max_pixels)
    refuse_unusable(scorer, collator, model.name_or_path, device)
    return scorer, collator, World(0, 1, 0, device)


def _command(parent: Any, name: str, function: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
    command = parent.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    command.set_defaults(function=function)
    return command


def _data_options(command: argparse.ArgumentParser) -> None:
    defaults = DataConfig()
    command.add_argument("--format", default=defaults.format, help=f"manifest format (default {defaults.format})")
    text = "folder of the images (default: the manifest's); may be given several times, absolute paths and links may lead into each"
    command.add_argument("--root", action="append", metavar="FOLDER", help=text)
    command.add_argument("--max_pixels", type=int, default=defaults.max_pixels, help=f"image size limit (default {defaults.max_pixels})")


def _model_options(command: argparse.ArgumentParser) -> None:
    for name in IMAGE_LIMITS:
        command.add_argument(f"--model.{name}", type=_positive, metavar="N", help="as in training; the model's own when not given")


def _model(arguments: argparse.Namespace) -> tuple[ModelConfig, Path | None]:
    """The model that a command names, images bounded as in the run that made it unless the command says otherwise; and its adapters."""
    named = named_model(arguments.model)
    limits = {name: getattr(arguments, f"model.{name}") or getattr(named.recorded, name) for name in IMAGE_LIMITS}
    return ModelConfig(named.name_or_path, **limits), named.adapter


def _fields(command: argparse.ArgumentParser, section: type) -> None:
    """Options for the fields of a configuration section; the first is positional."""
    first, *rest = dataclasses.fields(section)
    command.add_argument(first.name)
    for field in rest:
        if not isinstance(field.default, (int, float)):
            continue  # nested values belong in a run's YAML
        command.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=f"default {field.default}")


def _values(arguments: argparse.Namespace, section: type) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(section) if hasattr(arguments, field.name)}


def _print_anything() -> None:
    """Captions and paths are in any script; what the terminal's encoding lacks is printed by its number and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _files_named(function: Callable[[], None]) -> None:
    """What the system has against a file that a command reads or writes, such as a full disk, is one sentence too."""
    try:
        function()
        sys.stdout.flush()
    except (BrokenPipeError, ConnectionError, TimeoutError) as error:
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        sys.exit(_PIPE_CLOSED)
    except OSError as error:
        if error.errno is None:
            raise
        named = f"{error.filename}: " if error.filename is not None else ""
        raise ConfigError(f"{named}{error.strerror}; make room, or correct the path or its permissions") from error


_PIPE_CLOSED = 141  # what shells have for a program that SIGPIPE has ended


def _exit_cleanly(function: Callable[[], None]) -> None:
    """Bad input is the user's to mend: one sentence on stderr and exit code 2, no traceback."""
    try:
        function()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:  # of a command; a training answers Ctrl-C itself
        sys.exit(stopping.EXIT_INTERRUPTED)
