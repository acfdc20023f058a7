"""Reference of all options, generated from the configuration classes: ``python docs/options.py`` writes it into configuration.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().with_name("configuration.md")
MARK = "<!-- written by docs/options.py -->\n\n"
sys.path.insert(0, str(PAGE.parents[1]))  # the options of this checkout, not of an installed package


def page() -> str:
    """Return the text of configuration.md with the current options."""
    written, _, _ = PAGE.read_text().partition(MARK)
    return written + MARK + options()


def options() -> str:
    """Return a table of options for each section of the configuration, then for each term of the objective."""
    from cfvlm_ds.core.config import SECTIONS
    from cfvlm_ds.objectives import OBJECTIVES

    tables = [_section(f"{name}.", section, "confirm") for name, section in SECTIONS.items()]
    return "\n".join(tables + [_section(f"objective.{name}.", term, "confirm") for name, term in OBJECTIVES.items()])


def _section(prefix: str, section: Any, kind: str) -> str:
    """Return a section's heading, description, table and nested sections. Options without their own ``on_resume`` get ``kind``."""
    said: dict[str, str] = {}
    for each in reversed(section.__mro__):
        said |= _arguments(each)
    hints, rows, inside = typing.get_type_hints(section), [], []
    for option in dataclasses.fields(section):
        if option.name not in said:
            raise SystemExit(f"{section.__name__}.{option.name} has no sentence under Args, which the reference needs")
        hint, own = hints[option.name], option.metadata.get("on_resume") or kind
        nested = next(filter(dataclasses.is_dataclass, _parts(hint)), None)
        kinds = {typing.get_origin(part) for part in _parts(hint)}  # for sections in a dict or list
        several = "NAME." if dict in kinds else f"{nested.__name__.upper()}." if nested and list in kinds else ""
        if nested:
            inside.append(_section(f"{prefix}{option.name}.{several}", nested, own))
        if not nested or several:
            rows.append(_row(prefix, option, hint, said[option.name], own))
    table = "| option | type | default | range | on resume | |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return (
        f"### {prefix.rstrip('.')}\n\n{(inspect.getdoc(section) or '').split('Args:')[0].replace('``', '`').strip()}\n\n{table}\n"
        + "\n".join(inside)
    )


def _row(prefix: str, option: Any, hint: Any, sentence: str, kind: str) -> str:
    from cfvlm_ds.core.strict import TERM

    made = option.default_factory is not dataclasses.MISSING
    default = option.default_factory() if made else option.default
    shown = "required" if default is dataclasses.MISSING else "none" if default in (None, "", {}) else f"`{_written(default)}`"
    within = TERM.get(option.name) if prefix.startswith("objective.") else option.metadata.get("within")
    cells = (f"`{prefix}{option.name}`", _type(hint), shown, _range(within), kind, _plain(sentence))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _arguments(section: type) -> dict[str, str]:
    """Return the sentences under ``Args:`` of a class's own docstring."""
    _, _, listed = inspect.cleandoc(section.__doc__ or "").partition("Args:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parts(hint: Any) -> list[Any]:
    return [hint, *(part for each in typing.get_args(hint) for part in _parts(each))]


def _type(hint: Any) -> str:
    """Return the name of a type in words."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{_written(value)}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return f"list of {typing.get_args(hint)[0].__name__.upper()}"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", list: "list of texts", dict: "names with values"}
    return names.get(typing.get_origin(hint) or hint) or hint.__name__


def _written(value: Any) -> str:
    """Return a value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _range(within: tuple[float, float] | None) -> str:
    if within is None:
        return ""
    low, high = within
    return f"at least {low:g}" if high >= _ENDLESS else f"{low:g} to {high:.10g}"


_ENDLESS = 2**53


def _plain(text: str) -> str:
    """Return a docstring's text on one line, with Markdown's backquotes."""
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    PAGE.write_text(page())
