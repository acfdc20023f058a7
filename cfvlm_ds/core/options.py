"""How an option of the configuration is declared: its default, its bounds, and what its change means when a run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal

Kind = Literal["meaning", "fixed", "speed", "bookkeeping"]

Range = tuple[float, float]
"""The least and the most that an option's number can be."""
ENDLESS = 2**53
"""The most of what has no bound: the largest whole number that every float below it counts to."""
COUNT, AT_LEAST_ONE, SHARE, FINITE = (0, ENDLESS), (1, ENDLESS), (0, 1), (0, 1e38)


def _declared(kind: Kind, default: Any = MISSING, default_factory: Any = MISSING, within: Range | None = None) -> Any:
    given = {"default": default} if default_factory is MISSING else {"default_factory": default_factory}
    return field(**given, metadata={"kind": kind, "within": within})


meaning = partial(_declared, "meaning")
"""An option that decides what is trained: changed on a resume, it is refused unless ``train.resume_changes`` allows it."""
fixed = partial(_declared, "fixed")
"""An option of ``meaning`` with which no checkpoint of another value can be continued."""
speed = partial(_declared, "speed")
"""An option that decides how fast and with how much memory the same is trained; it may change on a resume."""
bookkeeping = partial(_declared, "bookkeeping")
"""An option of names, records, checks and stops, or of what is compared by its contents; it may change on a resume."""


def declared(section: type, prefix: str) -> dict[str, Kind | None]:
    """What a change of each option of a section means on a resume, by its name after ``prefix``; None where a field does not say."""
    found: dict[str, Kind | None] = {}
    for option in fields(section):
        if is_dataclass(option.default_factory):
            found |= declared(option.default_factory, f"{prefix}{option.name}.")
        else:
            found[prefix + option.name] = option.metadata.get("kind")
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
