"""Columns that say whether a text is true of its picture.

They are read where the user names the column (``label=COLUMN``) and refused where nobody has said what they are: a false text that is read
as a caption would be learned as true. A row with a label is a claim; the claims about one picture, under one prompt, are one group.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from cfvlm_ds.core.conversation import Prompt, normalised, normalised_prompt, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.formats.fields import as_meta, row_id

_TRUE = (
    "1", "true", "t", "yes", "y", "correct", "right", "positive", "match", "matched", "entailment", "entailed", "valid", "real",
    "good", "chosen", "accepted", "supported", "supports", "faithful", "accurate", "consistent", "desirable",
)  # fmt: skip
_FALSE = (
    "0", "false", "f", "no", "n", "incorrect", "wrong", "negative", "mismatch", "mismatched", "contradiction", "refuted",
    "invalid", "fake", "foil", "bad", "rejected", "hallucinated", "hallucination", "falsified", "refutes", "unsupported",
    "unfaithful", "inaccurate", "inconsistent", "undesirable", "untrue", "not true", "not_entailment",
)  # fmt: skip
_TRUTHS: dict[str, int | None] = {**dict.fromkeys(_TRUE, 1), **dict.fromkeys(_FALSE, 0), "neutral": None, "unknown": None}
"""Values of a label, in small letters."""

_NAMES = frozenset((
    "label", "labels", "cls", "truth", "true", "false", "correct", "incorrect", "correctness", "wrong", "valid", "invalid",
    "match", "matches", "matched", "matching", "mismatch", "mismatched", "positive", "negative", "foil", "foiled", "fake", "real",
    "hallucinated", "hallucination", "entails", "entailed", "entailment", "contradiction", "faithful", "supported", "factual",
    "counterfactual", "aligned", "accepted", "rejected", "chosen", "preferred", "good", "bad", "desirable", "kto", "verdict",
    "judgment", "judgement", "feedback", "answer", "target", "falsified", "istrue", "iscorrect", "isfoil", "truthful",
    "truthfulness", "mismatches", "veracity", "accurate", "consistent", "gt",
))  # fmt: skip
"""Words of a column's name, any of which says that its two values are those of a label."""

_MEANS_FALSE = frozenset((
    "false", "incorrect", "wrong", "invalid", "mismatch", "mismatched", "mismatches", "negative", "foil", "foiled", "isfoil", "fake",
    "hallucinated", "hallucination", "contradiction", "counterfactual", "rejected", "bad", "falsified",
))  # fmt: skip
"""Those of them by which a column marks the texts that are false: a yes may mean no there."""

_WEIGHTS = frozenset(("score", "weight", "loss", "quality", "rating", "similarity", "reward", "keep", "verified", "usable"))
"""Words of a column's name that is a mark where its value is 0 or no: the text counts for nothing."""


def refuse_marks(row: Mapping[str, Any], remedy: str, ignore: str = "") -> None:
    """Raise DataError for a column, of those that a format does not read, which may say that a text is false, or no picture's.

    Args:
        row: the columns.
        remedy: what the user can say, with {} for the column's name.
        ignore: columns that are none, joined by ``+``.
    """
    for name, value in row.items():
        if (kind := _kind(name)) and _is_mark(kind, value) and name not in listed(ignore):
            said = f"column {name!r} ({quoted(value, 40)}) may say whether the text is true, and would not be read"
            raise DataError(f"row: {said}; {remedy.format(name)}")


def listed(columns: str) -> tuple[str, ...]:
    """The columns that an option names: one, or several joined by ``+``."""
    return (columns, *columns.split("+"))


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


@lru_cache(1 << 12)
def _kind(name: str) -> str:
    """Whether a column of this name is a label where it has two values, or a weight."""
    words = _words(name)
    if words and words[-1] in ("id", "ids") and "label" not in words:
        return ""
    return "label" if not _NAMES.isdisjoint(words) else "weight" if not _WEIGHTS.isdisjoint(words) else ""


