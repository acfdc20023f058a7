"""Preference rows: a question, a chosen answer, a rejected answer and pictures, in the columns that TRL, LLaMA-Factory and ms-swift use.

    {"prompt": "How many dogs are there?", "image": "a.jpg", "chosen": "Two.", "rejected": "Three."}
    {"prompt": [MESSAGE, ...], "images": ["a.jpg"], "chosen": [MESSAGE], "rejected": [MESSAGE]}                              (TRL)
    {"conversations": [MESSAGE, ...], "images": ["a.jpg"], "chosen": MESSAGE, "rejected": MESSAGE}                 (LLaMA-Factory)
    {"chosen_messages": [MESSAGE, ...], "rejected_messages": [MESSAGE, ...]}                                    (LLaMA-Factory v1)
    {"messages": [MESSAGE, ...], "images": ["a.jpg"], "rejected_response": "Three.", "rejected_images": ["b.jpg"]}      (ms-swift)
    {"query": "How many dogs are there?", "images": ["a.jpg"], "response": "Two.", "rejected_response": "Three."}       (ms-swift)
    {"text": "{\\"question\\": ..., \\"chosen\\": ..., \\"rejected\\": ...}", "image": "a.jpg", "image_path": "coco/a.jpg"}  (RLHF-V)

Messages are written as in ``llava`` or ``messages``. The question can also be in ``question``, or in ``instruction`` and ``input``. It can
be omitted if ``chosen`` and ``rejected`` are complete conversations. If a row has ``image``, its ``image_path`` is metadata.

If a row has only a rejected answer, this answer is false of the picture. If it has only ``rejected_images``, the chosen answer is false of
them. If it has both, the rejected answer is false of the rejected pictures. It is unknown whether the rejected answer is true of the chosen
pictures, or the chosen answer of the rejected pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import check_conversation, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.sequences import shared_start
from cfvlm_ds.data.fields import Row, as_meta, json_object, row_id
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
    """Format of rows with a chosen answer and a rejected answer or picture.

    Args:
        ignore: columns that are not read, joined by ``+``.
    """

    ignore: str = ""

    def __call__(self, row: Row) -> CounterfactualGroup:
        """Convert a row to a group. The caller adds the file and line to any DataError."""
        row = unpacked(without_nulls(row, self.ignore))
        used, question, chosen, rejected, further = _question_and_answers(row)
        question = with_system(question, row)
        turns, pictures, paths = shown_in(row, question)
        check_conversation(turns, "row")
        others = row_pictures({key: row[key] for key in _REJECTED_IMAGES if key in row}, _REJECTED_IMAGES)
        if others == pictures:
            others = ()
        if others and len(others) != len(pictures):
            raise DataError(f"row: {len(pictures)} pictures, but {len(others)} rejected pictures; the prompt needs the same number of both")
        if rejected is None and not others:
            raise DataError("row: the rejected answer or picture is missing; add 'rejected' or 'rejected_images', or name another format")
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


def unpacked(row: Row) -> Row:
    """Replace the column ``text`` of an RLHF-V row with the question and answers in its JSON. Return any other row unchanged."""
    if (
        "text" not in row
        or any(key in row for key in _CHOSEN)
        or not {"chosen", "rejected"} <= (answers := json_object(row["text"])).keys()
    ):
        return row
    return {key: value for key, value in row.items() if key != "text"} | answers


def _question_and_answers(row: Row) -> tuple[tuple[str, ...], Spoken, str, str | None, dict[str, Any]]:
    """Read the question and the answers of a row. Return, in this order: the columns that contain the question and the chosen answer; the
    question; the chosen answer; the rejected answer or None; the extra message keys in each column.
    """
    used, question = asked_in(row, (*_CONVERSATIONS, *ASKED))
    column = used[0] if used else ""
    rejected_column = only(row, _REJECTED, "are present")
    chosen_column = only(row, _CHOSEN, "are present") or ("response" if "response" in row and column != "messages" else "")
    if chosen_column:
        chosen = _answers(row[chosen_column], chosen_column)
    elif question is not None and question.turns[-1].role == "assistant":  # ms-swift: the conversation ends with the chosen answer
        chosen_column, chosen, question = column, question, question._replace(turns=question.turns[:-1])
    else:
        raise DataError("row: key 'chosen' is missing; add it, or end the conversation with the chosen answer")
    rejected = _answers(row[rejected_column], rejected_column) if rejected_column else None
    columns = [(column, question), (chosen_column, chosen), (rejected_column, rejected)]
    further = {name: spoken.further for name, spoken in columns if spoken is not None and any(spoken.further)}
    if question is None:
        shared = chosen.turns[:-1]
        if rejected is not None:  # the common beginning of two complete conversations
            shared = shared[: shared_start(shared, rejected.turns)]
        question = chosen._replace(turns=shared)
    if not question.turns:
        raise DataError("row: the question is missing; add 'prompt', or the user's turn before the answer")
    answers = [None if spoken is None else _after(question, spoken) for spoken in (chosen, rejected)]
    assert answers[0] is not None
    return (*used, chosen_column), question, answers[0], answers[1], further


def _answers(value: Any, key: str) -> Spoken:
    return read_messages([value], f"row: {key!r}") if isinstance(value, Mapping) else spoken_as(value, "assistant", key)


def _after(question: Spoken, answer: Spoken) -> str:
    """Return the text of an answer, without the question if the answer is a complete conversation. Raises DataError unless the answer
    consists of one turn.
    """
    repeats = answer.turns[: len(question.turns)] == question.turns
    if repeats and any(picture is not None for picture in answer.pictures) and answer.pictures != question.pictures:
        remedy = "list those of the rejected answer in 'rejected_images', and name the others once"
        raise DataError(f"row: question, chosen and rejected answer name different pictures in their messages; {remedy}")
    turns = answer.turns[len(question.turns) :] if repeats else answer.turns
    if len(turns) != 1:
        raise DataError(f"row: an answer has {len(turns)} turns; chosen and rejected must differ only in the last answer of the assistant")
    return answer_of(turns[0])
