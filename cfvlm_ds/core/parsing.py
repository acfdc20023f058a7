"""Options: YAML and the command line to a RunConfig, with one sentence for what is unknown, of another type or out of range."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cfvlm_ds.core.config import CFVLM, SECTIONS, RunConfig, TinyLlavaConfig
from cfvlm_ds.core.data_config import Source
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.option_errors import SPLITS, documents, problem_of, types_of
from cfvlm_ds.core.options import ENDLESS, flat, ranges
from cfvlm_ds.core.reading import DuplicateKey, parse_yaml, read_yaml
from cfvlm_ds.core.shipped import found, refuse_no_file
from cfvlm_ds.core.verbosity import VERBOSITY, asked


def parse_config(argv: Sequence[str], objectives: Mapping[str, type], prog: str | None = None) -> RunConfig:
    """The run configuration from command-line arguments.

    ``objectives`` maps the name of a term to a dataclass with at least ``weight``. The terms of the run are those that its YAML files name
    (``cfvlm``, that is align, csd and fcd, where they name none) and those that the command line names; one of weight 0 is left out.
    Options may be given as ``--train.learning_rate 1e-5`` or ``--train.learning_rate=1e-5``; ``--config FILE`` reads YAML; later ones win.
    A file of options, or a DeepSpeed JSON, that is not there is looked for among those that come with the package (core/shipped.py).

    Raises ConfigError on an unknown option (naming the nearest valid one) or a value of the wrong type. ``--help`` and ``--print_config``
    print and exit.
    """
    from jsonargparse import ArgumentError

    parser = option_parser(objectives, prog)
    argv = _with_shipped(argv)
    types = types_of(SECTIONS | {f"objective.{name}": term for name, term in objectives.items()})
    _refuse_repeated(argv, types)
    try:
        parsed = parser.parse_args(list(argv))
        resolved = parsed.clone().as_dict()
        _refuse_nulls(resolved, parser.get_defaults().as_dict())
        built = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ConfigError(problem_of(argv, types) or " ".join(str(error).split())) from error
    except ConfigError:
        raise
    except Exception as error:  # the parser and YAML raise nearly anything on bytes that are no text, tags and thousands of brackets
        given = ", ".join(value for _, value in documents(argv, types)) or "the options"
        raise ConfigError(f"{given}: not a configuration ({type(error).__name__}: {error}); write YAML as in examples/") from error
    named = _named_terms(argv, [value for option, value in documents(argv, types) if option == "config"])
    if unknown := named - set(objectives):  # one with options has been named by the parser
        raise ConfigError(f"unknown term of the objective {min(unknown)!r}; the terms are {', '.join(objectives)}")
    terms = {name: getattr(built.objective, name) for name in objectives if name in named}
    active = {name: term for name, term in terms.items() if term.weight != 0}
    resolved["objective"] = {name: resolved["objective"][name] for name in active}
    printed = resolved.pop("print_config")
    for key in ("config", "local_rank", "quiet", "verbose"):
        resolved.pop(key, None)
    if parsed.quiet and parsed.verbose:
        raise ConfigError("--quiet and --verbose contradict each other; give one of them")
    _check_ranges(resolved)
    if not active:
        raise ConfigError(
            f"every objective that is named has weight 0 ({', '.join(terms)}); name one with a weight, or none for the default"
        )
    if printed:
        import yaml

        print(yaml.safe_dump(resolved, sort_keys=False), end="")
        raise SystemExit(0)
    values = {name: getattr(built, name) for name in SECTIONS}
    json_file, shows = found(parsed.deepspeed, "ds_configs"), asked(parsed.quiet, parsed.verbose)
    return RunConfig(**values, objective=active, deepspeed=json_file, resolved=resolved, shows=shows)


def option_parser(objectives: Mapping[str, type], prog: str | None = None) -> Any:
    """The parser of a run's options, jsonargparse's; it takes longer to make than to use, and may be used any number of times."""
    return _parser(tuple(objectives.items()), prog)


@functools.lru_cache(8)
def _parser(objectives: tuple[tuple[str, type], ...], prog: str | None) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    started = "deepspeed train.py" if prog in (None, "train.py") else prog
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        description="Fine-tune a vision-language model with counterfactual objectives under DeepSpeed.",
        epilog=f"{_WHERE} example: {started} {_EXAMPLE}",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_argument("--deepspeed", type=str, default="ds_configs/z3.json", help="DeepSpeed JSON; its 'auto' values take the run's")
    parser.add_argument("--print_config", action="store_true", help="print the configuration of this run as YAML and exit")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher; ignored")
    for name, text in VERBOSITY.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    for name, objective in objectives:
        parser.add_class_arguments(objective, f"objective.{name}")
    return parser


_WHERE = (
    "A file that --config or --deepspeed names, bare or as examples/NAME and ds_configs/NAME, is the one in the working directory where "
    "that is there, else the one of that name that comes with the package; `cfvlm-ds init FOLDER` writes copies to edit."
)
_EXAMPLE = "--deepspeed ds_configs/z3.json --config examples/quickstart.yaml --train.max_steps 100"


def _with_shipped(argv: Sequence[str]) -> list[str]:
    """The same options, with the file that each --config means. Raises ConfigError for one that neither the user nor the package has."""
    taken: list[str] = []
    for before, option in itertools.pairwise(["", *argv]):
        flag, equals, value = ("--config", " ", option) if before == "--config" else option.partition("=")
        if flag == "--config" and equals:
            value = found(value, "examples")
            if not re.search(r"[\s:{]", value) or os.path.lexists(value):  # which options themselves have in them
                refuse_no_file(value, value)
            option = value if equals == " " else f"{flag}={value}"
        taken.append(option)
    return taken


def _named_terms(argv: Sequence[str], files: Sequence[str]) -> set[str]:
    """The terms of the objective: those of the YAML files, or the default where they state none, and those that the command line adds."""
    stated: set[str] = set()
    for path in files:
        given = read_yaml(path)
        section = given.get("objective") if isinstance(given, Mapping) else None
        dotted = (name.removeprefix("objective.") for name in given or () if name.startswith("objective."))
        stated |= {str(name).partition(".")[0] for name in (*(section if isinstance(section, Mapping) else ()), *dotted)}
    return (stated or set(CFVLM)) | {option.split(".")[1].partition("=")[0] for option in argv if option.startswith("--objective.")}


def _refuse_repeated(argv: Sequence[str], types: Mapping[str, Any]) -> None:
    """ConfigError on an option given twice in one document, of which the parser would silently take the last."""
    inline = (value for option in argv for value in (option, option.partition("=")[2]) if value.startswith("{"))
    for reader, given in (*((read_yaml, file) for _, file in documents(argv, types)), *((parse_yaml, value) for value in inline)):
        try:
            document = reader(given)
        except DuplicateKey as error:
            raise ConfigError(f"{given}: {error}") from error
        except (OSError, ValueError, RecursionError):
            continue  # named by the parser
        try:
            _refuse_divided(document, given)
        except RecursionError as error:
            raise ConfigError(f"{given}: a section contains itself; write its values out") from error


def _refuse_divided(section: Any, named: str) -> None:
    """Raise ConfigError for ``train.seed`` beside a section ``train``: the parser keeps the later one and drops the other."""
    for name, value in section.items() if isinstance(section, Mapping) else ():
        if dotted := next((each for each in section if str(each).startswith(f"{name}.")), None):
            raise ConfigError(
                f"{named}: {dotted!r} stands beside a section {name!r}, and one of them would be lost; move it into the section"
            )
        if str(name).rpartition(".")[2] != "evaluation":  # whose names may have dots
            _refuse_divided(value, named)


def _refuse_nulls(values: Mapping[str, Any], defaults: Mapping[str, Any], section: str = "") -> None:
    """jsonargparse lets a null pass for any option, and a plain value for a section: ConfigError for both."""
    for name, default in defaults.items():
        option, value = f"{section}{name}", values[name]
        if default is not None and value is None:
            remedy = (
                f"write {name}: {{}} for the term with its defaults" if section == "objective." else "leave the option out for its default"
            )
            raise ConfigError(f"{option}: null is not a value; {remedy}")
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{option}: expected options below it, got {value!r}; write it as in examples/")
            _refuse_nulls(value, default, f"{option}.")


_RANGES = {
    **{option: within for name, section in SECTIONS.items() for option, within in ranges(section, f"{name}.").items()},
    **ranges(TinyLlavaConfig, "build.tiny_llava."),
}
_TERM = {"weight": (0, 1e9), "warmup": (0, 1)}
"""Of every term of the objective; they check the rest of their options themselves."""


def _check_ranges(resolved: Mapping[str, Any]) -> None:
    """ConfigError on a number that no run can have: one that is not finite, or outside the range of its option."""
    train = resolved["train"]
    if not train["output_dir"]:
        raise ConfigError("train.output_dir is empty, as a variable is that was not set; name a folder, or leave it out for the default")
    for option, value in ((name, each) for name, each in flat(resolved).items() if isinstance(each, (int, float))):
        term = _TERM.get(option.rpartition(".")[2]) if option.startswith("objective.") else None
        low, high = term or _RANGES.get(option, (-ENDLESS, ENDLESS))
        if not low <= value <= high:
            wrong = f"must not be negative, and is {value}" if value < low == 0 else f"must be from {low:.16g} to {high:.16g}, not {value}"
            raise ConfigError(f"{option} {wrong}; leave it out for the default")
    if train["max_steps"] == 0:
        raise ConfigError("train.max_steps must be at least 1, or -1 to use train.num_train_epochs, not 0")
    sources = [] if isinstance(resolved["data"]["train"], str) else resolved["data"]["train"]
    if any(not source["path"] for source in sources):
        raise ConfigError("data.train: a source has an empty path, as a variable is that was not set; name its manifest")
    for given in [*sources, *(each for each in resolved["data"]["evaluation"].values() if isinstance(each, Mapping))]:
        _check_data_set(given)
    for split, given in resolved["data"]["evaluation"].items():
        if isinstance(given, str) and (not given or given.lstrip().startswith("{")):  # the parser takes an object it cannot read for a path
            raise ConfigError(
                f"data.evaluation: {given or 'nothing'} is not a manifest; give NAME: PATH, or NAME: {{path: PATH, root: ..., format: ...}}"
            )
        if isinstance(given, Mapping):
            _check_evaluation_set(split, given)
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


def _check_data_set(given: Mapping[str, Any]) -> None:
    """As ``_check_ranges``, for one source or evaluation set."""
    named = given["path"] or given.get("benchmark")
    for name, (low, high) in ranges(Source, "").items():
        if (value := given.get(name)) is not None and not low <= value <= high:
            raise ConfigError(
                f"data: {name} of {named!r} must be from {low:.16g} to {high:.16g}, not {value}; leave it out for the default"
            )
    if given.get("objectives") == []:
        raise ConfigError(f"data: objectives of {named!r} is an empty list; name those that its groups count in, or leave it out for all")


def _check_evaluation_set(split: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is neither a manifest nor a benchmark, or both."""
    path, benchmark = given["path"], given["benchmark"]
    if not path and not benchmark:
        raise ConfigError(f"data.evaluation: {split!r} is not a manifest; {SPLITS}")
    if benchmark and (path or given["format"] or not isinstance(given["root"], str)):
        raise ConfigError(
            f"data.evaluation.{split}: benchmark {benchmark!r} needs root, one folder, and has neither path nor format; {SPLITS}"
        )
    if not benchmark and given["probe"] is not None:
        raise ConfigError(f"data.evaluation.{split}: probe {given['probe']!r} is of a benchmark, and {path!r} is a manifest; leave it out")
