"""Options that several commands share, and how a function becomes a command."""

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


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """An argument's type: a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII) or (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    return value


Positive = Annotated[int, ("type", positive), ("metavar", "N")]
Count = Annotated[int, ("type", count), ("metavar", "N")]
Folders = Annotated[list[str], ("action", "append"), ("nargs", None), ("metavar", "FOLDER")]
OnError = Literal["error", "skip"]


@dataclass(frozen=True)
class Reading:
    """How a manifest is read.

    Args:
        format: format of the rows, NAME or NAME:OPTION=VALUE,OPTION=VALUE, see `cfvlm-ds data formats`; auto is that of the first row by
            its keys.
        root: folder of the images, the manifest's where not given; may be given several times, absolute paths and links may lead into each.
        max_pixels: image size limit.
    """

    format: str = DataConfig().format
    root: Folders | None = None
    max_pixels: Positive = DataConfig().max_pixels


@dataclass(frozen=True)
class Scoring:
    """How groups are scored.

    Args:
        batch_size: groups per batch.
        max_tokens_per_forward: tokens per forward at most; a larger batch is scored in several, by default in one, of benchmarks of 16384.
        limit: score the first N groups alone, as the option limit of a data set does; of a benchmark about N items, spread over all of it.
        zero3: keep the model in parts over all ranks, where one GPU does not hold it.
    """

    batch_size: Positive = 16
    max_tokens_per_forward: Positive | None = None
    limit: Positive | None = None
    zero3: bool = False

    @property
    def remedy(self) -> str:
        """What to do where memory runs out."""
        return f"lower --batch_size ({self.batch_size}), set --max_tokens_per_forward, --model.max_pixels or --model.max_tiles"


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on the visual tokens of an image.

    Args:
        min_pixels: as in training; the model's own when not given.
        max_pixels: as in training; the model's own when not given.
        max_tiles: as in training; the model's own when not given.
    """

    PREFIX: ClassVar = "model."
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    max_tiles: Positive | None = None


def add_function(parent: Any, function: Callable[..., None]) -> None:
    """Add a command of ``parent``'s that calls a function. Its help are the docstring's first paragraph, the example and Args.

    Parameters before ``*`` are arguments, those behind it are options, and a dataclass stands for its fields: one without a default is an
    argument, the others are options. Annotated adds what add_argument takes.
    """
    text, _, more = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample: ")
    text = " ".join(text.split())
    command = parent.add_parser(function.__name__.removeprefix("_"), help=text, description=text, epilog=f"example: {more.splitlines()[0]}")
    command.set_defaults(function=lambda arguments: _called(function, arguments), asked_for=command)
    add_verbosity(command)
    for name, given in _parameters(function):
        command.add_argument(name, **given)


