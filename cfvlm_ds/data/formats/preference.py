"""Preference rows: what is asked, a chosen answer, a rejected one, and the pictures; the columns of TRL, LLaMA-Factory and ms-swift.

    {"prompt": "How many dogs are there?", "image": "a.jpg", "chosen": "Two.", "rejected": "Three."}
    {"prompt": [MESSAGE, ...], "images": ["a.jpg"], "chosen": [MESSAGE], "rejected": [MESSAGE]}                              (TRL)
    {"conversations": [MESSAGE, ...], "images": ["a.jpg"], "chosen": MESSAGE, "rejected": MESSAGE}                 (LLaMA-Factory)
    {"chosen_messages": [MESSAGE, ...], "rejected_messages": [MESSAGE, ...]}                                    (LLaMA-Factory v1)
    {"messages": [MESSAGE, ...], "images": ["a.jpg"], "rejected_response": "Three.", "rejected_images": ["b.jpg"]}      (ms-swift)
    {"query": "How many dogs are there?", "images": ["a.jpg"], "response": "Two.", "rejected_response": "Three."}       (ms-swift)
    {"text": "{\\"question\\": ..., \\"chosen\\": ..., \\"rejected\\": ...}", "image": "a.jpg", "image_path": "coco/a.jpg"}  (RLHF-V)

A message is spelled as in ``llava`` or ``messages``. What is asked may also be called ``question``, or ``instruction`` and ``input``, and
be left out where ``chosen`` and ``rejected`` are whole conversations. ``image_path`` beside ``image`` is metadata. The rejected answer is
false of the picture. ``rejected_images`` without a rejected answer are pictures of which the chosen answer is false; where both are given,
they are false of each other, and what the rest is to each other is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from cfvlm_ds.core.conversation import check_conversation, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.data.fields import as_meta, json_object, row_id
from cfvlm_ds.data.formats.chat import (
    Spoken,
    answer_of,
    only,
    read_messages,
    row_pictures,
    shown_in,
    with_system,
    without_nulls,
)
from cfvlm_ds.data.formats.messages import ASKED, asked_in, spoken_as

_CONVERSATIONS = ("conversations", "messages")
_CHOSEN = ("chosen", "chosen_messages")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_REJECTED_IMAGES = ("rejected_images", "rejected_image")
_KEYS = {*_CHOSEN, *_REJECTED, *_REJECTED_IMAGES, "id", "system"}


@dataclass(frozen=True)
class Preference:
    """Rows of a chosen and a rejected answer, or picture.

    Args:
        ignore: columns that are not read, joined by ``+``.
    """

    ignore: str = ""

    def __call__(self, row: Mapping[str, Any]) -> CounterfactualGroup:
        """One row as a group. Raises DataError without file and line."""
        row = unpacked(without_nulls(row, self.ignore))
        used, asked, chosen, rejected, further = _said(row)
        asked = with_system(asked, row)
        turns, pictures, paths = shown_in(row, asked)
        check_conversation(turns, "row")
        others = row_pictures({key: row[key] for key in _REJECTED_IMAGES if key in row}, _REJECTED_IMAGES)
        if others == pictures:
            others = ()
        if others and len(others) != len(pictures):
            raise DataError(
                f"row: {len(pictures)} pictures and {len(others)} rejected ones; the prompt shows as many either way, correct it"
            )
        if rejected is None and not others:
            raise DataError("row: nothing is rejected; add 'rejected' or 'rejected_images', or name another format for rows without")
        answers = [chosen] if rejected is None else [chosen, rejected]
        match: tuple[tuple[int | None, ...], ...] = ((1,) if rejected is None else (1, None if others else 0),)
        if others:
            match += ((0,) if rejected is None else (None, 0),)
        prompt = simplest(turns)
        kept = {key: value for key, value in row.items() if key not in {*_KEYS, *used, *paths}}
        kept |= further
        return CounterfactualGroup(
            id=row_id(row, spelled(prompt), answers, [str(picture) for picture in pictures + others]),
            images=(pictures, others) if others else (pictures,),
            candidates=tuple(Candidate(prompt, answer) for answer in answers),
            match=match,
            edits=(Edit("rejected", image=1 if others else None, text=None if rejected is None else 1),),
            source="preference",
            meta=as_meta({"id": row["id"], **kept} if "id" in row else kept),
        )


def unpacked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the answers that RLHF-V has as JSON in its ``text``; any other row is itself."""
    if "text" not in row or any(key in row for key in _CHOSEN) or not {"chosen", "rejected"} <= (said := json_object(row["text"])).keys():
        return row
    return {key: value for key, value in row.items() if key != "text"} | said


def _said(row: Mapping[str, Any]) -> tuple[tuple[str, ...], Spoken, str, str | None, dict[str, Any]]:
    """The columns of what is asked and chosen, what is asked, the chosen answer and the rejected one, if there is any; and what their
    messages say beside, by column."""
    used, asked = asked_in(row, (*_CONVERSATIONS, *ASKED))
    column = used[0] if used else ""
    wrong = only(row, _REJECTED, "are there")
    right = only(row, _CHOSEN, "are there") or ("response" if "response" in row and column != "messages" else "")
    if right:
        chosen = _answers(row[right], right)
    elif asked is not None and asked.turns[-1].role == "assistant":  # ms-swift: the conversation ends with the chosen answer
        right, chosen, asked = column, asked, _without_last(asked)
    else:
        raise DataError("row: key 'chosen' is missing; add it, or end the conversation with the chosen answer")
    rejected = _answers(row[wrong], wrong) if wrong else None
    columns = [(column, asked), (right, chosen), (wrong, rejected)]
    further = {name: spoken.further for name, spoken in columns if spoken is not None and any(spoken.further)}
    if asked is None:
        asked = _shared(chosen, rejected)
    answers = [None if each is None else _after(asked, each) for each in (chosen, rejected)]
    assert answers[0] is not None
    return (*used, right), asked, answers[0], answers[1], further


def _answers(value: Any, key: str) -> Spoken:
    return read_messages([value], f"row: {key!r}") if isinstance(value, Mapping) else spoken_as(value, "assistant", key)


def _without_last(spoken: Spoken) -> Spoken:
    return Spoken(spoken.turns[:-1], spoken.pictures, spoken.further) if len(spoken.turns) > 1 else _nothing()


def _nothing() -> Spoken:
    raise DataError("row: an answer without anything that is asked; add 'prompt', or the user's turn before it")


def _shared(chosen: Spoken, rejected: Spoken | None) -> Spoken:
    """What two whole conversations begin with; the one of ``chosen`` but its answer where nothing is rejected."""
    turns = chosen.turns[:-1]
    if rejected is not None:
        turns = turns[: len([*takewhile(lambda pair: pair[0] == pair[1], zip(turns, rejected.turns, strict=False))])]
    return Spoken(turns, chosen.pictures, chosen.further) if turns else _nothing()


def _after(asked: Spoken, said: Spoken) -> str:
    """The one answer behind what is asked, which a whole conversation repeats."""
    repeats = said.turns[: len(asked.turns)] == asked.turns
    if repeats and any(picture is not None for picture in said.pictures) and said.pictures != asked.pictures:
        remedy = "name those of the rejected answer in 'rejected_images', and the others once"
        raise DataError(f"row: what is asked, chosen and rejected name different pictures in their messages; {remedy}")
    turns = said.turns[len(asked.turns) :] if repeats else said.turns
    if len(turns) != 1:
        raise DataError(f"row: an answer of {len(turns)} turns; chosen and rejected must differ in one answer of the assistant, the last")
    return answer_of(turns[0])
