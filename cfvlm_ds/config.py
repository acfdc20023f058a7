"""The run configuration: nested dataclasses <- YAML <- dotted command line; strict; printable.

Names follow transformers' TrainingArguments where it has one. The DeepSpeed JSON owns ZeRO, precision and offload; the run configuration
owns batch sizes, learning rates and steps; "auto" in the JSON takes the run's value, and a contradiction is an error (see engine.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cfvlm_ds.errors import InputError
from cfvlm_ds.hints import nearest
from cfvlm_ds.reading import MAX_SETTINGS, read_bytes


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the option, its value and the remedy."""


Kind = Literal["meaning", "fixed", "speed", "bookkeeping"]


def _declared(kind: Kind, default: Any, default_factory: Any) -> Any:
    given = {"default": default} if default_factory is None else {"default_factory": default_factory}
    return field(**given, metadata={"kind": kind})


def meaning(default: Any = None, default_factory: Any = None) -> Any:
    """An option that decides what is trained: changed on a resume, it is refused unless ``train.resume_changes`` allows it."""
    return _declared("meaning", default, default_factory)


def fixed(default: Any = None, default_factory: Any = None) -> Any:
    """An option of ``meaning`` with which no checkpoint of another value can be continued."""
    return _declared("fixed", default, default_factory)


def speed(default: Any = None, default_factory: Any = None) -> Any:
    """An option that decides how fast and with how much memory the same is trained; it may change on a resume."""
    return _declared("speed", default, default_factory)


def bookkeeping(default: Any = None, default_factory: Any = None) -> Any:
    """An option of names, records, checks and stops, or of what is compared by its contents; it may change on a resume."""
    return _declared("bookkeeping", default, default_factory)


