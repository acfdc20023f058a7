"""Options that several commands share, and the conversion of functions to commands."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, get_args, get_origin, get_type_hints

from cfvlm_ds.cli.exits import exit_cleanly
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import sentences
from cfvlm_ds.core.ranks import own_rank
from cfvlm_ds.core.run_folder import named_model, refuse_absent
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.verbosity import VERBOSITY, shows_progress


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII) or (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return value


Positive = Annotated[int, ("type", functools.partial(_whole, least=1)), ("metavar", "N")]
Count = Annotated[int, ("type", functools.partial(_whole, least=0)), ("metavar", "N")]
Folders = Annotated[list[str], ("action", "append"), ("nargs", None), ("metavar", "FOLDER")]
OnError = Literal["error", "skip"]


@dataclass(frozen=True)
class Reading:
    """Options for reading a manifest.

    Args:
        format: format of the rows, NAME or NAME:OPTION=VALUE,OPTION=VALUE (see `cfvlm-ds data formats`); auto detects it from the first
            row's keys.
        root: folder with the pictures, by default the manifest's folder; can be given several times. Absolute paths and symbolic links must
            lead into one of these folders.
        max_pixels: maximum number of pixels in a picture; a larger picture is an error.
    """

    format: str = DataConfig().format
    root: Folders | None = None
    max_pixels: Positive = DataConfig().max_pixels


@dataclass(frozen=True)
class Scoring:
    """Options for scoring groups.

    Args:
        batch_size: number of groups per batch.
        max_tokens_per_forward: maximum number of tokens in a forward pass; a larger batch takes several passes. The default is 16384 for
            benchmarks; otherwise, there is no limit.
        limit: score only the first N groups of a manifest, or about N evenly spaced items of a benchmark.
        zero3: partition the model over all ranks, for a model that does not fit on one GPU.
    """

    batch_size: Positive = 16
    max_tokens_per_forward: Positive | None = None
    limit: Positive | None = None
    zero3: bool = False

    @property
    def remedy(self) -> str:
        """Advice for an out-of-memory error."""
        return f"lower --batch_size ({self.batch_size}), set --max_tokens_per_forward, --model.max_pixels or --model.max_tiles"


@dataclass(frozen=True)
class ImageLimits:
    """Limits that determine the number of visual tokens per picture.

    Args:
        min_pixels: minimum number of pixels per picture; use the same value as in training. By default, that of the run folder, or else the
            model's own.
        max_pixels: maximum number of pixels per picture; use the same value as in training. By default, that of the run folder, or else the
            model's own.
        max_tiles: maximum number of tiles per picture; use the same value as in training. By default, that of the run folder, or else the
            model's own.
    """

    PREFIX: ClassVar = "model."
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    max_tiles: Positive | None = None


def add_function(parent: Any, function: Callable[..., None]) -> None:
    """Add a command to ``parent`` that calls ``function``. The help consists of the docstring's first paragraph, its example and its Args.

    Parameters before ``*`` become arguments; parameters after it become options. A dataclass parameter adds its fields as options. The
    metadata of an Annotated type is passed to add_argument as keyword arguments.
    """
    text, _, more = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample: ")
    text = " ".join(text.split())
    command = parent.add_parser(function.__name__.removeprefix("_"), help=text, description=text, epilog=f"example: {more.splitlines()[0]}")
    command.set_defaults(function=lambda arguments: _called(function, arguments), asked_for=command)
    add_verbosity(command)
    for name, options in _parameters(function):
        command.add_argument(name, **options)


@functools.cache
def _parameters(described: Callable[..., Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and keyword arguments to pass to add_argument for each parameter of a function or field of a dataclass."""
    helps, hints = sentences(described), get_type_hints(described, include_extras=True)
    prefix, result = getattr(described, "PREFIX", ""), []
    for parameter in inspect.signature(described).parameters.values():
        hint, default = hints[parameter.name], parameter.default
        kind = get_args(hint)[0] if NoneType in get_args(hint) else hint
        kind, more = (kind.__origin__, dict(kind.__metadata__)) if get_origin(kind) is Annotated else (kind, {})
        if is_dataclass(kind):
            result += _parameters(kind)  # type: ignore[arg-type]
            continue
        shown = "" if kind is bool or default in (None, "", parameter.empty) else f" (default {default})"
        options: dict[str, Any] = {"help": helps[parameter.name] + shown.replace("%", "%%")}
        is_option = parameter.kind is parameter.KEYWORD_ONLY or inspect.isclass(described)
        if is_option:
            options |= {"dest": f"{prefix}{parameter.name}", "required": default is parameter.empty}
        elif default is not parameter.empty:
            options["nargs"] = "?"
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            options["nargs"] = "+"
        else:
            options["type"] = kind
        options |= {} if kind is bool or default is parameter.empty else {"default": default}
        result.append((f"--{prefix}{parameter.name}".replace("--back_ends", "--with") if is_option else parameter.name, options | more))
    return result