@functools.cache
def _parameters(described: Callable[..., Any]) -> list[tuple[str, dict[str, Any]]]:
    """What add_argument takes for the parameters of a function, or the fields of a dataclass."""
    said, hints = sentences(described), get_type_hints(described, include_extras=True)
    prefix, found = getattr(described, "PREFIX", ""), []
    for each in inspect.signature(described).parameters.values():
        hint, default = hints[each.name], each.default
        kind = get_args(hint)[0] if NoneType in get_args(hint) else hint
        kind, more = (kind.__origin__, dict(kind.__metadata__)) if get_origin(kind) is Annotated else (kind, {})
        if is_dataclass(kind):
            found += _parameters(kind)  # type: ignore[arg-type]
        if is_dataclass(kind) or get_origin(kind) is dict:  # nested values belong in YAML
            continue
        shown = "" if kind is bool or default in (None, "", each.empty) else f" (default {default})"
        given: dict[str, Any] = {"help": said[each.name] + shown.replace("%", "%%")}
        is_option = each.kind is each.KEYWORD_ONLY or (inspect.isclass(described) and default is not each.empty)
        if is_option:
            given |= {"dest": f"{prefix}{each.name}", "required": default is each.empty}
        elif default is not each.empty:
            given["nargs"] = "?"
        if kind is bool:
            given["action"] = "store_true"
        elif get_origin(kind) is Literal:
            given["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            given["nargs"] = "+"
        else:
            given["type"] = kind
        given |= {} if kind is bool or default is each.empty else {"default": default}
        found.append((f"--{prefix}{each.name}".replace("--back_ends", "--with") if is_option else each.name, given | more))
    return found


def _called(function: Callable[..., Any], arguments: argparse.Namespace) -> Any:
    """Call a function, or make a dataclass, with what was given for its parameters."""
    hints, prefix, given = get_type_hints(function), getattr(function, "PREFIX", ""), vars(arguments)
    names = inspect.signature(function).parameters
    sections = {name: _called(hints[name], arguments) for name in names if is_dataclass(hints[name])}
    return function(**{name: given[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in given} | sections)


class Parser(argparse.ArgumentParser):
    """argparse's own prints its usage, of ten lines and more, before what is wrong, and takes the beginning of a name for it."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse options before the command that takes them, of which argparse would take the value for the command."""
        given = list(sys.argv[1:] if args is None else args)
        commands = next((each.choices for each in self._actions if isinstance(each, argparse._SubParsersAction)), {})
        place = next((place for place, word in enumerate(given) if word in commands), 0)
        if wrong := next((word for word in given[:place] if word.startswith("-") and word not in self._option_string_actions), None):
            first = given.index(wrong)
            right = shlex.join([*self.prog.split(), *given[:first], *given[place:], *given[first:place]])
            self.error(f"{wrong} stands before its command; write `{right}`")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one sentence, as every other refusal does."""

        def refused() -> None:
            raise ConfigError(f"{self.prog}: {message}; {near}")

        near = f"see `{self.prog} --help`"
        if (choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)) and (
            found := difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
        ):
            near = f"did you mean {found[0]}?"
        exit_cleanly(refused)
        raise AssertionError


def refuse_empty(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for an argument without a letter, such as of a variable that is not set: as a path it would be the working folder,
    and as an output none."""
    command = arguments.asked_for
    for action in command._actions:
        given = getattr(arguments, action.dest, None)
        if action.nargs != argparse.REMAINDER and action.default != "" and "" in (given if isinstance(given, list) else [given]):
            name = (action.option_strings or [action.dest])[-1]
            raise ConfigError(f"{command.prog}: {name} is empty, as a variable is that was not set; give its value, or . for this folder")


def refuse_unknown(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Raise ConfigError for arguments that a command does not take, with its nearest option."""
    wrong = next((each for each in unknown if each.startswith("-")), unknown[0]).partition("=")[0]
    known = [option.strip("-") for action in command._actions for option in action.option_strings]
    near = difflib.get_close_matches(wrong.strip("-"), known, n=1, cutoff=0.7)
    raise ConfigError(
        f"{command.prog} does not take {wrong!r}; " + (f"did you mean --{near[0]}?" if near else f"see `{command.prog} --help`")
    )


def add_verbosity(command: argparse.ArgumentParser) -> None:
    """--quiet and --verbose, before a command's name or after it."""
    group = command.add_mutually_exclusive_group()
    for name, text in VERBOSITY.items():
        group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)


def say(line: str) -> None:
    """Print a line on rank 0 alone, before ranks have met; with --quiet only what is a warning."""
    if own_rank() == 0 and (shows_progress() or line.startswith(("warning: ", "note: "))):
        print_line(line)


def model_named(name: str, limits: ImageLimits = ImageLimits()) -> tuple[ModelConfig, Path | None]:
    """The model of a name, images bounded as in the run that made it unless the limits say otherwise; and its adapters."""
    named = named_model(name)
    refuse_absent(named.name_or_path)
    bounds: dict[str, Any] = {each: value or getattr(named.recorded, each) for each, value in vars(limits).items()}
    return ModelConfig(named.name_or_path, **bounds), named.adapter
