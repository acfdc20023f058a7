"""Data set identity: a fingerprint with one hash each for ids, texts, labels, weights, picture paths, picture contents and row order. Error
messages can therefore name what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.conversation import spelled
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.picture_index import PictureTable

Identity: TypeAlias = Mapping[str, int | str | None]
"""``rows`` is the number of rows, and ``order`` is a hash of the sequence of row ids. The other entries are sums of per-row hashes, which
do not depend on the order. ``pictures`` is None if the contents of any picture are unknown."""

_PARTS = {
    "texts": "prompts or texts",
    "labels": "labels (match)",
    "weights": "weights",
    "paths": "image paths",
    "pictures": "contents of pictures",
}
SUMS = ("ids", *_PARTS)
_OF_SCORES = ("texts", "paths", "pictures")
_MODULUS = 1 << 128
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would build an encoder for each part


def data_identity(
    groups: Iterable[CounterfactualGroup],
    roots: Sequence[Path],
    pictures: PictureTable | None = None,
) -> Identity:
    """Compute the identity of a data set from its groups. Picture paths are hashed relative to ``roots``, so moving these folders does not
    change the identity.

    Edits are not part of the identity, because they only label rows of result tables.
    """
    return joined_identity([identity_part(groups, roots, pictures)])


@dataclass(frozen=True)
class IdentityPart:
    """Contribution of consecutive rows to the identity of their data set. ``order`` holds a 16-byte hash of each row's id. ``known`` states
    whether the contents of all pictures are known.
    """

    rows: int
    order: Any
    known: bool
    sums: dict[str, int]


def identity_part(
    groups: Iterable[CounterfactualGroup],
    roots: Sequence[Path],
    pictures: PictureTable | None,
) -> IdentityPart:
    """Compute the contribution of consecutive groups to the identity of their data set."""
    prefixes = [root.parts for root in roots]
    sums: dict[str, int] = dict.fromkeys(SUMS, 0)
    order, rows, known = bytearray(), 0, pictures is not None
    for group in groups:
        rows += 1
        order += _hash([group.id]).to_bytes(16, "little")
        parts: dict[str, Any] = {
            "ids": None,
            "texts": [[spelled(candidate.prompt), candidate.text] for candidate in group.candidates],
            "labels": [group.match, group.keys, group.exclude] if group.keys or group.exclude else group.match,
            "weights": group.weight,
            "paths": [[path_in(picture, prefixes) for picture in image] for image in group.images],
        }
        if pictures is not None and known:
            entries = [pictures.find(picture) for image in group.images for picture in image]
            known = all(entry is not None for entry in entries)
            parts["pictures"] = [[entry.size, entry.digest.hex()] for entry in entries if entry is not None]
        for name, part in parts.items():
            sums[name] = (sums[name] + _hash([group.id, part])) % _MODULUS
    return IdentityPart(rows, bytes(order), known, sums)


def joined_part(parts: Sequence[IdentityPart]) -> IdentityPart:
    """Combine the parts of consecutive ranges of rows into one part."""
    sums = {name: sum(part.sums[name] for part in parts) % _MODULUS for name in SUMS}
    return IdentityPart(sum(part.rows for part in parts), b"".join(part.order for part in parts), all(part.known for part in parts), sums)


def joined_identity(parts: Iterable[IdentityPart]) -> Identity:
    """Compute the identity of a complete data set from the contributions of all its rows, in order."""
    rest, order = list[IdentityPart](), hashlib.blake2b(digest_size=16)
    for part in parts:
        order.update(part.order)
        rest.append(replace(part, order=b""))
    whole = joined_part(rest)
    return {
        "rows": whole.rows,
        "order": order.hexdigest(),
        **{name: f"{value:032x}" for name, value in whole.sums.items()},
        **({} if whole.known else {"pictures": None}),
    }


def mixed_identity(sources: Mapping[str, Identity], objectives: Mapping[str, Any]) -> Identity:
    """Compute the identity of a mixture from the identities, names and objectives of its sources."""
    known = all(identity.get("pictures") is not None for identity in sources.values())
    parts: dict[str, Any] = {}
    for part in ("order", *SUMS):
        parts[part] = f"{_hash([[name, identity[part]] for name, identity in sources.items()]):032x}"
    parts["mixture"] = f"{_hash([[name, objectives[name]] for name in sources]):032x}"
    rows = sum(int(identity["rows"] or 0) for identity in sources.values())
    return {"rows": rows, **parts, **({} if known else {"pictures": None})}


def digest(identity: Identity) -> str:
    """Return a hash of an identity as 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(dict(identity), sort_keys=True).encode(), digest_size=16).hexdigest()


def changes(before: Identity, now: Identity, *, of_scores: bool = False) -> str | None:
    """Describe the difference between two identities, or return None if there is none.

    Pictures are compared by contents if both identities include them, otherwise by path. If ``of_scores`` is True, differences in order,
    labels and weights are ignored, because scores are stored by id and depend only on texts and pictures.
    """
    if before["rows"] != now["rows"]:
        return f"the number of rows ({now['rows']}, was {before['rows']})"
    if before.get("mixture") != now.get("mixture"):
        return "the mixture: its sources, their names or their objectives"
    if before["ids"] != now["ids"]:
        return "the groups (different ids)"
    left_out = "pictures" if before["pictures"] is None or now["pictures"] is None else "paths"
    compared = [name for name in (_OF_SCORES if of_scores else _PARTS) if name != left_out]
    if differences := [_PARTS[name] for name in compared if before[name] != now[name]]:
        return " and ".join(differences)
    return "the order of the rows" if before["order"] != now["order"] and not of_scores else None


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(_ENCODER.encode(value).encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def path_in(picture: Path, prefixes: Sequence[tuple[str, ...]]) -> str:
    """Return a picture's path relative to the first root that contains it, or the full path if no root contains it."""
    for prefix in prefixes:
        if picture.parts[: len(prefix)] == prefix:
            return "/".join(picture.parts[len(prefix) :])
    return str(picture)
