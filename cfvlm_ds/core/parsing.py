"""Option parsing: from YAML files and the command line to a RunConfig. An invalid option or value raises a one-sentence error."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, field, make_dataclass
from typing import Any, Literal, get_args, get_origin

from cfvlm_ds.core.config import CFVLM, SECTIONS, ModelConfig, RunConfig, TrainConfig
from cfvlm_ds.core.data_config import DataConfig, EvaluationSet
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import sentences
from cfvlm_ds.core.reading import DuplicateKey, parse_yaml, yaml_of
from cfvlm_ds.core.shipped import refuse_no_file, resolve_shipped
from cfvlm_ds.core.strict import Given, build, dotted, read_options
from cfvlm_ds.core.verbosity import VERBOSITY


def parse_config(argv: Sequence[str], objectives: Mapping[str, type], prog: str | None = None) -> RunConfig:
    """Parse command-line arguments into the configuration of a run.

    ``objectives`` maps the name of each term to a dataclass with at least the field ``weight``. The objective of a run has the terms in its
    YAML files (by default, align, csd and fcd) and those on the command line, except terms with weight 0. Options are written
    ``--train.learning_rate 1e-5`` or ``--train.learning_rate=1e-5``. ``--config FILE`` reads YAML. Later values override earlier ones. A
    YAML file or DeepSpeed JSON that does not exist is looked up among the files that come with the package (core/shipped.py).

    Raises ConfigError for an unknown option, naming the most similar valid one, and for a value of the wrong type. With ``--help`` or
    ``--print_config``, prints the help or the configuration and exits.
    """
    if {"-h", "--help"} & set(argv):
        option_parser(objectives, prog).print_help()
        raise SystemExit(0)
    switches = {name for name in (*VERBOSITY, "print_config") if f"--{name}" in argv}
    given, terms, folder = _read([word for word in argv if word not in {f"--{name}" for name in switches}])
    if unknown := terms - set(objectives):
        raise ConfigError(f"unknown term of the objective {min(unknown)!r}; the terms are {', '.join(objectives)}")
    built = build(_options(objectives), given)
    resolved = asdict(built)
    named = {name: getattr(built.objective, name) for name in objectives if name in terms}
    active = {name: term for name, term in named.items() if term.weight != 0}
    resolved["objective"] = {name: resolved["objective"][name] for name in active}
    if set(VERBOSITY) <= switches:
        raise ConfigError("--quiet and --verbose contradict each other; give one of them")
    _check(built.model, built.data, built.train)
    if not active:
        raise ConfigError(
            f"every given term of the objective has weight 0 ({', '.join(named)}); give one a weight, or omit all for the default"
        )
    if "print_config" in switches:
        print(yaml_of(resolved), end="")
        raise SystemExit(0)
    values = {name: getattr(built, name) for name in SECTIONS}
    json_file = resolve_shipped(built.deepspeed, "ds_configs")
    return RunConfig(**values, objective=active, deepspeed=json_file, resolved=resolved, yaml_folder=folder)


def _options(objectives: Mapping[str, type]) -> type:
    terms = make_dataclass("Objective", [(name, term, field(default_factory=term)) for name, term in objectives.items()])
    sections = {**SECTIONS, "objective": terms}
    parts: list[Any] = [(name, section, field(default_factory=section)) for name, section in sections.items()]
    return make_dataclass("Options", [("deepspeed", str, field(default="ds_configs/z3.json")), *parts], frozen=True)


def option_parser(objectives: Mapping[str, type], prog: str | None = None) -> argparse.ArgumentParser:
    """Build an argparse parser with the options of a run. It is used only to print the help."""
    started = "deepspeed train.py" if prog in (None, "train.py") else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description="Fine-tune a vision-language model with counterfactual objectives under DeepSpeed.",
        epilog=f"{_WHERE} example: {started} {_EXAMPLE}",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below")
    parser.add_argument("--print_config", action="store_true", help="print the configuration of this run as YAML and exit")
    for name, text in VERBOSITY.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, section, option, hint in dotted(_options(objectives)):
        text = sentences(section).get(option.name, "DeepSpeed JSON; its 'auto' values take the run's")
        shown = "" if option.default in (None, MISSING) else " (default: %(default)s)"
        words = ("true", "false") if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        choices = [str(word).lower() for word in words] or None
        parser.add_argument(f"--{name}", choices=choices, metavar=None if words else "VALUE", default=option.default, help=text + shown)
    return parser


_WHERE = (
    "--config and --deepspeed first look for the file in the working directory. If NAME, examples/NAME or ds_configs/NAME is not there, "
    "the package's own file of that name is used; `cfvlm-ds init FOLDER` writes copies to edit."
)
_EXAMPLE = "--deepspeed ds_configs/z3.json --config examples/quickstart.yaml --train.max_steps 100"


_LAUNCHERS = ("num_gpus", "num_nodes", "include", "exclude", "hostfile", "master_addr", "master_port")
"""Options of DeepSpeed's launcher, which belong before train.py on the command line."""


