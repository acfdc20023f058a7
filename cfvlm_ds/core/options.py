"""Declarations of options: default, bounds, and what a resume does if the value changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal

OnResume = Literal["confirm", "refuse", "free", "ignored"]
"""What a resume does if an option changed. "confirm": it refuses, unless ``train.resume_changes`` allows the change. "refuse": it always
refuses, because no checkpoint of another value can be continued. "free": the result is the same, at another speed or in other memory.
"ignored": names, records, checks, and files that are compared by their contents."""

Range = tuple[float, float]
"""The least and the most that an option's number can be."""
ENDLESS = 2**53
"""The most of what has no bound: the largest whole number that every float below it counts to."""
COUNT, AT_LEAST_ONE, SHARE, FINITE = (0, ENDLESS), (1, ENDLESS), (0, 1), (0, 1e38)


def option(default: Any = MISSING, default_factory: Any = MISSING, within: Range | None = None, *, on_resume: OnResume) -> Any:
    """Declare an option of the configuration: its default, the least and most it can be, and what a resume does if it changed."""
    given = {"default": default} if default_factory is MISSING else {"default_factory": default_factory}
    return field(**given, metadata={"on_resume": on_resume, "within": within})


def declared(section: type, prefix: str) -> dict[str, OnResume | None]:
    """Map each option of a section, named after ``prefix``, to what a resume does if it changed; None where a field does not declare it."""
    found: dict[str, OnResume | None] = {}
    for each in fields(section):
        if is_dataclass(each.default_factory):
            found |= declared(each.default_factory, f"{prefix}{each.name}.")
        else:
            found[prefix + each.name] = each.metadata.get("on_resume")
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of nested sections."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def sentences(described: Any) -> dict[str, str]:
    """Find what each option of a class or function does, by the part of its docstring under ``Args:``, as the help of argparse takes it."""
    listed = [(each.__doc__ or "").partition("Args:")[2] for each in reversed(getattr(described, "__mro__", (described,)))]
    found = [pair for part in listed for pair in re.findall(r"^( +)(\w+): (.+?)(?=\n\1\w+: |\n*\s*\Z)", part, re.MULTILINE | re.DOTALL)]
    return {name: " ".join(text.split()).rstrip(".").replace("%", "%%") for _, name, text in found}