def _called(function: Callable[..., Any], arguments: argparse.Namespace) -> Any:
    """Call a function, or construct a dataclass, with the parsed values of its parameters."""
    hints, prefix, values = get_type_hints(function), getattr(function, "PREFIX", ""), vars(arguments)
    names = inspect.signature(function).parameters
    sections = {name: _called(hints[name], arguments) for name in names if is_dataclass(hints[name])}
    return function(**{name: values[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in values} | sections)


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one sentence and accepts no abbreviated option names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but report an option that precedes its command: argparse would mistake the option's value for the
        command.
        """
        words = list(sys.argv[1:] if args is None else args)
        commands = next((action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)), {})
        place = next((place for place, word in enumerate(words) if word in commands), 0)
        if wrong := next((word for word in words[:place] if word.startswith("-") and word not in self._option_string_actions), None):
            first = words.index(wrong)
            right = shlex.join([*self.prog.split(), *words[:first], *words[place:], *words[first:place]])
            self.error(f"{wrong} is before its command; write `{right}`")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Report an error in one sentence and exit, as for any other bad input."""

        def refused() -> None:
            raise ConfigError(f"{self.prog}: {message}; {near}")

        near = f"see `{self.prog} --help`"
        if (choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)) and (
            similar := difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
        ):
            near = f"did you mean {similar[0]}?"
        exit_cleanly(refused)
        raise AssertionError


def refuse_empty(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if an argument is empty, for example because a shell variable is not set.

    Otherwise, it would be treated as the current folder, or as a request for no output.
    """
    command = arguments.asked_for
    for action in command._actions:
        value = getattr(arguments, action.dest, None)
        if action.nargs != argparse.REMAINDER and action.default != "" and "" in (value if isinstance(value, list) else [value]):
            name = (action.option_strings or [action.dest])[-1]
            raise ConfigError(f"{command.prog}: {name} is empty (an unset variable?); give a value, or . for the current folder")


def refuse_unknown(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Raise ConfigError for unknown arguments. The message suggests the most similar option."""
    wrong = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    known = [option.strip("-") for action in command._actions for option in action.option_strings]
    near = difflib.get_close_matches(wrong.strip("-"), known, n=1, cutoff=0.7)
    remedy = f"did you mean --{near[0]}?" if near else f"see `{command.prog} --help`"
    if "root" in known and not wrong.startswith("-"):
        remedy = f"give a folder with pictures as --root, and see `{command.prog} --help`"
    raise ConfigError(f"{command.prog} does not take {wrong!r}; {remedy}")


def add_verbosity(command: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which may precede or follow a command's name."""
    group = command.add_mutually_exclusive_group()
    for name, text in VERBOSITY.items():
        group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)


def say(line: str) -> None:
    """Print a line on rank 0, even before the process group is initialized. With --quiet, print it only if it is a warning or note."""
    if own_rank() == 0 and (shows_progress() or line.startswith(("warning: ", "note: "))):
        print_line(line)


def model_named(name: str, limits: ImageLimits = ImageLimits()) -> tuple[ModelConfig, Path | None]:
    """Return the configuration and the adapter folder (or None) of the model ``name``. The image limits are those of the run that produced
    the model, unless ``limits`` overrides them.
    """
    resolved = named_model(name)
    refuse_absent(resolved.name_or_path)
    bounds: dict[str, Any] = {option: value or getattr(resolved.recorded, option) for option, value in vars(limits).items()}
    return ModelConfig(resolved.name_or_path, **bounds), resolved.adapter