def _read(argv: Sequence[str]) -> tuple[dict[str, Any], set[str], str]:
    """Read the options on the command line and in the YAML files given there. Later values replace earlier ones.

    Returns the options, the names of the objective's terms, and the folder of the last YAML file. The terms come from the YAML files (by
    default, ``CFVLM``) and the command line.
    """
    options, stated, added, words, folder = dict[str, Any](), set[str](), set[str](), list(argv), ""
    while words:
        flag, equals, value = words.pop(0).partition("=")
        option = flag.removeprefix("--")
        if option == flag:
            remedy = "give a model as --model.name_or_path MODEL and data as --data.train DATA"
            if flag.endswith((".yaml", ".yml")):
                remedy = f"give a file of options as --config {flag}"
            raise ConfigError(f"unknown option {flag!r}; {remedy}")
        if not equals and (not words or words[0].startswith("--")):
            raise ConfigError(f"{flag} needs a value; write {flag} VALUE (true or false for a switch)")
        value = value if equals else words.pop(0)
        if not value.strip():
            raise ConfigError(f"{flag} is empty (an unset variable?); give a value, or leave it out for the default")
        if option in _LAUNCHERS:
            raise ConfigError(f"{flag} is an option of the launcher; write `deepspeed {flag} {value} train.py` and the run's options")
        if option == "config":
            document, folder = _document(value), os.path.dirname(resolve_shipped(value, "examples"))
            stated |= document.get("objective", {}).keys() if isinstance(document.get("objective", {}), Mapping) else set()
            _merge(options, document)
        elif option != "local_rank":  # added by the launcher
            plain = _plain(value)
            added |= {option.split(".")[1]} if option.startswith("objective.") else set()
            added |= {str(key).partition(".")[0] for key in plain} if option == "objective" and isinstance(plain, Mapping) else set()
            _put(options, option.split("."), plain)
    return options, (stated or set(CFVLM)) | added, folder


def _document(given: str) -> dict[str, Any]:
    """Read the options of a YAML file as nested sections. Raises ConfigError for a file without options, and for an option that occurs
    twice.
    """
    path = resolve_shipped(given, "examples")
    refuse_no_file(given, path)
    options, nested = read_options(path, "write YAML as in examples/"), dict[str, Any]()
    try:
        _merge(nested, options, once=True)
    except (ConfigError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; write YAML as in examples/") from error
    return nested


def _plain(value: str) -> Any:
    """Parse a value from the command line. Only lists, mappings and null are parsed here; any other value is parsed later, according to the
    option's type.
    """
    try:
        read = parse_yaml(value)
    except DuplicateKey as error:
        raise ConfigError(f"{value}: {error}") from error
    except (ValueError, RecursionError):
        read = ""
    return read if isinstance(read, (Mapping, list)) or (read is None and value[0] != "#") else Given(value)


def _merge(options: dict[str, Any], part: Mapping[Any, Any], once: bool = False) -> None:
    """Merge a section into ``options``. If ``once`` is True, an option that is already set is an error."""
    for name, value in part.items():
        _put(options, str(name).split("."), value, once)


def _put(options: dict[str, Any], path: Sequence[str], value: Any, once: bool = False) -> None:
    """Set an option in nested sections. The names in a mapping of evaluation sets are not split at dots, because they can contain dots."""
    name, *inside = path
    before = options.get(name)
    section = bool(inside) or (isinstance(value, Mapping) and name != "evaluation")
    if (before is not None and not isinstance(before, Mapping)) if section else (once and name in options):
        raise ConfigError(f"{name!r} occurs twice, by itself and in its section; keep one of them")
    if section:
        options[name] = before = dict(before) if isinstance(before, Mapping) else {}
        if name == "evaluation" and isinstance(file := before.get(inside[0]), str) and (inside[1:] or isinstance(value, Mapping)):
            before[inside[0]] = {"path": file}
        _put(before, inside, value, once) if inside else _merge(before, value, once)
    else:
        options[name] = value


def _check(model: ModelConfig, data: DataConfig, train: TrainConfig) -> None:
    if not train.output_dir:
        raise ConfigError("train.output_dir is empty (an unset variable?); name a folder, or leave it out for the default")
    if train.max_steps == 0:
        raise ConfigError("train.max_steps must be at least 1, or -1 to use train.num_train_epochs, not 0")
    for source in [] if isinstance(data.train, str) else data.train:
        if not source.path:
            raise ConfigError("data.train: a source has an empty path (an unset variable?); name its manifest")
        if source.objectives == []:
            raise ConfigError(f"data.train: objectives of {source.path!r} is an empty list; name its objectives, or omit the list")
    for split, given in data.evaluation.items():
        _check_evaluation_set(split, EvaluationSet(given) if isinstance(given, str) else given)
    if train.early_stopping is not None and train.save_best is None:
        raise ConfigError("train.early_stopping needs a metric; set train.save_best, for example to eval/test/group")
    if (best := train.save_best) is not None:
        if not train.eval_steps:
            raise ConfigError(f"train.save_best {best!r} needs evaluations during training; set train.eval_steps")
        if not any(best.startswith(f"eval/{split}/") for split in data.evaluation):
            splits = ", ".join(sorted(data.evaluation)) or "empty"
            raise ConfigError(f"train.save_best {best!r} is not a metric of data.evaluation ({splits}); write eval/SPLIT/METRIC")


def _check_evaluation_set(split: str, given: EvaluationSet) -> None:
    if not re.fullmatch(r"\w[\w.+-]{0,99}", split, re.ASCII):
        raise ConfigError(f"data.evaluation: {split!r} cannot be part of file and metric names; use letters, digits and _ . + -")
    if not given.path and not given.benchmark:
        raise ConfigError(f"data.evaluation: {split!r} {EvaluationSet.FORM}")
    if given.benchmark and (given.path or given.format or not isinstance(given.root, str)):
        raise ConfigError(
            f"data.evaluation.{split}: benchmark {given.benchmark!r} needs one folder as root and accepts no path or format; correct these"
        )
    if not given.benchmark and given.probe is not None:
        raise ConfigError(
            f"data.evaluation.{split}: probe {given.probe!r} applies to benchmarks, but {given.path!r} is a manifest; leave the probe out"
        )