def _is_mark(kind: str, value: Any) -> bool:
    said = [_word(each) for each in (value if isinstance(value, list) else [value])]
    if any(_TRUTHS.get(word) == 0 for word in said):
        return kind == "label" or all(word in _TRUTHS for word in said)
    return kind == "label" and bool(said) and all(word in _TRUTHS or word == "-1" for word in said)


def _word(value: Any) -> str:
    word = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", word)  # as tables with gaps have it


def truth_of(value: Any, column: str, true: str, false: str) -> int | None:
    """What a label says: 1, 0, or None for unknown. ``true`` and ``false`` list its values, joined by ``+``, in place of the usual ones.

    Raises DataError for any other value, and where a column that marks false texts by its name comes without such lists.
    """
    own = {_word(word): truth for words, truth in ((true, 1), (false, 0)) if words for word in words.split("+")}
    if not own and _MEANS_FALSE.intersection(_words(column)):
        values = "list its values, as in true=0,false=1 or true=false,false=true"
        raise DataError(f"row: column {column!r} may mark the texts that are false by its yes; {values}")
    if both := sorted({*map(_word, true.split("+"))} & {*map(_word, false.split("+"))} - {""}):
        raise DataError(f"row: {both[0]!r} is listed as true and as false; keep one of them")
    known = own or _TRUTHS
    if (word := _word(value)) not in known:
        remedy = "list the values, as in true=entailment,false=contradiction, and drop other rows"
        raise DataError(f"row: column {column!r} is {quoted(value)}, which is neither true nor false; {remedy}")
    return known[word]


class Said(NamedTuple):
    """A text, whether it is true (None: unknown), and what kind of counterfactual it is where it is false."""

    text: str
    truth: int | None
    edit: str = ""


class Claim(NamedTuple):
    """What a row with a label says of a picture; ``where`` is the row's place, if it is known."""

    pictures: Pictures
    prompt: Prompt
    said: tuple[Said, ...]
    source: str
    meta: dict[str, Any]
    where: str = "the row"

    @property
    def key(self) -> int:
        """A hash of the picture and the prompt, positive and of 63 bits."""
        about = [[str(picture) for picture in self.pictures], spelled(normalised_prompt(self.prompt))]
        digest = hashlib.blake2b(json.dumps(about).encode("utf-8", "surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "little") >> 1


def joined(claims: Sequence[Claim]) -> CounterfactualGroup:
    """The claims about one picture, under one prompt, as a group: true texts first. A text that is there twice is kept once, and counted
    in the metadata.

    Raises DataError, without file and line, where two of them contradict each other, and where none of them is true.
    """
    first, known, places = claims[0], dict[str, Said](), dict[str, str]()
    for claim in claims:
        for each in claim.said:
            before = known.setdefault(text := normalised(each.text), each)
            place = places.setdefault(text, claim.where)
            if before.truth != each.truth:
                label = f"{place} and {claim.where} label {quoted(each.text, 80)} differently for one picture"
                raise DataError(f"row: {label}; keep one of them (the {len(claims)} rows about it are one group)")
    said = sorted(known.values(), key=lambda each: each.truth != 1)
    if said[0].truth != 1:
        shown = ", ".join(map(str, first.pictures)) or "this prompt"
        none = f"none of the {len(claims)} rows about {shown} says anything true of it"
        raise DataError(f"row: {none}, and a group needs a true text beside the false ones; add one, or leave them out")
    repeated = sum(len(claim.said) for claim in claims) - len(said)
    meta = {key: [claim.meta.get(key) for claim in claims] for key in dict.fromkeys(key for claim in claims for key in claim.meta)}
    kept = {key: values[0] if all(each == values[0] for each in values) else values for key, values in meta.items()}
    texts = [each.text for each in said]
    return CounterfactualGroup(
        id=row_id({}, spelled(first.prompt), texts, [[str(picture) for picture in first.pictures]]),
        images=(first.pictures,),
        candidates=tuple(Candidate(first.prompt, text) for text in texts),
        match=(tuple(each.truth for each in said),),
        edits=tuple(Edit(each.edit, text=c) for c, each in enumerate(said) if each.edit and each.truth == 0),
        source=first.source,
        meta=as_meta(kept | ({f"{first.source}.repeated": repeated} if repeated else {})),
    )
