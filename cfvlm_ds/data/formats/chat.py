"""Parser for conversations in the notations of public data sets: turns, picture positions and scored answers.

Messages are ``{"from": "human" | "gpt" | "system", "value": TEXT}`` (ShareGPT, LLaVA) or ``{"role": "user" | "assistant" | "system",
"content": TEXT or PARTS}`` (OpenAI, TRL). In a text, the placeholder ``<image>`` marks the position of the row's next picture. Without
placeholders, the pictures are placed at the beginning of the first user turn. Whitespace around a turn and line breaks next to ``<image>``
are removed. A column that is null is treated as missing, because Parquet stores missing values as nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cfvlm_ds.core.conversation import PICTURE, Part, Prompt, Turn, check_conversation, pictures_of, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Groups, Pictures
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.fields import Row, as_meta, row_id, string, value_of, without
from cfvlm_ds.data.formats.truth import Claim, LabelledText, check_label, joined, listed, truth_of

IMAGES = ("image", "images")
PATHS = ("image_path", "img_path", "file_name", "filename", "filepath")
"""Columns that may contain a picture's path if a row has none of the columns in IMAGES."""
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_TOOLS = ("tool", "tools", "function", "function_call", "tool_call", "observation", "ipython")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_PLACE = "<image>"
_KINDS = {"image": ("image", "path", "url", "value"), "image_url": ("image_url", "value"), "input_image": ("image_url",)}
_TEXT_KINDS = ("text", "input_text", "output_text")


class Spoken(NamedTuple):
    """Parsed messages: their turns, their pictures (None for a picture whose file the message does not name), and their extra keys."""

    turns: tuple[Turn, ...]
    pictures: tuple[Path | None, ...]
    further: list[dict[str, Any]]


def without_nulls(row: Row, ignore: str = "") -> dict[str, Any]:
    """Copy a row, leaving out ignored columns, null columns, and empty video or audio columns."""
    return {
        key: value
        for key, value in row.items()
        if value is not None and not (key in _OTHER_MEDIA and value in ([], "")) and not (ignore and key in listed(ignore))
    }


