"""What a proposal is, and what every back end of the step is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.counterfactuals.options import ProposeOptions
from cfvlm_ds.counterfactuals.work_folder import WorkFolder
from cfvlm_ds.data.store import GroupStore


@dataclass(frozen=True)
class Source:
    """A picture with one of its captions."""

    id: str
    caption: str
    picture: Path | None = None
    license: str = ""


@dataclass(frozen=True)
class Proposal:
    """A counterfactual caption that differs in one thing. ``source`` and ``target`` are the words that changed, ``instruction`` is what an
    editor of pictures is told; ``picture`` is a real picture that the text is said of."""

    type: str
    text: str
    source: str
    target: str
    instruction: str
    back_end: str
    picture: Path | None = None

    def record(self, name: str) -> dict[str, Any]:
        """As a journal has it."""
        found = {
            "id": name, "type": self.type, "text": self.text, "from": self.source, "to": self.target,
            "instruction": self.instruction, "back_end": self.back_end,
        }  # fmt: skip
        return found | ({"picture": str(self.picture)} if self.picture else {})


@dataclass(frozen=True)
class Rejected:
    """A proposal that is none, and why; ``failed`` where there was no reply to judge."""

    back_end: str
    reason: str
    type: str = ""
    text: str = ""
    failed: bool = False

    def record(self) -> dict[str, Any]:
        """As a journal has it."""
        found = {"back_end": self.back_end, "reason": self.reason, "type": self.type, "text": self.text}
        return found | ({"failed": True} if self.failed else {})


Found = Sequence[Proposal | Rejected]


class Proposer(Protocol):
    """A back end of `data propose`. ``settings`` is what decides its proposals, and is kept with them; ``threads`` are the sources that it
    is asked about side by side."""

    threads: int

    def settings(self) -> Mapping[str, Any]: ...

    def propose(self, source: Source) -> Found:
        """What it proposes for a source, in an order of its own. It depends on nothing but the source and the settings."""
        ...


@dataclass(frozen=True)
class Context:
    """What a back end is made with."""

    options: ProposeOptions
    store: GroupStore
    work: WorkFolder
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    say: Callable[[str], object] = lambda line: None


def sources(store: GroupStore, places: Sequence[int] | None = None) -> Iterator[Source | DataError]:
    """The sources of data: the first image of each group with every caption that is true of it; what is wrong in place of a row."""
    for _, group in store.entries(places):
        if isinstance(group, DataError):
            yield group
            continue
        picture = group.images[0][0] if len(group.images[0]) == 1 else None
        number = 0
        for truth, candidate in zip(group.match[0], group.candidates, strict=True):
            if truth == 1:
                number += 1
                yield Source(group.id if number == 1 else f"{group.id}#{number}", candidate.text, picture, license_of(group.meta))


def license_of(meta: str) -> str:
    """The licence that a group's metadata state; empty for none."""
    try:
        said = parse_json(meta).get("license") if meta else None
    except (ValueError, AttributeError, RecursionError):
        return ""
    return said if isinstance(said, str) else ""
