"""What is wrong with the options that were given, in one sentence: what the parser says of it is written for programmers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cfvlm_ds.core.data_config import EvaluationSet, Source
from cfvlm_ds.core.reading import parse_yaml, read_yaml
from cfvlm_ds.core.text import one_line

SPLITS = (
    "give NAME: PATH, or NAME: {path: PATH, root: FOLDER, format: NAME} with any of the last two, or NAME: {benchmark: NAME, root: FOLDER}"
)
_SOURCES = "give FILE, or a list of {path: FILE, weight: NUMBER, root: FOLDER, format: NAME} with any of the last three"
_ELSEWHERE_CALLED = {
    **dict.fromkeys(("bs", "batch", "bsz", "batch_size", "micro_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps", "ga_steps"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "clip"), "train.max_grad_norm"),
    **dict.fromkeys(("warmup", "warmup_steps"), "train.warmup_ratio"),
    **dict.fromkeys(("model", "model.path", "model.name", "model.checkpoint"), "model.name_or_path"),
    **dict.fromkeys(("manifest", "data.path", "data.manifest", "dataset", "data_path", "train_file", "train_dataset"), "data.train"),
    **dict.fromkeys(("image_folder", "media_dir", "dataset_dir"), "data.root"),
    **dict.fromkeys(("val", "validation", "data.val", "data.validation", "eval_dataset", "val_dataset"), "data.evaluation"),
    **dict.fromkeys(("precompute_ref_log_probs", "ref_model"), "data.scores"),
    **dict.fromkeys(("dataloader_num_proc", "workers"), "data.num_workers"),
    **dict.fromkeys(("freeze_vision_tower", "freeze_vit"), "model.vision_tower.tuning"),
    **dict.fromkeys(("freeze_multi_modal_projector", "freeze_aligner", "tune_mm_mlp_adapter"), "model.projector.tuning"),
    **dict.fromkeys(("freeze_language_model", "freeze_llm", "freeze_backbone"), "model.language_model.tuning"),
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "lora_enable", "use_peft"), "model.language_model.tuning"),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules"), "model.language_model.tuning"),
    **dict.fromkeys(("lora_r", "lora_rank", "model.lora.r"), "model.lora.rank"),
    **dict.fromkeys(("bits", "quant_bits", "quantization_bit"), "model.lora.load_in_4bit"),
    **dict.fromkeys(("vit_lr", "vision_lr", "mm_vision_tower_lr"), "model.vision_tower.learning_rate"),
    **dict.fromkeys(("aligner_lr", "mm_projector_lr", "merger_lr"), "model.projector.learning_rate"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.eval_steps"),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model"), "train.save_best"),
    **dict.fromkeys(("dtype", "fp16", "torch_dtype"), "train.bf16"),
    **dict.fromkeys(("rpo_alpha", "sft_alpha"), "objective.align.weight"),
    "epochs": "train.num_train_epochs",
    "betas": "train.adam_beta1",
    "deepspeed": "deepspeed",
    "eps": "train.adam_epsilon",
    "flash_attn": "model.attn_implementation",
    "lora_alpha": "model.lora.alpha",
    "lr": "train.learning_rate",
    "packing": "data.max_tokens_per_micro_batch",
    "report_to": "tracking.enabled",
    "resume_from_checkpoint": "train.resume",
    "scheduler": "train.lr_scheduler_type",
    "tracking.project": "tracking.experiment",
    "wd": "train.weight_decay",
}
"""An option, or its last part, under the name that other programs give it -> its name here."""
_MEANT = {"model": "name_or_path", "data": "train", "lora": "rank"} | dict.fromkeys(
    ("vision_tower", "projector", "language_model"), "tuning"
)
"""The option of a section that somebody means who gives the section a value."""
_SWITCHES = ("help", "print_config", "quiet", "verbose")
_KINDS = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list of texts", dict: "NAME: VALUE",
    NoneType: "null",
}  # fmt: skip
_LIKE, _LIKE_IN_SECTION = 0.75, 0.65


def types_of(sections: Mapping[str, type]) -> dict[str, Any]:
    """Every dotted option and its type, those of optional sections included."""
    found: dict[str, Any] = {"config": str, "deepspeed": str, "local_rank": int}
    for prefix, section in sections.items():
        known = get_type_hints(section)
        for name, hint in ((option.name, known[option.name]) for option in fields(section)):
            inside: Any = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
            found |= {f"{prefix}.{name}": hint} if inside is None else types_of({f"{prefix}.{name}": inside})
    return found


def documents(argv: Sequence[str], types: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, file) of each YAML file among the arguments: of --config, and of a section."""
    for option, value in _arguments(argv):
        if value and (option == "config" or is_section(option, types)) and os.path.exists(value):
            yield option, value


