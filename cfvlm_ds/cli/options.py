"""Options that several commands share, and how a command is added to its parser."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cfvlm_ds.cli.exits import exit_cleanly
from cfvlm_ds.core.config import IMAGE_LIMITS, ModelConfig
from cfvlm_ds.core.data_config import DataConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.ranks import own_rank
from cfvlm_ds.core.run_folder import named_model, refuse_absent
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.verbosity import VERBOSITY


def add_command(parent: Any, name: str, function: Callable[[argparse.Namespace], None], text: str, example: str) -> argparse.ArgumentParser:
    """A command of ``parent``'s that runs ``function``; its help ends with the example."""
    command: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    command.set_defaults(function=function, asked_for=command)
    add_verbosity(command)
    return command


class Parser(argparse.ArgumentParser):
    """argparse's own prints its usage, of ten lines and more, before what is wrong."""

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


def add_data_options(command: argparse.ArgumentParser) -> None:
    """How a manifest is read: --format, --root, --max_pixels."""
    defaults = DataConfig()
    text = "NAME or NAME:OPTION=VALUE,OPTION=VALUE (default auto: that of the first row by its keys); see `cfvlm-ds data formats`"
    command.add_argument("--format", default=defaults.format, help=f"format of the rows: {text}")
    text = "folder of the images (default: the manifest's); may be given several times, absolute paths and links may lead into each"
    command.add_argument("--root", action="append", metavar="FOLDER", help=text)
    command.add_argument(
        "--max_pixels", type=positive, default=defaults.max_pixels, help=f"image size limit (default {defaults.max_pixels})"
    )


def say(line: str) -> None:
    """Print a line on rank 0 alone, before ranks have met."""
    if own_rank() == 0:
        print_line(line)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Bounds on the visual tokens of an image."""
    for name in IMAGE_LIMITS:
        command.add_argument(f"--model.{name}", type=positive, metavar="N", help="as in training; the model's own when not given")


def model_of(arguments: argparse.Namespace) -> tuple[ModelConfig, Path | None]:
    """The model that a command names, images bounded as in the run that made it unless the command says otherwise; and its adapters."""
    return model_named(arguments.model, {name: getattr(arguments, f"model.{name}") for name in IMAGE_LIMITS})


def model_named(name: str, limits: Mapping[str, int | None]) -> tuple[ModelConfig, Path | None]:
    """The same of a model's name and the bounds that are given."""
    named = named_model(name)
    refuse_absent(named.name_or_path)
    bounds: dict[str, Any] = {each: limits[each] or getattr(named.recorded, each) for each in IMAGE_LIMITS}
    return ModelConfig(named.name_or_path, **bounds), named.adapter


def add_fields(command: argparse.ArgumentParser, section: type) -> None:
    """Options for the fields of a configuration section; the first is positional."""
    first, *rest = dataclasses.fields(section)
    command.add_argument(first.name)
    for field in rest:
        if not isinstance(field.default, (int, float)):
            continue  # nested values belong in a run's YAML
        command.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=f"default {field.default}")


def values_of(arguments: argparse.Namespace, section: type) -> dict[str, Any]:
    """What was given for the fields of a configuration section."""
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(section) if hasattr(arguments, field.name)}


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