def read_messages(value: Any, where: str) -> Spoken:
    """Parse a list of messages in the notation of ShareGPT or OpenAI.

    Raises DataError for a malformed message, and for tool calls, video and audio, which no objective can use.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"{where} must be a non-empty list of messages, not {quoted(value)}")
    turns, pictures, further = list[Turn](), list[Path | None](), list[dict[str, Any]]()
    for number, message in enumerate(map(without_nulls, value), 1):
        place = f"{where}: message {number}"
        spelling = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        for key in spelling:
            if key not in message:
                raise DataError(f"{place}: key {key!r} is missing; a message has the keys 'from' and 'value', or 'role' and 'content'")
        role, content = message[spelling[0]], message[spelling[1]]
        if role in _TOOLS or message.get("tool_calls"):
            raise DataError(f"{place} belongs to a tool; conversations with tools are not supported, so leave the row out")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place}: {spelling[0]!r} is {quoted(role)}; it must be one of {', '.join(ROLES)}")
        parts, named = _read_content(content, place)
        turns.append(Turn(ROLES[role], parts))
        pictures += named
        further.append({key: value for key, value in message.items() if key not in spelling and value not in ([], "")})
    return Spoken(tuple(turns), tuple(pictures), further)


def read_text(text: str) -> tuple[Part, ...]:
    """Split a text at its ``<image>`` placeholders."""
    parts: list[Part] = []
    for number, piece in enumerate(text.strip().split(_PLACE)):
        parts += [PICTURE] * (number > 0) + [piece.strip("\n")] * bool(piece.strip())
    return tuple(parts)


def _read_content(content: Any, where: str) -> tuple[tuple[Part, ...], list[Path | None]]:
    if isinstance(content, str):
        parts = list(read_text(content))
        return tuple(parts), [None] * sum(part is PICTURE for part in parts)
    if not isinstance(content, list):
        raise DataError(f"{where}: its content must be a string or a list of parts, not {quoted(content)}")
    parts, pictures = [], list[Path | None]()
    for part in content:
        if not isinstance(part, Mapping):
            raise DataError(f"{where}: a part must be an object with a 'type', not {quoted(part)}")
        kind = part.get("type")
        if kind in _TEXT_KINDS:
            text = part.get("text", part.get("value"))
            if not isinstance(text, str):
                raise DataError(f"{where}: a part of type {kind!r} must have a 'text', not {quoted(text)}")
            parts += [text] * bool(text.strip())
        elif kind in _KINDS:
            named = next((part[key] for key in _KINDS[kind] if part.get(key) is not None), None)
            if isinstance(named, Mapping) and "url" in named:
                named = named["url"]
            pictures.append(None if named is None else read_picture(named, where))
            parts.append(PICTURE)
        else:
            raise DataError(f"{where}: a part of type {quoted(kind)} is not supported; only texts and pictures are, so leave the row out")
    if isinstance(first := parts[0] if parts else None, str):
        parts[0] = first.lstrip()
    if isinstance(last := parts[-1] if parts else None, str):
        parts[-1] = last.rstrip()
    return tuple(parts), pictures


def read_picture(value: Any, where: str) -> Path:
    """Return the path of a picture. ``value`` is the path or an object that contains it. Raises DataError for a URL, and for picture bytes
    within the row.
    """
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        value = value["path"]
    if not isinstance(value, str):
        raise DataError(f"{where}: a picture must be the path of a file, not {quoted(value)}")
    if value.startswith(("http://", "https://")):
        raise DataError(f"{where}: picture {quoted(value)} is a web address; first download the pictures with `cfvlm-ds data download`")
    if value.startswith("data:"):
        raise DataError(
            f"{where}: a picture is embedded in the row ({quoted(value, 40)}); write it to a file with `cfvlm-ds data download`"
        )
    return Path(value.removeprefix("file://"))


def read_pictures(value: Any, where: str) -> Pictures:
    """Return the paths of the pictures in ``value``, which is one picture or a list of pictures."""
    return tuple(read_picture(picture, where) for picture in (value if isinstance(value, list) else [value]))


def row_pictures(row: Row, keys: Sequence[str]) -> Pictures:
    """Return the pictures in the row's picture column (one of ``keys``), or () if there is none. Raises DataError if the row has several of
    these columns, and for video or audio.
    """
    for key in _OTHER_MEDIA:
        if key in row:
            raise DataError(f"row: {key!r} is not supported; only texts and pictures are, so leave the row out")
    key = only(row, keys, "name pictures")
    return read_pictures(row[key], f"row: {key!r}") if key else ()


def only(row: Row, columns: Sequence[str], what: str) -> str:
    """Return the name of the one column in ``columns`` that is present in the row, or "" if none is. Raises DataError if more than one is
    present.
    """
    given = [key for key in columns if key in row]
    if len(given) > 1:
        raise DataError(f"row: both {given[0]!r} and {given[1]!r} {what}; keep one, or ignore the other (ignore=COLUMN)")
    return given[0] if given else ""


def placed(spoken: Spoken, given: Pictures, where: str) -> tuple[tuple[Turn, ...], Pictures]:
    """Return the turns, with a placeholder at the position of each picture, and the pictures in the order of the placeholders.

    Pictures are named in the messages or in other columns (``given``). Without placeholders, the pictures are placed at the beginning of
    the first user turn. Raises DataError if the numbers of placeholders and pictures differ, or if a turn other than the user's has a
    placeholder.
    """
    places = len(spoken.pictures)
    for number, turn in enumerate(spoken.turns, 1):
        if turn.role != "user" and PICTURE in turn.parts:
            what = "an answer" if turn.role == "assistant" else f"the turn of the {turn.role}"
            raise DataError(f"{where}: {what} has a picture (turn {number}); only the user shows pictures, so move it or leave the row out")
    if named := [picture for picture in spoken.pictures if picture is not None]:
        if given or len(named) < places:
            raise DataError(f"{where}: some pictures are named in the messages and some outside them; name all of them in one way")
        return spoken.turns, tuple(named)
    if not places and given:
        first = next((number for number, turn in enumerate(spoken.turns) if turn.role == "user"), None)
        if first is not None:
            shown = Turn("user", ((PICTURE,) * len(given)) + spoken.turns[first].parts)
            return (*spoken.turns[:first], shown, *spoken.turns[first + 1 :]), given
    if places != len(given):
        remedy = "add pictures, or remove marks" if places > len(given) else "write <image> where each picture is shown"
        raise DataError(f"{where}: {places} marks <image> for {len(given)} pictures; {remedy}")
    return spoken.turns, given


def shown_in(row: Row, spoken: Spoken) -> tuple[tuple[Turn, ...], Pictures, tuple[str, ...]]:
    """Return the turns of a row, their pictures (see ``placed``), and the names of the columns in which pictures were looked up."""
    columns = IMAGES if any(spoken.pictures) or any(key in row for key in IMAGES) else PATHS
    return *placed(spoken, row_pictures(row, columns), "row"), columns


def answer_of(turn: Turn) -> str:
    """Return the text of the scored turn. Raises DataError if it is not an assistant turn or has a picture."""
    if turn.role != "assistant":
        raise DataError(f"row: the conversation ends with the {turn.role}; its last message must be the assistant's, so add or remove one")
    if PICTURE in turn.parts:
        raise DataError("row: an answer has a picture; only the user shows pictures, so move it or leave the row out")
    return " ".join(part for part in turn.parts if isinstance(part, str))


def with_system(spoken: Spoken, row: Row) -> Spoken:
    """Return the conversation, preceded by the system prompt if the row has a column ``system``."""
    system = string(row, "system", "row") if "system" in row else ""
    if not system.strip():
        return spoken
    if spoken.turns[0].role == "system":
        raise DataError("row: both the column 'system' and the first message are system prompts; keep one")
    return spoken._replace(turns=(Turn("system", (system.strip(),)), *spoken.turns))


class _Read(NamedTuple):
    """Parsed conversation row. ``beside`` holds the name of the message column and the extra keys of each message."""

    row: Row
    turns: tuple[Turn, ...]
    pictures: Pictures
    beside: tuple[str, list[dict[str, Any]]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Instruct:
    """Base class of conversation formats. A group has one image, and one text or, if ``label`` is set, all labelled answers to a
    question.

    Args:
        per_turn: make one group for every answer of a conversation, not only for the last one.
        label: column that marks the last answer as true or false, as in KTO rows.
        true: values of the label that mean true, joined by ``+``.
        false: values of the label that mean false.
        ignore: columns that are not read, joined by ``+``.

    A subclass defines ``keys``, the columns that can hold the messages, and ``source``, the name of the format.
    """

    per_turn: bool = False
    label: str = ""
    true: str = ""
    false: str = ""
    ignore: str = ""

    keys: ClassVar[tuple[str, ...]]
    source: ClassVar[str]

    def __post_init__(self) -> None:
        check_label(self.label, self.true, self.false, per_turn=self.per_turn)

    def __call__(self, row: Row) -> CounterfactualGroup | Groups:
        """Convert a row to one or several groups. The caller adds the file and line to any DataError."""
        if self.label:
            return joined([self.claim(row)])
        read = self._read(row)
        places = [number for number, turn in enumerate(read.turns) if turn.role == "assistant"] if self.per_turn else [len(read.turns) - 1]
        group_id = row_id(read.row, spelled(read.turns), [str(picture) for picture in read.pictures])
        groups = []
        for k, number in enumerate(places):
            prompt, shown, answer = self._asked(read, number)
            groups.append(
                CounterfactualGroup(
                    id=f"{group_id}-{k}" if self.per_turn else group_id,
                    images=(shown,),
                    candidates=(Candidate(prompt, answer),),
                    match=((1,),),
                    source=self.source,
                    meta=as_meta(self._meta(read, number)),
                )
            )
        return groups if self.per_turn else groups[0]

    @property
    def parts(self) -> Callable[[Row], int] | None:
        """Function that counts a row's groups; None if every row is one group."""
        return self._answers if self.per_turn else None

    def claim(self, row: Row) -> Claim:
        """Return the claim of a row, which contains its labelled answer. The option ``label`` must be set."""
        read = self._read(row)
        label = value_of(read.row, self.label)
        truth = truth_of(label[-1] if isinstance(label, list) and label else label, self.label, self.true, self.false)
        prompt, shown, answer = self._asked(read, last := len(read.turns) - 1)
        return Claim(shown, prompt, (LabelledText(answer, truth),), self.source, self._meta(read, last))

    def _answers(self, row: Row) -> int:
        return sum(turn.role == "assistant" for turn in self._spoken(without_nulls(row, self.ignore))[0].turns)

    def _read(self, row: Row) -> _Read:
        row = without_nulls(row, self.ignore)
        spoken, used = self._spoken(row)
        spoken = with_system(spoken, row)
        turns, pictures, columns = shown_in(row, spoken)
        answer_of(turns[-1])
        kept = without(row, [*used, *columns, "id", "system", self.label])
        beside: list[dict[str, Any]] = [{}] * (len(turns) - len(spoken.further)) + spoken.further
        return _Read(row, turns, pictures, (used[0], beside), {"id": row["id"], **kept} if "id" in row else kept)

    def _meta(self, read: _Read, number: int) -> dict[str, Any]:
        """Return the row's metadata. It includes the extra keys (other than role and content) of all messages up to message ``number``, the
        scored answer.
        """
        column, beside = read.beside
        return read.meta | ({column: beside[: number + 1]} if any(beside) else {})

    def _asked(self, read: _Read, number: int) -> tuple[Prompt, Pictures, str]:
        """Return the prompt for the answer in turn ``number``, the pictures that precede this answer, and its text."""
        before, last = read.turns[:number], read.turns[number]
        check_conversation(before, "row")
        return simplest(before), tuple(islice(read.pictures, pictures_of(before))), answer_of(last)

    def _spoken(self, row: Row) -> tuple[Spoken, tuple[str, ...]]:
        for key in self.keys:
            if key in row:
                return read_messages(row[key], f"row: {key!r}"), (key,)
        raise DataError(f"row: key {self.keys[0]!r} is missing; add it, or name another format")
