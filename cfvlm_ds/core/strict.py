"""Strict conversion of plain values to dataclasses of options. The error for an invalid value names the option, the value and a remedy in
one sentence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.options import ENDLESS, Range
from cfvlm_ds.core.reading import parse_yaml, read_yaml
from cfvlm_ds.core.text import one_line, quoted

_MAIN_OPTION = {"model": "name_or_path", "data": "train", "lora": "rank"} | dict.fromkeys(
    ("vision_tower", "projector", "language_model"), "tuning"
)
"""Section -> the option to suggest if a value is given for the section itself."""
_KINDS = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a text", list: "a list of texts", dict: "NAME: VALUE",
    NoneType: "null",
}  # fmt: skip
_LIKE = 0.65
TERM: dict[str, Range] = {"weight": (0, 1e9), "warmup": (0, 1)}
"""Ranges of the options that all objective terms share. Each term checks its other options itself."""


class Given(str):
    """A scalar from the command line. Depending on the option's type, it is used as a string or parsed as YAML."""


def read_options(path: str | Path, remedy: str) -> dict[str, Any]:
    """Read a YAML file of options. If that fails, raises a ConfigError that names the file and the ``remedy``."""
    try:
        if not isinstance(options := read_yaml(path), dict):
            raise ValueError("it has no options" if options is None else f"it contains a {type(options).__name__}, not options")
        return options
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; {remedy}") from error


def dotted(kind: type, prefix: str = "") -> Iterator[tuple[str, type, Any, Any]]:
    """Yield (dotted name, dataclass, field, type) for every option, including options in optional sections."""
    hints = get_type_hints(kind)
    for option in fields(kind):
        hint = hints[option.name]
        if (inside := next(filter(is_dataclass, (hint, *get_args(hint))), None)) is None:
            yield prefix + option.name, kind, option, hint
        else:
            yield from dotted(inside, f"{prefix}{option.name}.")  # type: ignore[arg-type]


def build(kind: type, given: Any, name: str = "", known: Sequence[str] = ()) -> Any:
    """Build an instance of the dataclass ``kind`` from the options ``given`` for the section ``name``.

    Raises ConfigError for an unknown option, naming the most similar of the ``known`` options, and for a value of the wrong type or out of
    range.
    """
    prefix, hints, values = f"{name}." if name else "", get_type_hints(kind), {}
    known = known or [option for option, *_ in dotted(kind, prefix)]
    options = {option.name: option for option in fields(kind)}
    for key, value in given.items():
        at = f"{prefix}{key}"
        if key not in options:
            while isinstance(value, Mapping) and value:
                key, value = next(iter(value.items()))
                at = f"{at}.{key}"
            near = nearest(at, [*known, *(option for option, *_ in dotted(kind, prefix))])
            raise ConfigError(f"unknown option {at!r}" + (f"; did you mean {near!r}?" if near else "; see --help"))
        within = TERM.get(key) if name.startswith("objective.") else options[key].metadata.get("within")
        values[key] = fitted(hints[key], value, at, within or (-ENDLESS, ENDLESS), known)
    needed = [option.name for option in options.values() if option.default is MISSING and option.default_factory is MISSING]
    if absent := [option for option in needed if option not in values]:
        raise ConfigError(f"{name}: {quoted(given)} {getattr(kind, 'FORM', f'lacks {absent[0]}, which has no default; set it')}")
    try:
        return kind(**values)
    except ValueError as error:  # raised by the class
        raise ConfigError(re.sub("^--", prefix, str(error))) from error


def fitted(hint: Any, value: Any, option: str, within: Range = (-ENDLESS, ENDLESS), known: Sequence[str] = ()) -> Any:
    """Convert a value to the type ``hint``. If that fails, raises a ConfigError whose message starts with ``option``, the option's name."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain, text = value, isinstance(value, Given)
    if text:
        plain = str(value)
        with suppress(ValueError, RecursionError):
            plain = parse_yaml(value) if plain and plain[0] != "#" else plain  # YAML would parse both as null
    for kind in sorted(kinds, key=lambda kind: kind is str):
        origin, inside = get_origin(kind), get_args(kind)
        if isinstance(value, Mapping):
            if is_dataclass(kind):
                return build(kind, value, option, known)  # type: ignore[arg-type]
            if origin is dict:
                return {str(key): fitted(inside[1], item, f"{option}.{key}", within, known) for key, item in value.items()}
        elif isinstance(value, list):
            if origin in (list, tuple):
                return origin(fitted(inside[0], item, option, within, known) for item in value)
        elif origin is Literal:
            for choice in inside:
                if repr(choice) in (repr(plain), repr(str(value))):  # 1 is not True
                    return choice
        elif kind in (int, float) and not isinstance(plain, bool) and (number := _number(kind, plain)) is not None:
            low, high = within
            if not low <= number <= high:
                must = "must not be negative, but is" if number < low == 0 else f"must be from {low:.16g} to {high:.16g}, not"
                raise ConfigError(f"{option} {must} {value if text else number}; leave it out for the default")
            return number
        elif kind is str and isinstance(value, str):
            return str(value)
        elif kind in (bool, NoneType):
            if isinstance(plain, kind):
                return plain
        elif not (kind in _KINDS or origin or is_dataclass(kind)):  # a type from a user's own term, such as a path
            return kind(plain) if isinstance(kind, type) else plain
    raise ConfigError(one_line(f"{option}{_misfit(hint, str(value) if text else plain, option)}", 1000))


def _number(kind: Any, plain: Any) -> Any:
    if kind is int or not isinstance(plain, (int, float)):
        return plain if isinstance(plain, int) else None
    try:
        return float(plain)
    except OverflowError:
        return None


def _misfit(hint: Any, value: Any, option: str) -> str:
    """Explain why a value does not match the expected type. The result completes an error message that begins with the option's name."""
    if form := _form(hint):
        return f": {value!r} {form}"
    if is_dataclass(hint) and value is not None:
        inside = _MAIN_OPTION.get(option.rpartition(".")[2])
        return f" is a section of options, not {value!r}; {f'set {option}.{inside} to it' if inside else 'see --help'}"
    if value is None:
        return f": null is not allowed; leave the option out for its default{', or write {}' * is_dataclass(hint)}"
    *before, last = _called(hint)
    return f": expected {', '.join(before)}{' or ' * bool(before)}{last}, got {value!r}"


def _form(hint: Any) -> str | None:
    """Return the advice on valid values (``FORM``) if the type is a data set, else None."""
    return next(filter(None, (getattr(hint, "FORM", None), *map(_form, get_args(hint)))), None)


def _called(hint: Any) -> list[str]:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return [str(choice).lower() for choice in get_args(hint)]
    return [_KINDS[kind]] if kind in _KINDS else [name for part in get_args(hint) for name in _called(part)] or ["options"]


def nearest(option: str, names: Sequence[str]) -> str | None:
    """Return the dotted name in ``names`` that was most likely meant by an unknown ``option``, or None.

    The result is the shortest name that contains all words of ``option`` and ends with the same word. If there is none, it is the most
    similar name whose last part is also similar, because a shared section makes any two names similar.
    """
    last = option.rpartition(".")[2]
    words = {name: re.split(r"[._]", name) for name in (option, *names)}
    if containing := [name for name in names if {*words[option]} <= {*words[name]} and words[option][-1] == words[name][-1]]:
        return min(containing, key=lambda name: len(words[name]))
    likely = difflib.get_close_matches(option, names, n=3, cutoff=_LIKE)
    return next((name for name in likely if difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio() >= _LIKE), None)
