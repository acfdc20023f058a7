"""Option declarations: default, bounds, and the action if the value has changed when a run resumes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal

OnResume = Literal["confirm", "refuse", "free", "ignored"]
"""Reaction to an option that has changed since the checkpoint. "confirm", the default, refuses the change unless ``train.resume_changes``
allows it. "refuse" always refuses the change, because the run cannot continue from a checkpoint with a different value. "free" accepts it,
because only speed or memory use changes. "ignored" excludes the option from the comparison, for instance because it is a name, or a path
whose contents are compared instead.
"""

Range = tuple[float, float]
"""Smallest and largest value of a numeric option."""
ENDLESS = 2**53
"""Upper bound of an option that declares none. Floats represent every whole number up to this bound exactly."""
COUNT, AT_LEAST_ONE, SHARE, FINITE = (0, ENDLESS), (1, ENDLESS), (0, 1), (0, 1e38)


def option(
    default: Any = MISSING, default_factory: Any = MISSING, within: Range | None = None, *, on_resume: OnResume | None = None
) -> Any:
    """Declare a configuration option: its default, its range, and the action if its value has changed when a run resumes."""
    arguments = {"default": default} if default_factory is MISSING else {"default_factory": default_factory}
    return field(**arguments, metadata={"on_resume": on_resume, "within": within})


def declared(section: type, prefix: str) -> dict[str, OnResume]:
    """Return the ``on_resume`` value of each option in a section, keyed by ``prefix`` plus the field's name."""
    reactions: dict[str, OnResume] = {}
    for option in fields(section):
        if is_dataclass(option.default_factory):
            reactions |= declared(option.default_factory, f"{prefix}{option.name}.")
        else:
            reactions[prefix + option.name] = option.metadata.get("on_resume") or "confirm"
    return reactions


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into a mapping from dotted names to values."""
    options: dict[str, Any] = {}
    for name, value in values.items():
        options |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return options


def sentences(described: Any) -> dict[str, str]:
    """Return the option descriptions of a class or function, taken from ``Args:`` in its docstring and escaped for argparse."""
    parts = [(kind.__doc__ or "").partition("Args:")[2] for kind in reversed(getattr(described, "__mro__", (described,)))]
    entries = [entry for part in parts for entry in re.findall(r"^( +)(\w+): (.+?)(?=\n\1\w+: |\n*\s*\Z)", part, re.MULTILINE | re.DOTALL)]
    return {name: " ".join(text.split()).rstrip(".").replace("%", "%%") for _, name, text in entries}
