"""What a data set is recognised by: hashes for its order and for each part of its rows, so that what has changed can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cfvlm_ds.core.conversation import spelled
from cfvlm_ds.core.groups import CounterfactualGroup
from cfvlm_ds.data.picture_index import PictureTable

Identity: TypeAlias = Mapping[str, int | str | None]
"""``rows`` counts them, ``order`` is a hash of their ids in order, the rest are sums over the rows, which their order does not change.
``pictures`` is None where a picture's contents are not known."""

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


def data_identity(
    groups: Iterable[CounterfactualGroup],
    roots: Sequence[Path],
    pictures: PictureTable | None = None,
) -> Identity:
    """The identity of groups whose pictures are in ``roots`` (data_roots); moved with their folder, they are the same.

    Edits are not part of it: they name rows of a table of results, and nothing is trained or scored by them.
    """
    return joined_identity([identity_part(groups, roots, pictures)])


@dataclass(frozen=True)
class IdentityPart:
    """What some rows, one after the other, add to an identity; ``order`` has 16 bytes of each."""

    rows: int
    order: Any
    known: bool
    sums: dict[str, int]


def identity_part(
    groups: Iterable[CounterfactualGroup],
    roots: Sequence[Path],
    pictures: PictureTable | None,
) -> IdentityPart:
    """Compute what consecutive groups add to the identity of their data set."""
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
            "paths": [[_inside(picture, prefixes) for picture in each] for each in group.images],
        }
        if pictures is not None and known:
            found = [[pictures.find(picture) for picture in each] for each in group.images]
            known = all(picture is not None for each in found for picture in each)
            parts["pictures"] = [[picture.size, picture.digest.hex()] for each in found for picture in each if picture is not None]
        for name, part in parts.items():
            sums[name] = (sums[name] + _hash([group.id, part])) % _MODULUS
    return IdentityPart(rows, bytes(order), known, sums)


def joined_part(parts: Sequence[IdentityPart]) -> IdentityPart:
    """Join consecutive parts to one."""
    sums = {name: sum(part.sums[name] for part in parts) % _MODULUS for name in SUMS}
    return IdentityPart(sum(part.rows for part in parts), b"".join(part.order for part in parts), all(part.known for part in parts), sums)


def joined_identity(parts: Sequence[IdentityPart]) -> Identity:
    """Join the parts of a whole data set, in order."""
    whole = joined_part(parts)
    return {
        "rows": whole.rows,
        "order": hashlib.blake2b(whole.order, digest_size=16).hexdigest(),
        **{name: f"{value:032x}" for name, value in whole.sums.items()},
        **({} if whole.known else {"pictures": None}),
    }


def mixed_identity(sources: Mapping[str, Identity], objectives: Mapping[str, Any]) -> Identity:
    """The identity of a mixture: that of its sources, their names and the objectives that each counts in."""
    known = all(identity.get("pictures") is not None for identity in sources.values())
    parts: dict[str, Any] = {}
    for part in ("order", *SUMS):
        parts[part] = f"{_hash([[name, identity[part]] for name, identity in sources.items()]):032x}"
    parts["mixture"] = f"{_hash([[name, objectives[name]] for name in sources]):032x}"
    rows = sum(int(identity["rows"] or 0) for identity in sources.values())
    return {"rows": rows, **parts, **({} if known else {"pictures": None})}


def digest(identity: Identity) -> str:
    """Thirty-two hexadecimal digits that stand for an identity, where it is named and not compared part by part."""
    return hashlib.blake2b(json.dumps(dict(identity), sort_keys=True).encode(), digest_size=16).hexdigest()


def changes(before: Identity, now: Identity, *, of_scores: bool = False) -> str | None:
    """The difference of two identities in words; None if there is none.

    Pictures that are known on both sides are compared by their contents, and by their paths otherwise. Of scores, which are by id and
    depend on texts and pictures alone, the order, labels and weights do not matter.
    """
    if before["rows"] != now["rows"]:
        return f"the number of rows ({now['rows']}, was {before['rows']})"
    if before.get("mixture") != now.get("mixture"):
        return "the mixture: its sources, their names or their objectives"
    if before["ids"] != now["ids"]:
        return "the groups (other ids)"
    left_out = "pictures" if before["pictures"] is None or now["pictures"] is None else "paths"
    compared = [name for name in (_OF_SCORES if of_scores else _PARTS) if name != left_out]
    if found := [_PARTS[name] for name in compared if before[name] != now[name]]:
        return " and ".join(found)
    return "the order of the rows" if before["order"] != now["order"] and not of_scores else None


def _hash(value: Any) -> int:
    text = json.dumps(value, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")


def _inside(picture: Path, prefixes: Sequence[tuple[str, ...]]) -> str:
    """The path relative to the first root that it is written under."""
    for prefix in prefixes:
        if picture.parts[: len(prefix)] == prefix:
            return "/".join(picture.parts[len(prefix) :])
    return str(picture)