@dataclass(frozen=True)
class ModuleConfig:
    """One of the three modules of a vision-language model.

    Args:
        tuning: ``full`` trains every weight, ``lora`` adapters beside the linear layers, ``frozen`` nothing.
        learning_rate: the module's own peak learning rate; ``train.learning_rate`` when not given.
    """

    tuning: Literal["full", "lora", "frozen"] = fixed("full")
    learning_rate: float | None = meaning(None)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) of the modules whose ``tuning`` is ``lora``.

    Args:
        rank: rank of an adapter.
        alpha: an adapter's output is scaled by alpha / rank.
        dropout: dropout of an adapter's input.
        load_in_4bit: keep the language model's own weights in 4 bits (QLoRA, arXiv 2305.14314); needs bitsandbytes, and ZeRO-2.
        dora: also train the length of every weight row (DoRA, arXiv 2402.09353).
        rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int = fixed(16)
    alpha: float = meaning(32.0)
    dropout: float = meaning(0.0)
    dora: bool = fixed(False)
    rslora: bool = meaning(False)
    load_in_4bit: bool = fixed(False)

    @property
    def scaling(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The model to fine-tune.

    Args:
        name_or_path: model folder or hub name.
        attn_implementation: ``auto`` takes flash-attn where it is available, else sdpa; or ``flash_attention_2``, ``varlen`` (torch's
            kernel, GPU), ``sdpa``, ``cascade`` (CPU, long prompts).
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        min_pixels: scale smaller images up to this many pixels (Qwen-VL).
        max_pixels: scale larger images down to this many pixels, and so bound their visual tokens (Qwen-VL).
        max_tiles: cut an image into at most this many tiles (LLaVA-NeXT, OneVision, InternVL, Idefics3, SmolVLM).
        vision_tower: tuning and learning rate of the vision tower.
        projector: tuning and learning rate of the projector.
        language_model: tuning and learning rate of the language model and its output head.
        lora: the adapters of the modules that are tuned by them.
    """

    name_or_path: str = bookkeeping("")
    attn_implementation: str = speed("auto")
    gradient_checkpointing: bool = speed(False)
    min_pixels: int | None = meaning(None)
    max_pixels: int | None = meaning(None)
    max_tiles: int | None = meaning(None)
    vision_tower: ModuleConfig = field(default_factory=ModuleConfig)
    projector: ModuleConfig = field(default_factory=ModuleConfig)
    language_model: ModuleConfig = field(default_factory=ModuleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


IMAGE_LIMITS = ("min_pixels", "max_pixels", "max_tiles")
"""The options of a ModelConfig that bound the visual tokens of an image."""


@dataclass(frozen=True)
class DataSet:
    """A manifest with a format and a place of its own.

    Args:
        path: manifest of counterfactual groups.
        root: as ``data.root``, which it has when not given.
        format: as ``data.format``, which it has when not given.
    """

    path: str
    root: list[str] | str | None = None
    format: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data.

    Args:
        train: manifest of counterfactual groups.
        evaluation: name -> manifest, evaluated every ``train.eval_steps`` and at the end; or name -> {path: manifest, root: FOLDERS,
            format: NAME} where a manifest has a root or a format of its own (``--data.evaluation.NAME.root FOLDER``).
        format: format of the manifests, a name in ``cfvlm_ds.data.FORMATS``.
        root: folder of the images, or a list of folders; the manifest's own when not given. Paths in a manifest are absolute, or relative
            to the first of them that has the file; what a path leads to, through links too, must be inside one of them.
        scores: file written by ``cfvlm-ds score`` with reference and blind log-likelihoods of the training manifest (DPO and PMI need it).
        max_pixels: refuse images with more pixels than this.
        check: ``full`` opens every image before training starts; ``rows`` checks the manifests only.
        on_error: what all ranks do when a training group turns out to be unreadable during training, such as by an image that was damaged
            after the check: ``error``, or ``skip`` the whole group. skipped.json in the run folder lists those.
        max_skipped: groups that ``skip`` may leave out in a run; one more is an error.
        num_workers: processes that prepare batches, per rank; one per spare core, at most 4, when not given.
        max_tokens_per_micro_batch: pack whole groups up to this many tokens into a micro-batch, in place of
            ``train.per_device_train_batch_size`` of them; ranks then have equal work whatever the sizes of images and texts.
        max_tokens_per_forward: run a larger micro-batch as several forwards of at most this many tokens, twice (a gradient cache, arXiv
            2101.06983): the memory of one, the same gradients, about a third more time. An image's texts are divided where they are more.
        feature_cache: folder for what a frozen vision tower gives for each picture; filled before the first step, after which the tower
            never runs. Every rank must see it; runs may share it. docs/families.md says what it takes on disk.
    """

    train: str = bookkeeping("")
    evaluation: dict[str, str | DataSet] = bookkeeping(default_factory=dict)
    format: str = bookkeeping("cfgroup")
    root: list[str] | str | None = bookkeeping(None)
    scores: str | None = bookkeeping(None)
    max_pixels: int = bookkeeping(50_000_000)
    check: Literal["full", "rows"] = bookkeeping("full")
    on_error: Literal["error", "skip"] = bookkeeping("error")
    max_skipped: int = bookkeeping(10)
    num_workers: int | None = speed(None)
    max_tokens_per_micro_batch: int | None = meaning(None)
    max_tokens_per_forward: int | None = speed(None)
    feature_cache: str | None = speed(None)

    @property
    def train_set(self) -> DataSet:
        """The training manifest with its root and format."""
        return DataSet(self.train, self.root, self.format)

    @property
    def evaluation_sets(self) -> dict[str, DataSet]:
        """The evaluation manifests, each with its root and format."""
        sets = {name: DataSet(split) if isinstance(split, str) else split for name, split in self.evaluation.items()}
        return {
            name: DataSet(split.path, self.root if split.root is None else split.root, split.format or self.format)
            for name, split in sets.items()
        }

    @property
    def workers(self) -> int:
        """``num_workers``, or the machine's."""
        return default_workers() if self.num_workers is None else self.num_workers


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and the run folder.

    Args:
        output_dir: run folder: configuration, metrics, checkpoints, tracking store, export.
        per_device_train_batch_size: groups per micro-batch and rank (see also ``data.max_tokens_per_micro_batch``).
        gradient_accumulation_steps: micro-batches per optimizer step.
        per_device_eval_batch_size: groups per evaluation batch and rank, scored in forwards of at most ``data.max_tokens_per_forward`` (or
            else ``data.max_tokens_per_micro_batch``) tokens.
        learning_rate: peak learning rate of every module without one of its own.
        weight_decay: AdamW's decoupled weight decay; biases and norms are exempt.
        adam_beta1: AdamW's first-moment decay.
        adam_beta2: AdamW's second-moment decay.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: clip the global gradient norm to this; 0 for no clipping.
        lr_scheduler_type: a schedule name of transformers, such as cosine, linear, constant_with_warmup.
        warmup_ratio: share of all steps over which the learning rate rises linearly.
        num_train_epochs: passes over the training groups, when ``max_steps`` is not given.
        max_steps: optimizer steps; -1 to use ``num_train_epochs``.
        seed: seed of sampling order and of anything random.
        bf16: ``auto`` trains in bfloat16 where the device has it, else in float32; or ``true`` / ``false``.
        logging_steps: steps between progress lines and metric records.
        eval_steps: steps between evaluations; 0 evaluates at the end only.
        eval_shuffled: the evaluation at the end also scores every group's texts on another group's image, which shows what language alone
            achieves; it costs one more image and its texts per group.
        save_steps: steps between checkpoints; 0 saves at the end only.
        save_minutes: also save when this much time has passed since the last checkpoint; 0 never.
        save_total_limit: newest checkpoints kept; 0 keeps all.
        save_keep_every: also keep checkpoints whose step is a multiple of this; 0 none.
        save_best: also keep the checkpoint with the highest value of this metric, which is saved when an evaluation finds it; a name as in
            metrics.jsonl, such as ``eval/test/group``.
        resume: ``auto`` continues from the newest complete checkpoint of output_dir if there is one; ``never`` starts anew and refuses a
            folder that has any; ``restart`` is ``auto``, but starts at step 0 beside checkpoints of which none can be used; or the path of
            a checkpoint.
        resume_changes: what a changed option comes to with which a checkpoint would train something else: ``refuse``, naming it; or
            ``allow``, which goes on with the new value and notes it in resume_changes.jsonl in the run folder.
        on_nonfinite: what all ranks do when the loss of one of them, or the gradient, is NaN or infinite: ``stop``, or ``skip`` the step,
            up to 10 in a row. No weight changes either way, and nonfinite.jsonl in the run folder lists the groups.
        stop_margin_s: stop, save and leave with exit code 85 when a Slurm job has less than this many seconds left, beside the time of the
            longest step so far (its evaluation and checkpoint included); it must cover a first checkpoint.
        hang_timeout_s: leave with exit code 86 when a rank shows no life, or a step no progress, for this many seconds; 0 for never.
        self_check: what comes of weights that are not finite, or of scores in packed rows that differ from ordinary forwards by more than
            the precision explains, before the first step: ``error``, ``warn`` and go on, or ``off``, which does not look.
        displacement_warning: warn when the factual log-likelihood falls this many nats per token below its start.
        figures: draw the learning curves and some groups' score matrices at the end.
        export: write a Hugging Face folder, ``output_dir/export``, at the end; where nothing but adapters trains, ``output_dir/adapter``.
        dry_run: only report sizes, what trains and memory per GPU; needs no GPU, weights or data.
    """

    output_dir: str = bookkeeping("runs/default")
    per_device_train_batch_size: int = speed(8)
    gradient_accumulation_steps: int = speed(1)
    per_device_eval_batch_size: int = speed(16)
    learning_rate: float = meaning(1e-5)
    weight_decay: float = meaning(0.0)
    adam_beta1: float = meaning(0.9)
    adam_beta2: float = meaning(0.999)
    adam_epsilon: float = meaning(1e-8)
    max_grad_norm: float = meaning(1.0)
    lr_scheduler_type: str = meaning("cosine")
    warmup_ratio: float = meaning(0.03)
    num_train_epochs: float = meaning(1.0)
    max_steps: int = meaning(-1)
    seed: int = fixed(0)
    bf16: Literal["auto", True, False] = meaning("auto")
    logging_steps: int = bookkeeping(10)
    eval_steps: int = bookkeeping(0)
    eval_shuffled: bool = bookkeeping(True)
    save_steps: int = bookkeeping(500)
    save_minutes: float = bookkeeping(0.0)
    save_total_limit: int = bookkeeping(2)
    save_keep_every: int = bookkeeping(0)
    save_best: str | None = bookkeeping(None)
    resume: str = bookkeeping("auto")
    resume_changes: Literal["refuse", "allow"] = bookkeeping("refuse")
    on_nonfinite: Literal["stop", "skip"] = bookkeeping("stop")
    stop_margin_s: float = bookkeeping(120.0)
    hang_timeout_s: float = bookkeeping(600.0)
    self_check: Literal["error", "warn", "off"] = bookkeeping("error")
    displacement_warning: float = bookkeeping(0.1)
    figures: bool = bookkeeping(True)
    export: bool = bookkeeping(True)
    dry_run: bool = bookkeeping(False)


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow.

    Args:
        enabled: record the run in MLflow; metrics.jsonl is written either way. MLFLOW_TRACKING_URI names a server; without it the store is
            the run folder itself.
        experiment: experiment name.
        run_name: run name; the output folder's name when not given.
    """

    enabled: bool = bookkeeping(True)
    experiment: str = bookkeeping("cfvlm_ds")
    run_name: str | None = bookkeeping(None)


@dataclass(frozen=True)
class ScenesConfig:
    """The embedded world of scenes, written as an ordinary manifest with PNG files.

    Args:
        out_dir: folder to write; left alone if it already holds this world.
        num_train: training groups.
        num_test: groups of each test split.
        num_counterfactuals: counterfactual pairs per training group.
        image_size: side of the square images in pixels.
        sham_share: share of training groups with a sham image.
        seed: seed of everything random.
        edit_weights: how often each edit type is drawn in training; all equally often when not given.
    """

    out_dir: str
    num_train: int = 4000
    num_test: int = 400
    num_counterfactuals: int = 1
    image_size: int = 48
    sham_share: float = 0.0
    seed: int = 0
    edit_weights: dict[str, float] | None = None


@dataclass(frozen=True)
class TinyLlavaConfig:
    """A small, randomly initialised LLaVA whose tokenizer is trained on the captions of the embedded world; 1.04 M parameters.

    Args:
        out_dir: folder to write; left alone if it is there.
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        hidden_size: width of the language model.
        vision_hidden_size: width of the tower.
        seed: seed of the initial weights.
    """

    out_dir: str
    image_size: int = 48
    patch_size: int = 12
    hidden_size: int = 128
    vision_hidden_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class BuildConfig:
    """What to build before training if it is not there; nothing by default.

    Args:
        scenes: the embedded world of scenes.
        tiny_llava: a small model to train on it.
    """

    scenes: ScenesConfig | None = bookkeeping(None)
    tiny_llava: TinyLlavaConfig | None = bookkeeping(None)


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "tracking": TrackingConfig, "build": BuildConfig}


