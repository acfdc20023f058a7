"""Interface of proposers: sources, proposals, rejections, and the context of a back end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cfvlm_ds.core.errors import DataError, writing
from cfvlm_ds.core.files import file_lock
from cfvlm_ds.core.progress import Say, no_op
from cfvlm_ds.counterfactuals.options import ProposeOptions
from cfvlm_ds.counterfactuals.work_folder import WorkFolder
from cfvlm_ds.data.fields import json_object
from cfvlm_ds.data.store import GroupStore


@dataclass(frozen=True)
class Source:
    """A picture and one of its captions."""

    id: str
    caption: str
    picture: Path | None = None
    license: str = ""


@dataclass(frozen=True)
class Proposal:
    """A counterfactual caption, which differs from the source's caption in one detail.

    ``source`` and ``target`` are the replaced words and their replacement. ``instruction`` describes the change for a picture editor.
    ``picture`` is an existing picture that the text describes, or None.
    """

    type: str
    text: str
    source: str
    target: str
    instruction: str
    back_end: str
    picture: Path | None = None

    def record(self, name: str) -> dict[str, Any]:
        """Return the proposal as a record for the journal."""
        record = {
            "id": name, "type": self.type, "text": self.text, "from": self.source, "to": self.target,
            "instruction": self.instruction, "back_end": self.back_end,
        }  # fmt: skip
        return record | ({"picture": str(self.picture)} if self.picture else {})


@dataclass(frozen=True)
class Rejected:
    """A rejected proposal and the reason. ``failed`` is true if the back end gave no usable reply."""

    back_end: str
    reason: str
    type: str = ""
    text: str = ""
    failed: bool = False

    def record(self) -> dict[str, Any]:
        """Return the rejection as a record for the journal."""
        record = {"back_end": self.back_end, "reason": self.reason, "type": self.type, "text": self.text}
        return record | ({"failed": True} if self.failed else {})


Found = Sequence[Proposal | Rejected]


class Proposer(Protocol):
    """Back end of `data propose`.

    ``settings`` returns the settings that determine the proposals; the step records them. ``threads`` is the number of sources to
    process concurrently.
    """

    threads: int

    def settings(self) -> Mapping[str, Any]: ...

    def propose(self, source: Source) -> Found:
        """Propose edits for a source. The result must not depend on the order in which sources are processed."""
        ...


@dataclass(frozen=True)
class Context:
    """Arguments of a back end's constructor."""

    options: ProposeOptions
    store: GroupStore
    work: WorkFolder
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    say: Say = no_op


def sources(store: GroupStore, places: Sequence[int]) -> Iterator[Source | DataError]:
    """Yield the sources of the rows with the indices ``places``: one per true text of the first image, or the error if a row cannot be
    read.
    """
    for _, group in store.entries(places):
        if isinstance(group, DataError):
            yield group
            continue
        picture = group.images[0][0] if len(group.images[0]) == 1 else None
        license, number = json_object(group.meta).get("license"), 0
        for truth, candidate in zip(group.match[0], group.candidates, strict=True):
            if truth == 1:
                number += 1
                yield Source(
                    group.id if number == 1 else f"{group.id}#{number}",
                    candidate.text,
                    picture,
                    license if isinstance(license, str) else "",
                )


def made_once(path: Path, make: Callable[[], None], is_current: Callable[[Path], bool] = Path.exists) -> Path:
    """Return ``path``, a file that all shard jobs of a work folder share. If it is missing or outdated, one job writes it with ``make``
    while the others wait.
    """
    with writing(path, "free some space, or correct the folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f"{path.name}.lock")):
            if not path.is_file() or not is_current(path):
                make()
    return path
