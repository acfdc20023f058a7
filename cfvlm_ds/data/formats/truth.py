"""Truth labels: columns that mark the texts of a picture as true or false.

The user names such a column (``label=COLUMN``). A column that no option names and whose values look like truth labels is refused, and so is
a column that looks like false texts: otherwise false texts would be learned as true, or lost. A row with a label is a claim; the claims
about one picture, under one prompt, are one group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cfvlm_ds.core.conversation import Prompt, normalised, normalised_prompt, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import hashed, quoted
from cfvlm_ds.data.fields import as_list, as_meta, json_object, row_id

_TRUE = (
    "1", "true", "t", "yes", "y", "correct", "right", "positive", "match", "matched", "entailment", "entailed", "valid", "real",
    "good", "ok", "chosen", "accepted", "supported", "supports", "faithful", "grounded", "accurate", "consistent", "desirable",
)  # fmt: skip
_FALSE = (
    "0", "false", "f", "no", "n", "incorrect", "wrong", "negative", "mismatch", "mismatched", "contradiction", "refuted",
    "invalid", "fake", "foil", "bad", "rejected", "hallucinated", "hallucination", "falsified", "refutes", "unsupported",
    "unfaithful", "inaccurate", "inconsistent", "undesirable", "untrue", "not true", "not_entailment",
)  # fmt: skip
_UNKNOWN = ("neutral", "unknown", "unsure", "uncertain")
_TRUTHS: dict[str, int | None] = {**dict.fromkeys(_TRUE, 1), **dict.fromkeys(_FALSE, 0), **dict.fromkeys(_UNKNOWN)}
"""Values of a label, in lower case."""

_GAPS = {"nan", "na", "n/a", "none", "null", "-", "?"}
"""Notations of a missing value in tables."""

_MEANS_FALSE = frozenset((
    *(word for word in _FALSE if word.isalpha() and len(word) > 2), "mismatches", "foiled", "counterfactual", "hallucinations",
    "hallucinates", "contradicts", "contradicted", "contradictory",
))  # fmt: skip
"""Words in the names of columns that mark texts as false, or contain false texts."""

_NAMES = {*_TRUTHS, *_MEANS_FALSE, "label", "labels", "cls", "truth", "target", "gt", "kto", "answer", "verdict"} - {"t", "f", "n"}
_WEIGHTS = {"score", "weight", "loss", "quality", "rating", "similarity", "reward", "keep", "verified", "usable"}
"""Words in column names. If all rows have the same 0 or 1, a column is a label by _NAMES, and one of 0 also by _WEIGHTS."""

_FALSE_TEXTS = _MEANS_FALSE | {
    "neg", "negatives", "negated", "distractor", "distractors", "perturbed", "swapped", "corrupted", "altered", "adversarial", "contrast",
    "contrastive", "cf", "hn",
}  # fmt: skip
_INVERTS = _FALSE_TEXTS | {"not", "non", "error", "errors", "erroneous", "noise", "noisy", "misaligned", "unrelated", "irrelevant"}
"""Words in the names of labels whose "yes" may mean that the text is false."""

_LETTER, _SCRIPT = re.compile(r"[^\W\d_]"), re.compile(r"[^\W\d_a-zA-Z]{4}")
_PICTURE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$|#\d+\+\d+$", re.IGNORECASE)
"""End of a picture's name, or of the name of its bytes in a container."""
_MEMBER = re.compile(r"\.(txt|text|caption|cls|value|content|image|img|png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_FEW = 5  # largest number of distinct values of a label
_DEEP = 8  # largest nesting depth that is searched


def _is_phrase(text: str) -> bool:
    """Return whether a text has several words, or a few letters of a script without spaces between words."""
    return bool((len(text.split(None, 1)) > 1 and _LETTER.search(text)) or _SCRIPT.search(text))


class Column:
    """Summary of a column over rows: its first distinct values in lower case, the number of values, a text or picture, and a picture of a
    row that shows none.
    """

    def __init__(self, name: str, row: int) -> None:
        self.name, self.row, self.count, self.values, self.phrase, self.unseen = name, row, 0, dict[str, Any](), "", ""
        self._words = _words(name)

    def add(self, value: Any, blind: bool) -> None:
        value = as_list(value)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and (_is_phrase(item) or _PICTURE.search(item)):
                self.phrase = self.phrase or item
                if blind and _PICTURE.search(item):
                    self.unseen = self.unseen or item
            if isinstance(item, str | int | float) and (word := _word(item)):
                self.count += 1
                if len(self.values) <= _FEW:
                    self.values.setdefault(word, item)

    @property
    def is_label(self) -> bool:
        """True if the values may mark texts as true or false."""
        values, names, last = self.values.keys() - _GAPS, {*self._words}, self._words[-1:]
        if len(self.values) > _FEW or not values:
            return False
        if values & {"true", "false"} or any(_TRUTHS.get(word) == 0 and len(word) > 1 for word in values):
            return True
        many = self.count > len(self.values) > 1 and last not in (["id"], ["ids"])
        if values <= _TRUTHS.keys() | {"-1"}:
            named = not names.isdisjoint(_NAMES) or ("0" in values and not names.isdisjoint(_WEIGHTS))
            return (named and last not in (["id"], ["ids"])) or (many and not values.isdisjoint(("0", "-1", "f", "n")))
        if all(map(str.isdecimal, values)):  # class numbers, or the index of the right text
            return many and not names.isdisjoint(_NAMES)
        return many and len(self.values) <= 3 and last in (["label"], ["labels"])

    @property
    def is_false_texts(self) -> bool:
        """True if the values may be texts, or pictures, that are false."""
        return bool(self.phrase) and not _FALSE_TEXTS.isdisjoint(self._words)

    @property
    def negative(self) -> str:
        """Option that a column of false texts, or of pictures, should be given to."""
        return "negative_image" if _PICTURE.search(self.phrase) else "negative_caption"

    @property
    def option(self) -> str:
        """Options that name the column as a label, with its values if the usual meanings may not hold."""
        name = option_value(self.name)
        if not (values := self.values.keys() - _GAPS) <= _TRUTHS.keys():
            return f"label={name},true=...,false=..."
        if _INVERTS.isdisjoint(self._words):
            return f"label={name}"
        opposite = {"1": "0", "0": "1", "true": "false", "false": "true", "yes": "no", "no": "yes"}
        words = {truth: [word for word in self.values if word in values and _TRUTHS[word] == truth] for truth in (0, 1)}
        true, false = ("+".join(words[k] or [opposite.get(word, "...") for word in words[1 - k]]) for k in (0, 1))
        return f"label={name},true={true},false={false}"

    def __str__(self) -> str:
        shown = ", ".join(quoted(value, 40) for value in self.values.values()) if self.is_label else quoted(self.unseen or self.phrase, 80)
        return f"{self.name!r} ({shown})"


def marks(rows: Iterable[tuple[int, Mapping[str, Any], bool]], ignore: str, every: Collection[str] = ()) -> list[Column]:
    """Return the columns of metadata that look like labels, like false texts, or like pictures of rows that show none, in this order.

    Args:
        rows: number and metadata of each row, and whether it shows no picture.
        ignore: columns to skip, joined by ``+``.
        every: as in ``leaves``.
    """
    columns: dict[str, Column] = {}
    for number, row, blind in rows:
        for name, value in leaves(row, every):
            columns.setdefault(name, Column(name, number)).add(value, blind)
    marked = [column for column in columns.values() if column.name not in listed(ignore)]
    marked = [column for column in marked if column.is_label or column.is_false_texts or column.unseen]
    return sorted(marked, key=lambda column: (not column.is_label, not column.is_false_texts, "label" not in column.name))


def leaves(row: Mapping[str, Any], every: Collection[str] = (), before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the leaves of a row; ``a.b`` is ``b`` within ``a``, which is an object, a JSON text of one, or a list of
    objects.

    In a list, only the last object is searched, because the last message is the answer; in a column in ``every``, all objects are.
    """
    for key, value in row.items():
        items = value if isinstance(value, list) and value else [value]
        for item in items if key in every else items[-1:]:
            inner = item if isinstance(item, Mapping) else json_object(item)
            if inner and depth < _DEEP:
                yield from leaves(inner, (), f"{before}{key}.", depth + 1)
            else:
                yield f"{before}{key}", item if key in every else value


def option_value(value: str) -> str:
    """Format a value for an option of a format."""
    return f'"{value}"' if "," in value else value


def listed(columns: str) -> tuple[str, ...]:
    """Split the columns that an option names, which are joined by ``+``; a column name may itself contain a ``+``."""
    return (columns, *columns.split("+"))


def _words(name: str) -> list[str]:
    """Split a column's last name into words, without the prefix "is" and the ending of a tar's member: ``isFoil`` and ``foil.txt`` become
    ``foil``.
    """
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _MEMBER.sub("", name).rpartition(".")[2]).lower()
    return [re.sub("^is(?=.)", "", word) for word in re.findall(r"[a-z]+", own)]


def _word(value: Any) -> str:
    word = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", word)  # tables with gaps store integers as floats


def check_label(label: str, true: str, false: str, **others: object) -> None:
    """Raise DataError for options of a format that contradict each other, or that would not be read.

    Args:
        label: column of the label.
        true: values of the label that mean true, joined by ``+``.
        false: values of the label that mean false.
        **others: values of options that are not read beside a label.
    """
    if not label:
        if true or false:
            raise DataError("true= and false= list the values of a label; name its column, as in label=COLUMN")
        return
    if useless := [name for name, value in others.items() if value]:
        raise DataError(f"{useless[0]}= is not read beside label=, which says of each text whether it is true; leave one of them out")
    if both := sorted({*map(_word, true.split("+"))} & {*map(_word, false.split("+"))} - {""}):
        raise DataError(f"{both[0]!r} is listed as true and as false; keep one of them")
    if not (true or false) and not _INVERTS.isdisjoint(_words(label)):
        values = "list its values, as in true=0,false=1 or true=false,false=true"
        raise DataError(f"column {label!r} may mark the texts that are false by its yes; {values}")


def truth_of(value: Any, column: str, true: str, false: str) -> int | None:
    """Convert a label to 1, 0, or None for unknown. ``true`` and ``false`` list its values, joined by ``+``, in place of the usual ones.

    Raises DataError for any other value.
    """
    if value is None:
        raise DataError(f"row: column {column!r}, the label, is not there; write whether the text is true, or drop the row")
    known = {_word(word): truth for words, truth in ((true, 1), (false, 0)) if words for word in words.split("+")} or _TRUTHS
    if (word := _word(value)) not in known:
        remedy = "list the values, as in true=entailment,false=contradiction, and drop other rows"
        raise DataError(f"row: column {column!r} is {quoted(value)}, which is neither true nor false; {remedy}")
    return known[word]


_ASKS = re.compile(r"(is|are|was|were|does|did)\b.*|.*[?\uff1f]", re.DOTALL | re.IGNORECASE)


def is_question(text: str) -> bool:
    """Return whether a text asks for yes or no, or ends with a question mark."""
    return _ASKS.fullmatch(text) is not None


class Said(NamedTuple):
    """A text, its truth (None if unknown), and the edit type of a false text."""

    text: str
    truth: int | None
    edit: str = ""


class Claim(NamedTuple):
    """Texts that a row with a label marks as true or false of a picture; ``where`` is the row's place, if known."""

    pictures: Pictures
    prompt: Prompt
    said: tuple[Said, ...]
    source: str
    meta: dict[str, Any]
    where: str = "the row"

    @property
    def key(self) -> int:
        """Hash of the picture and the prompt, positive and of 63 bits."""
        about = [[str(picture) for picture in self.pictures], spelled(normalised_prompt(self.prompt))]
        return hashed(json.dumps(about)) >> 1


def joined(claims: Sequence[Claim]) -> CounterfactualGroup:
    """Join the claims about one picture and prompt to a group, true texts first. A repeated text is kept once, and counted in the metadata.

    Raises DataError, without file and line, if two claims contradict each other, or if no text is true.
    """
    first, known, places = claims[0], dict[str, Said](), dict[str, str]()
    for claim in claims:
        for statement in claim.said:
            before = known.setdefault(text := normalised(statement.text), statement)
            place = places.setdefault(text, claim.where)
            if before.truth != statement.truth:
                label = f"{place} and {claim.where} label {quoted(statement.text, 80)} differently for one picture"
                raise DataError(f"row: {label}; keep one of them (the {len(claims)} rows about it are one group)")
    statements = sorted(known.values(), key=lambda statement: statement.truth != 1)
    if statements[0].truth != 1:
        shown = ", ".join(map(str, first.pictures)) or "this prompt"
        rows = f"{len(claims)} row{'s' * (len(claims) > 1)}"
        raise DataError(
            f"row: nothing about {shown} is true of it ({rows}), and a group needs a true text; add one, or leave such rows out"
        )
    repeated = sum(len(claim.said) for claim in claims) - len(statements)
    meta = {key: [claim.meta.get(key) for claim in claims] for key in dict.fromkeys(key for claim in claims for key in claim.meta)}
    kept = {key: values[0] if all(value == values[0] for value in values) else values for key, values in meta.items()}
    texts = [statement.text for statement in statements]
    return CounterfactualGroup(
        id=row_id({}, spelled(first.prompt), texts, [[str(picture) for picture in first.pictures]]),
        images=(first.pictures,),
        candidates=tuple(Candidate(first.prompt, text) for text in texts),
        match=(tuple(statement.truth for statement in statements),),
        edits=tuple(Edit(claim.edit, text=c) for c, claim in enumerate(statements) if claim.edit and claim.truth == 0),
        source=first.source,
        meta=as_meta(kept | ({f"{first.source}.repeated": repeated} if repeated else {})),
    )