def kinds(section: type, prefix: str) -> dict[str, Kind | None]:
    """What a change of each option of a section means on a resume, by its name behind ``prefix``; None where its field does not say."""
    found: dict[str, Kind | None] = {}
    for option in fields(section):
        if dataclasses.is_dataclass(option.default_factory):
            found |= kinds(option.default_factory, f"{prefix}{option.name}.")
        else:
            found[prefix + option.name] = option.metadata.get("kind")
    return found


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; ``objective`` maps the names of the active terms to the terms themselves."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    build: BuildConfig
    objective: Mapping[str, Any]
    deepspeed: str
    resolved: Mapping[str, Any]
    """The same configuration as plain nested values, every default filled in."""


def parse_config(argv: Sequence[str], objectives: Mapping[str, type], prog: str | None = None) -> RunConfig:
    """The run configuration from command-line arguments.

    ``objectives`` maps the name of a term to a dataclass with at least ``weight``; a term of weight 0 is left out. Options may be given as
    ``--train.learning_rate 1e-5`` or ``--train.learning_rate=1e-5``; ``--config FILE`` reads YAML; later ones win.

    Raises ConfigError on an unknown option (naming the nearest valid one) or a value of the wrong type. ``--help`` and ``--print_config``
    print and exit.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Fine-tune a vision-language model with counterfactual objectives under DeepSpeed.",
        epilog="example: deepspeed train.py --deepspeed ds_configs/z3.json --config examples/quickstart.yaml --train.max_steps 100",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_argument("--deepspeed", type=str, default="ds_configs/z3.json", help="DeepSpeed JSON; its 'auto' values take the run's")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher; ignored")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for name, objective in objectives.items():
        parser.add_class_arguments(objective, f"objective.{name}")
    _check_yaml(argv, _option_names(parser))
    try:
        parsed = parser.parse_args(list(argv))
        resolved = parsed.clone().as_dict()
        _refuse_nulls(resolved, parser.get_defaults().as_dict())
        built = parser.instantiate(parsed)
    except ArgumentError as error:
        message = str(error).replace("<unicode string>", (_config_files(argv) or ["--config"])[-1])
        raise ConfigError(_one_sentence(message, _option_names(parser))) from error
    except ConfigError:
        raise
    except Exception as error:  # the parser and YAML raise nearly anything on bytes that are no text, tags and thousands of brackets
        given = ", ".join(_config_files(argv)) or "the options"
        raise ConfigError(f"{given}: not a configuration ({type(error).__name__}: {error}); write YAML as in examples/") from error
    for key in ("config", "local_rank"):
        resolved.pop(key, None)
    _check_ranges(resolved)
    terms = {name: getattr(built.objective, name) for name in objectives}
    active = {name: term for name, term in terms.items() if term.weight != 0}
    if not active:
        raise ConfigError("every objective has weight 0; give at least one of objective.NAME.weight a positive value")
    values = {name: getattr(built, name) for name in SECTIONS}
    return RunConfig(**values, objective=active, deepspeed=parsed.deepspeed, resolved=resolved)


def _config_files(argv: Sequence[str]) -> list[str]:
    separate = [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    return separate + [option.removeprefix("--config=") for option in argv if option.startswith("--config=")]


def _check_yaml(argv: Sequence[str], options: Iterable[str]) -> None:
    """ConfigError on what the parser would wait for, read without end, expand without end, or silently take the last of.

    A named pipe or a file of more than MAX_SETTINGS bytes; a list of nine aliases of a list of nine aliases, and so on; a key given twice.
    """
    sections = {option.rpartition(".")[0] for option in options} - {""}
    sections |= {section[:at] for section in sections for at, letter in enumerate(section) if letter == "."} | {"config"}
    separate = [(flag, value) for flag, value in itertools.pairwise(argv) if "=" not in flag]
    joined = [(flag, value) for flag, equals, value in (option.partition("=") for option in argv) if equals]
    for flag, value in separate + joined:
        if flag.removeprefix("--") in sections and os.path.exists(value):
            try:
                text = read_bytes(value, MAX_SETTINGS).decode()
            except (OSError, UnicodeDecodeError):
                continue  # named by the parser
            except ValueError as error:
                raise ConfigError(f"{flag} {value}: {error}") from error
            check_document(text, value)
        elif flag.startswith("--") and any(letter in value for letter in "*[{\n"):
            check_document(value, value)


def check_document(text: str, named: str) -> None:
    """ConfigError on YAML that takes its parser, or whoever walks what it gives, without end, and on a key given twice."""
    import yaml

    steps = [1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", text)]
    if (deepest := max(itertools.accumulate(steps), default=0)) > _DEPTH:  # YAML's parser takes hours for a hundred thousand
        raise ConfigError(f"{named}: {deepest} brackets inside each other, and {_DEPTH} are the most; write YAML as in examples/")
    mappings: list[dict[str, int] | None] = [None]  # of each open collection: its keys and their lines, or None for a list
    is_key = [False]
    aliases = 0
    with contextlib.suppress(yaml.YAMLError):
        for event in yaml.parse(text):
            aliases += isinstance(event, yaml.AliasEvent)
            if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                mappings.pop()
                is_key.pop()
            keys, line = mappings[-1], event.start_mark.line + 1
            if is_key[-1] and keys is not None and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    where = f"on line {line}, after line {keys[event.value]}"
                    raise ConfigError(f"{named}: key {event.value!r} occurs twice in one section ({where}); keep one of them")
                keys[event.value] = line
            if isinstance(event, (yaml.CollectionStartEvent, yaml.ScalarEvent, yaml.AliasEvent)):
                is_key[-1] = not is_key[-1] and mappings[-1] is not None
            if isinstance(event, yaml.CollectionStartEvent):
                mappings.append({} if isinstance(event, yaml.MappingStartEvent) else None)
                is_key.append(isinstance(event, yaml.MappingStartEvent))
    if aliases > _ALIASES:
        raise ConfigError(f"{aliases} YAML aliases in {named}, and {_ALIASES} are the most; write the values out")


_ALIASES = 20
_DEPTH = 100


def _refuse_nulls(values: Mapping[str, Any], defaults: Mapping[str, Any], section: str = "") -> None:
    """jsonargparse lets a null pass for any option, and a plain value for a section: ConfigError for both."""
    for name, default in defaults.items():
        option, value = f"{section}{name}", values[name]
        if default is not None and value is None:
            raise ConfigError(f"{option}: null is not a value; leave the option out for its default")
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{option}: expected options below it, got {value!r}; see --help")
            _refuse_nulls(value, default, f"{option}.")


_ENDLESS = 2**53
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((f"model.{name}" for name in IMAGE_LIMITS), (1, _ENDLESS)),
    **dict.fromkeys(("model.lora.rank", "train.per_device_train_batch_size", "train.per_device_eval_batch_size"), (1, 1e6)),
    **dict.fromkeys(("data.max_pixels", "data.max_tokens_per_micro_batch", "data.max_tokens_per_forward"), (1, _ENDLESS)),
    **dict.fromkeys(("model.lora.dropout", "train.adam_epsilon", "train.warmup_ratio"), (0, 1)),
    **dict.fromkeys(("train.adam_beta1", "train.adam_beta2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("train.save_minutes", "train.stop_margin_s", "train.hang_timeout_s"), (0, 1e8)),
    **dict.fromkeys((f"train.{name}" for name in ("save_steps", "eval_steps", "save_total_limit", "save_keep_every")), (0, _ENDLESS)),
    **dict.fromkeys((f"train.{name}" for name in ("learning_rate", "max_grad_norm", "weight_decay")), (0, 1e38)),
    **dict.fromkeys((f"model.{name}.learning_rate" for name in ("vision_tower", "projector", "language_model")), (0, 1e38)),
    **dict.fromkeys((f"build.tiny_llava.{name}" for name in ("image_size", "patch_size", "hidden_size", "vision_hidden_size")), (1, 1e4)),
    "data.max_skipped": (0, _ENDLESS),
    "data.num_workers": (0, 1024),
    "train.gradient_accumulation_steps": (1, 1e6),
    "train.logging_steps": (1, _ENDLESS),
    "train.max_steps": (-1, 1e9),
    "train.num_train_epochs": (1e-6, 1e6),
    "train.seed": (0, 2**32 - 1),
}
"""Options -> the least and the most that a run can have. Terms of the objective check their own, but for the two that all of them have."""
_TERM = {"weight": (0, 1e9), "warmup": (0, 1)}


def _check_ranges(resolved: Mapping[str, Any]) -> None:
    """ConfigError on a number that no run can have: one that is not finite, or outside the range of its option."""
    train = resolved["train"]
    for option, value in _numbers(resolved):
        term = _TERM.get(option.rpartition(".")[2]) if option.startswith("objective.") else None
        low, high = term or _RANGES.get(option, (-_ENDLESS, _ENDLESS))
        if not low <= value <= high:
            wrong = f"must not be negative, and is {value}" if value < low == 0 else f"must be from {low:.16g} to {high:.16g}, not {value}"
            raise ConfigError(f"{option} {wrong}; leave it out for the default")
    if train["max_steps"] == 0:
        raise ConfigError("train.max_steps must be at least 1, or -1 to use train.num_train_epochs, not 0")
    for split, given in resolved["data"]["evaluation"].items():
        if isinstance(given, str) and given.lstrip().startswith("{"):  # the parser takes an object that it cannot read for a path
            raise ConfigError(
                f"data.evaluation: {given} is not a manifest; give NAME: PATH, or NAME: {{path: PATH, root: ..., format: ...}}"
            )
        if not re.fullmatch(r"\w[\w.+-]{0,99}", split, re.ASCII):
            raise ConfigError(f"data.evaluation: {split!r} names files and metrics; use letters, digits and _ . + - for it")
    tower = resolved["model"]["vision_tower"]["tuning"]
    if (folder := resolved["data"]["feature_cache"]) is not None and tower != "frozen":
        raise ConfigError(
            f"data.feature_cache {folder!r} keeps what a frozen tower gives, and model.vision_tower.tuning is {tower}; set that to frozen "
            "or leave the cache out"
        )
    if (best := train["save_best"]) is not None:
        splits = sorted(resolved["data"]["evaluation"])
        if not train["eval_steps"]:
            raise ConfigError(f"train.save_best {best!r} needs evaluations during training; set train.eval_steps")
        if not any(best.startswith(f"eval/{split}/") for split in splits):
            raise ConfigError(
                f"train.save_best {best!r} is no metric of data.evaluation ({', '.join(splits) or 'empty'}); write eval/SPLIT/METRIC"
            )


_SPLITS = "give NAME: PATH, or NAME: {path: PATH, root: FOLDER, format: NAME} with any of the last two"


def _numbers(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{section}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{section}{name}", value


def _option_names(parser: Any) -> list[str]:
    """Every dotted option, those of the optional sections of ``build`` included, which the parser itself does not list."""
    nested = {"build.scenes": ScenesConfig, "build.tiny_llava": TinyLlavaConfig}
    return [a.dest for a in parser._actions] + [f"{name}.{f.name}" for name, section in nested.items() for f in fields(section)]


def _one_sentence(message: str, names: Sequence[str]) -> str:
    """jsonargparse's message on one line, with the nearest valid option where the user named an unknown one."""
    message = " ".join(message.split())
    if f"'{__name__}.{DataSet.__name__}'" in message:  # pages about classes that nobody named
        return f"data.evaluation: an entry is not a manifest; {_SPLITS}"
    unknown = re.search(r"(?:[Uu]nrecognized arguments:|[Kk]ey|[Oo]ption) '?-{0,2}([\w.-]+)'?", message)
    if not unknown or unknown[1] in names:
        return message.removeprefix("Parser key ").replace('"', "")
    # A key of a YAML section is reported beside its section; one that was given without any is compared with the last parts of options.
    section = re.search(r"Group '([\w.]+)'|Parser key \"([\w.]+)\"", message)
    option = f"{section[1] or section[2]}.{unknown[1]}" if section else unknown[1]
    near = nearest(option, names)
    return f"unknown option {option!r}" + (f"; did you mean {near!r}?" if near else "; see --help")


def cores_per_rank() -> int:
    """Cores of this machine for each rank on it."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def default_workers() -> int:
    """Data workers per rank when not configured: the cores beside the one that computes, at least 1 and at most 4."""
    return max(1, min(4, cores_per_rank() - 1))