def is_section(option: str, types: Mapping[str, Any]) -> bool:
    """Whether options stand below this one."""
    return any(name.startswith(f"{option}.") for name in types)


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option, value) of each argument; the value is None where there is none. What is no option is one without a value."""
    words = list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        option = flag.removeprefix("--").removesuffix("+")
        if option in _SWITCHES:
            continue
        has_value = bool(equals) or (flag.startswith("--") and words and not words[0].startswith("--"))
        yield option, value if equals else words.pop(0) if has_value else None


def problem_of(argv: Sequence[str], types: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the arguments; None where it is nothing that is known here."""
    files = dict.fromkeys(documents(argv, types))
    for option, value in _arguments(argv):
        if (option, value) in files:
            try:
                given = read_yaml(str(value))
            except (ValueError, RecursionError) as error:
                return f"{value}: {error}; write YAML as in examples/"
            if not isinstance(given, Mapping):
                return f"{value}: no options in it; write YAML as in examples/"
            found = _in_section("" if option == "config" else f"{option}.", given, types)
        elif value is None and option in types:
            found = f"--{option} needs a value; write --{option} VALUE, which is true or false where the option is a switch"
        else:
            found = _of_option(option, value, types, said=True)
        if found:
            return one_line(found, 1000)
    return None


def problem_in(section: str, given: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the options of a section; None where it is nothing that is known here."""
    found = _in_section(f"{section}.", given, types)
    return found and one_line(found, 1000)


def _in_section(prefix: str, given: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    return next(filter(None, (_of_option(f"{prefix}{name}", value, types) for name, value in given.items())), None)


def _of_option(option: str, value: Any, types: Mapping[str, Any], said: bool = False) -> str | None:
    """What is wrong with a value; ``said`` is one of the command line, a text."""
    if is_section(option, types):
        if isinstance(value, Mapping):
            return _in_section(f"{option}.", value, types)
        inside = _MEANT.get(option.rpartition(".")[2])
        remedy = f"set {option}.{inside} to it" if inside else "see --help"
        return None if value is None else f"{option} is a section of options, not {value!r}; {remedy}"
    if option not in types:
        if isinstance(value, Mapping) and value:
            return _in_section(f"{option}.", value, types)
        if any(get_origin(hint) is dict and option.startswith(f"{name}.") for name, hint in types.items()):
            return f"data.evaluation: {value!r} is not a manifest; {SPLITS}"
        if option.endswith((".yaml", ".yml")):
            return f"unknown option {option!r}; a file of options is given by --config {option}"
        near = nearest(option, list(types))
        return f"unknown option {option!r}" + (f"; did you mean {near!r}?" if near else "; see --help")
    try:
        read = parse_yaml(value) if said else value
    except ValueError:
        read = value
    if option == "data.train" and isinstance(read, list):
        return next(filter(None, (_of_part(option, each, Source, _SOURCES) for each in read)), None)
    if option == "data.evaluation":
        if not isinstance(read, Mapping):
            return f"data.evaluation: {read} has no name; {SPLITS}"
        sets = {name: each for name, each in read.items() if not isinstance(each, str)}
        return next(filter(None, (_of_part(f"{option}.{name}", each, EvaluationSet, SPLITS) for name, each in sets.items())), None)
    if read is None or _fits(read, types[option]) or (said and _fits(value, types[option])):
        return None
    kinds = _kinds(types[option])
    expected = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    return f"{option}: expected {expected}, got {value}"


def _of_part(option: str, given: Any, kind: type, remedy: str) -> str | None:
    """What is wrong with a source of a mixture, or an evaluation set."""
    if not isinstance(given, Mapping) or (kind is Source and "path" not in given):
        return f"{option}: {given!r} is not a manifest; {remedy}"
    return _in_section(f"{option}.", given, types_of({option: kind}))


def _fits(value: Any, hint: Any) -> bool:
    """Whether the parser takes a value for this type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if kind not in _KINDS:
        return any(_fits(value, each) for each in get_args(hint))
    if kind is float and isinstance(value, str):  # 1e-5 is a text to YAML
        try:
            return bool(float(value)) or True
        except ValueError:
            return False
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _kinds(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(each).lower() for each in get_args(hint)]
    kind = get_origin(hint) or hint
    return [_KINDS[kind]] if kind in _KINDS else [name for each in get_args(hint) for name in _kinds(each)]


def nearest(option: str, names: Sequence[str]) -> str | None:
    """The one of ``names``, dotted options, that ``option`` may have meant, or None: the option that other programs call so, or the
    likeliest misspelling, where its last part is like the given one's too: most options of a section share half of their letters."""
    section, _, last = option.rpartition(".")
    called = _ELSEWHERE_CALLED.get(option) or (None if section.startswith(("objective", "build")) else _ELSEWHERE_CALLED.get(last))
    if called in names:
        return called
    by_form = {name if section else name.rpartition(".")[2]: name for name in sorted(reversed(names), key=lambda name: -name.count("."))}
    like = _LIKE_IN_SECTION if section else _LIKE
    forms = difflib.get_close_matches(option, by_form, n=3, cutoff=like)
    likely = [form for form in forms if difflib.SequenceMatcher(None, last, form.rpartition(".")[2]).ratio() >= like]
    return by_form[likely[0]] if likely else None
