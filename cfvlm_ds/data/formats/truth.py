"""Truth labels: columns that mark the texts of a picture as true or false.

The user names the label column (``label=COLUMN``). A column that no option names is rejected if its name and values are those of labels in
public data sets, if its values can only be labels, or if its name suggests false texts. Without this check, training could treat false
texts as true, or ignore them.

A claim is the set of texts that one row labels. All claims about the same image and prompt form one group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cfvlm_ds.core.conversation import Prompt, normalised, normalised_prompt, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit, Pictures
from cfvlm_ds.core.text import hashed, quoted
from cfvlm_ds.data.fields import Row, as_list, as_meta, json_object, row_id
from cfvlm_ds.data.passes import Done
from cfvlm_ds.data.rows import Rows
from cfvlm_ds.data.store import apply

_TRUE = (
    "1", "true", "t", "yes", "y", "correct", "right", "positive", "match", "matched", "entailment", "entailed", "valid", "real",
    "good", "ok", "chosen", "accepted", "supported", "supports", "faithful", "grounded", "accurate", "consistent", "desirable", "pos",
    "pass", "passed", "aligned",
)  # fmt: skip
_FALSE = (
    "0", "false", "f", "no", "n", "incorrect", "wrong", "negative", "mismatch", "mismatched", "contradiction", "refuted",
    "invalid", "fake", "foil", "bad", "rejected", "hallucinated", "hallucination", "falsified", "refutes", "unsupported",
    "unfaithful", "inaccurate", "inconsistent", "undesirable", "untrue", "not true", "not_entailment", "neg", "fail", "failed",
    "misaligned",
)  # fmt: skip
_UNKNOWN = ("neutral", "unknown", "unsure", "uncertain", "not enough info", "nei")
_TRUTHS: dict[str, int | None] = {**dict.fromkeys(_TRUE, 1), **dict.fromkeys(_FALSE, 0), **dict.fromkeys(_UNKNOWN)}
"""Lower-case label value -> truth value: 1, 0 or None (unknown)."""

_SAID_FALSE = frozenset(_FALSE) - {
    "0", "false", "f", "no", "n", "negative", "invalid", "fake", "bad", "rejected", "neg", "fail", "failed",
}  # fmt: skip
"""Values that identify a label column, regardless of its name."""

_GAPS = {"nan", "na", "n/a", "none", "null", "-", "?"}
"""Strings that stand for missing values in tables."""

_FALSE_NAMES = frozenset((
    *(word for word in _FALSE if len(word) > 2), "mismatches", "foiled", "counterfactual", "hallucinations", "hallucinates", "contradicts",
    "contradicted", "contradictory", "neg", "negatives", "negated", "distractor", "distractors", "perturbed", "swapped", "corrupted",
    "altered", "adversarial", "contrast", "contrastive", "cf", "hn", "not", "non", "error", "errors", "erroneous", "noise", "noisy",
    "misaligned", "unrelated", "irrelevant", "edited", "modified", "changed", "manipulated",
))  # fmt: skip
"""Words in the names of columns that contain false texts, and of label columns in which "yes" may mean that the text is false."""

_CHOICES = {"correct", "right", "answer"}
"""Words in the names of label columns whose values may also be indices into a list of texts."""

_VERDICTS = {"label", "labels", "gold", "verdict"}
"""Words in the names of label columns whose values need not be in ``_TRUTHS``."""
_FEW = 5  # maximum number of distinct values in such a column
_LABEL_NAMES = {
    *_TRUTHS, *_FALSE_NAMES, *_CHOICES, *_VERDICTS, "cls", "class", "truth", "target", "gt", "kto", "weight", "correctness", "validity",
    "entails",
}  # fmt: skip
_LABEL_NAMES -= {"t", "f", "n"}
"""Words in the names of label columns."""

_PICTURE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$|#\d+\+\d+$", re.IGNORECASE)
"""Pattern for the end of a picture's file name or of a reference to a picture in a container."""
_MEMBER = re.compile(r"\.(txt|text|caption|cls|value|content|image|img|png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_DEEP = 8  # maximum nesting depth that is searched


@dataclass
class Column:
    """A metadata column, and the evidence for and against its being a truth label.

    Args:
        name: name of the column.
        words: words in the name.
        row: index of the first row that has the column.
        values: distinct values, keyed by lower-case form. Unless the column's name suggests a label, only common label values are
            collected.
        has_others: whether the column has values that were not collected.
        false_text: a text or picture name from the column, if the column's name suggests false texts.
        unseen: a picture name from the column, if it occurs in a row without pictures.
    """

    name: str
    words: list[str]
    row: int
    values: dict[str, Any] = field(default_factory=dict)
    has_others: bool = False
    false_text: str = ""
    unseen: str = ""

    def add(self, value: Any, blind: bool) -> None:
        value = as_list(value)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                picture = _PICTURE.search(item)
                is_text = (" " in item.strip() and re.search(r"[^\W\d_]", item)) or not item.isascii()  # a time is not a text
                if (picture or is_text) and not _FALSE_NAMES.isdisjoint(self.words):
                    self.false_text = self.false_text or item
                if blind and picture:
                    self.unseen = self.unseen or item
            if (word := _word(item)) in _TRUTHS or not _LABEL_NAMES.isdisjoint(self.words):
                self.values.setdefault(word, item)
            else:
                self.has_others |= word not in _GAPS

    @property
    def is_label(self) -> bool:
        """True if the column's name and values indicate a label."""
        values = self.values.keys() - _GAPS - {""}
        if not values or self.words[-1:] in (["id"], ["ids"]):
            return False
        if _LABEL_NAMES.isdisjoint(self.words):
            return not self.has_others and not _SAID_FALSE.isdisjoint(values)
        if "weight" in self.words:  # in OpenAI's messages, 0 marks an answer that must not be learned
            return "0" in values
        others = values - _TRUTHS.keys() - {"-1"}
        if not others or (not _CHOICES.isdisjoint(self.words) and all(map(str.isdecimal, others))):
            return True
        has_few, has_verdict = 1 < len(values) <= _FEW, not _VERDICTS.isdisjoint(self.words)
        has_both = {0, 1} <= {_TRUTHS.get(value) for value in values if not value.isdecimal()}
        return has_few + has_verdict + has_both > 1  # two signs suffice: labels can have typos, another language or a 1-5 scale

    @property
    def negative(self) -> str:
        """Name of the option for reading this column: ``negative_image`` if the column holds pictures, otherwise ``negative_caption``."""
        return "negative_image" if _PICTURE.search(self.false_text) else "negative_caption"

    def __str__(self) -> str:
        shown = [*self.values.values()][:5] if self.is_label else [self.false_text or self.unseen]
        return f"{self.name!r} ({', '.join(quoted(value, 80) for value in shown)})"


def marks(rows: Iterable[tuple[int, Row, bool]], ignore: str) -> list[Column]:
    """Return suspicious metadata columns: first possible labels, then possible false texts, then picture names in rows without pictures.

    Args:
        rows: index and metadata of each row, and whether the row lacks pictures.
        ignore: columns to skip, joined by ``+``.
    """
    columns: dict[str, Column] = {}
    for number, row, blind in rows:
        for name, value in leaves(row):
            if (column := columns.get(name)) is None:
                column = columns[name] = Column(name, _words(name), number)
            column.add(value, blind)
    marked = [column for column in columns.values() if column.name not in listed(ignore)]
    marked = [column for column in marked if column.is_label or column.false_text or column.unseen]
    return sorted(marked, key=lambda column: (not column.is_label, not column.false_text, "label" not in column.name))


def leaves(row: Row, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each leaf in a row. ``a.b`` is the field ``b`` of ``a``, which can be an object, the JSON text of an
    object, or a list.

    Only the last item of a list is searched, because the last message of a conversation is the answer.
    """
    for key, value in row.items():
        item = value[-1] if isinstance(value, list) and value else value
        inner = item if isinstance(item, Mapping) else json_object(item)
        if inner and depth < _DEEP:
            yield from leaves(inner, f"{before}{key}.", depth + 1)
        else:
            yield f"{before}{key}", value


def option_value(value: str) -> str:
    """Return a value as it must be written in a format's options: in quotes if it contains a comma."""
    return f'"{value}"' if "," in value else value


def listed(columns: str) -> tuple[str, ...]:
    """Split an option's value at each ``+`` into column names. The unsplit value is included, because a column name can contain a ``+``."""
    return (columns, *columns.split("+"))


def _words(name: str) -> list[str]:
    """Split the last part of a column's name into lower-case words. The prefix "is" and the extension of a tar member are dropped:
    ``isFoil`` and ``foil.txt`` become ``foil``.
    """
    own = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _MEMBER.sub("", name).rpartition(".")[2]).lower()
    return [re.sub("^is(?=.)", "", word) for word in re.findall(r"[a-z]+", own)]


def _word(value: Any) -> str:
    word = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", word)  # tables with missing values store integers as floats


def check_label(label: str, true: str, false: str, **others: object) -> None:
    """Raise DataError for format options that contradict each other or would have no effect.

    Args:
        label: column of the label.
        true: values of the label that mean true, joined by ``+``.
        false: values of the label that mean false.
        **others: values of options that cannot be combined with a label.
    """
    if not label:
        if true or false:
            raise DataError("true= and false= list the values of a label; name its column, as in label=COLUMN")
        return
    if useless := [name for name, value in others.items() if value]:
        raise DataError(
            f"{useless[0]}= cannot be combined with label=, which states for each text whether it is true; leave one of them out"
        )
    if both := sorted({*map(_word, true.split("+"))} & {*map(_word, false.split("+"))} - {""}):
        raise DataError(f"{both[0]!r} is listed as both true and false; keep one")
    if not (true or false) and not _FALSE_NAMES.isdisjoint(_words(label)):
        values = "list its values, as in true=0,false=1 or true=false,false=true"
        raise DataError(f"'yes' in column {label!r} may mean that the text is false; {values}")


def truth_of(value: Any, column: str, true: str, false: str) -> int | None:
    """Convert a label to 1, 0 or None (unknown). ``true`` and ``false`` list the label values for 1 and for 0, joined by ``+``. If both are
    empty, common values such as "yes" and "wrong" are recognised.

    Raises DataError for any other value.
    """
    if value is None:
        raise DataError(f"row: the label in column {column!r} is missing; add it, or drop the row")
    known = {_word(word): truth for words, truth in ((true, 1), (false, 0)) if words for word in words.split("+")} or _TRUTHS
    if (word := _word(value)) not in known:
        remedy = "list the values, as in true=entailment,false=contradiction, and drop other rows"
        raise DataError(f"row: column {column!r} is {quoted(value)}, which means neither true nor false; {remedy}")
    return known[word]


def is_question(text: str) -> bool:
    """Return whether a text ends with a question mark."""
    return text.endswith(("?", "\uff1f"))


class LabelledText(NamedTuple):
    """A text, its truth value (None if unknown), and its edit type, which applies if the text is false."""

    text: str
    truth: int | None
    edit: str = ""


class Claim(NamedTuple):
    """Texts that a row labels as true or false of one image. ``where`` is the row's location, if known."""

    pictures: Pictures
    prompt: Prompt
    texts: tuple[LabelledText, ...]
    source: str
    meta: dict[str, Any]
    where: str = "the row"

    @property
    def key(self) -> int:
        """Hash of the pictures and the prompt, as a non-negative 63-bit integer."""
        about = [[str(picture) for picture in self.pictures], spelled(normalised_prompt(self.prompt))]
        return hashed(json.dumps(about)) >> 1


def joined(claims: Sequence[Claim]) -> CounterfactualGroup:
    """Merge all claims about an image and prompt into a group, true texts first. Duplicate texts are dropped; their number is recorded in
    the metadata.

    Raises DataError, without the file and line, if two claims contradict each other, or if no text is true.
    """
    first, known, places = claims[0], dict[str, LabelledText](), dict[str, str]()
    for claim in claims:
        for statement in claim.texts:
            before = known.setdefault(text := normalised(statement.text), statement)
            place = places.setdefault(text, claim.where)
            if before.truth != statement.truth:
                label = f"{place} and {claim.where} label {quoted(statement.text, 80)} differently for the same picture"
                raise DataError(f"row: {label}; keep one (the {len(claims)} rows about the picture are one group)")
    statements = sorted(known.values(), key=lambda statement: statement.truth != 1)
    if statements[0].truth != 1:
        shown = ", ".join(map(str, first.pictures)) or "this prompt"
        rows = f"{len(claims)} row{'s' * (len(claims) > 1)}"
        raise DataError(f"row: no text about {shown} is true ({rows}), but a group needs a true text; add one, or leave these rows out")
    repeated = sum(len(claim.texts) for claim in claims) - len(statements)
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


class JoinedRows:
    """Rows of a manifest after joining all rows about the same image and prompt. They are ordered by their first manifest row. The join
    takes 8 bytes of memory per manifest row.

    Args:
        rows: rows of the manifest.
        claim: the format's function that returns the claim of a row.
        over: callable that maps a function over chunks of the rows.
    """

    def __init__(self, rows: Rows, claim: Callable[[Row], Claim], over: Callable[..., Iterator[Any]]) -> None:
        self.path, self.roots = rows.path, rows.roots
        self._rows, self._claim = rows, claim
        keys = np.concatenate([*over(self._keys)])
        _, first, joined = np.unique(keys, return_index=True, return_inverse=True)
        joined = np.argsort(np.argsort(first))[joined]  # numbered in file order
        self._members = np.argsort(joined, kind="stable").astype("<u4")
        self._ends = np.cumsum(np.bincount(joined)).astype("<u4")

    def __len__(self) -> int:
        return len(self._ends)

    def where(self, row: int) -> str:
        """Return the location of the first manifest row in a joined row."""
        return self._rows.where(self._rows_of(row)[0])

    def value(self, row: int) -> Any:
        """Return the claims in a joined row as a tuple, or the DataError of its first invalid manifest row."""
        claims = []
        for member in self._rows_of(row):
            if isinstance(claim := self._read(member), DataError):
                return claim
            claims.append(claim._replace(where=self._rows.where(member)))
        return tuple(claims)

    def _rows_of(self, row: int) -> list[int]:
        return self._members[self._ends[row - 1] if row else 0 : self._ends[row]].tolist()

    def _read(self, row: int) -> Claim | DataError:
        if isinstance(value := self._rows.value(row), DataError):
            return value
        where = self._rows.where(row)
        try:
            return apply(self._claim, value)
        except DataError as error:
            return DataError(f"{where}: {error}")

    def _keys(self, places: Sequence[int], done: Done) -> Any:
        """Return an integer key for each row. Rows about the same image and prompt have the same key; an invalid row has a unique key."""
        keys = []
        for row in places:
            claim = self._read(row)
            keys.append(-1 - row if isinstance(claim, DataError) else claim.key)
            done()
        return np.array(keys, np.int64)
