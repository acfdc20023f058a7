"""Preference rows: what is asked, a chosen answer, a rejected one, and the pictures; the columns of TRL, LLaMA-Factory and ms-swift.

    {"prompt": "How many dogs are there?", "image": "a.jpg", "chosen": "Two.", "rejected": "Three."}
    {"prompt": [MESSAGE, ...], "images": ["a.jpg"], "chosen": [MESSAGE], "rejected": [MESSAGE]}                              (TRL)
    {"conversations": [MESSAGE, ...], "images": ["a.jpg"], "chosen": MESSAGE, "rejected": MESSAGE}                 (LLaMA-Factory)
    {"messages": [MESSAGE, ...], "images": ["a.jpg"], "rejected_response": "Three.", "rejected_images": ["b.jpg"]}      (ms-swift)

A message is spelled as in ``llava`` or ``messages``. What is asked may also be called ``question``, or ``instruction`` and ``input``, and
be left out where ``chosen`` and ``rejected`` are whole conversations. The rejected answer is false of the picture. ``rejected_images``
without a rejected answer are pictures of which the chosen answer is false; where both are given, they are false of each other, and what
the rest is to each other is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfvlm_ds.core.conversation import Turn, check_conversation, simplest, spelled
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.groups import Candidate, CounterfactualGroup, Edit
from cfvlm_ds.core.text import quoted
from cfvlm_ds.data.formats.chat import (
    Spoken,
    answer_of,
    placed,
    read_messages,
    row_id,
    row_pictures,
    shared_beginning,
    with_system,
    without_nulls,
)
from cfvlm_ds.data.formats.fields import as_meta
from cfvlm_ds.data.formats.messages import spoken_as

_ASKED = ("conversations", "messages", "prompt", "question")
_ALPACA = ("instruction", "input")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_IMAGES, _REJECTED_IMAGES = ("image", "images", "img_path", "image_path"), ("rejected_images", "rejected_image")
_KEYS = {*_ASKED, *_ALPACA, *_REJECTED, *_IMAGES, *_REJECTED_IMAGES, "chosen", "id", "system"}


def preference_group(row: Mapping[str, Any]) -> CounterfactualGroup:
    """One row as a group. Raises DataError without file and line."""
    row = without_nulls(row)
    asked, chosen, rejected, further = _said(row)
    asked = with_system(asked, row, "row")
    turns, pictures = placed(asked, row_pictures(row, _IMAGES), "row")
    check_conversation(turns, "row")
    others = row_pictures({key: row[key] for key in _REJECTED_IMAGES if key in row}, _REJECTED_IMAGES)
    if others == pictures:
        others = ()
    if others and len(others) != len(pictures):
        raise DataError(f"row: {len(pictures)} pictures and {len(others)} rejected ones; the prompt shows as many either way, correct it")
    if rejected is None and not others:
        raise DataError("row: nothing is rejected; add 'rejected' or 'rejected_images', or name another format for rows without")
    answers = [chosen] if rejected is None else [chosen, rejected]
    match: tuple[tuple[int | None, ...], ...] = ((1,) if rejected is None else (1, None if others else 0),)
    if others:
        match += ((0,) if rejected is None else (None, 0),)
    prompt = simplest(turns)
    used = _KEYS if _ALPACA[0] in row else _KEYS - {_ALPACA[1]}
    kept = {key: value for key, value in row.items() if key not in used} | further
    return CounterfactualGroup(
        id=row_id(row, spelled(prompt), answers, [str(picture) for picture in pictures + others]),
        images=(pictures, others) if others else (pictures,),
        candidates=tuple(Candidate(prompt, answer) for answer in answers),
        match=match,
        edits=(Edit("rejected", image=1 if others else None, text=None if rejected is None else 1),),
        source="preference",
        meta=as_meta({"id": row["id"], **kept} if "id" in row else kept),
    )


def _said(row: Mapping[str, Any]) -> tuple[Spoken, str, str | None, dict[str, Any]]:
    """What is asked, the chosen answer and the rejected one, if there is any; and what their messages say beside, by column."""
    column, asked = _asked(row)
    given = [key for key in _REJECTED if key in row]
    if len(given) > 1:
        raise DataError(f"row: both {given[0]!r} and {given[1]!r} are there; keep one of them")
    if "chosen" in row:
        chosen = _answers(row["chosen"], "chosen")
    elif asked is not None and asked.turns[-1].role == "assistant":  # ms-swift: the conversation ends with the chosen answer
        chosen, asked = asked, _without_last(asked)
    else:
        raise DataError("row: key 'chosen' is missing; add it, or end the conversation with the chosen answer")
    rejected = _answers(row[given[0]], given[0]) if given else None
    columns = [(column, asked), ("chosen" if "chosen" in row else column, chosen), ("".join(given), rejected)]
    further = {name: spoken.further for name, spoken in columns if spoken is not None and spoken.further}
    if asked is None:
        asked = _shared(chosen, rejected)
    answers = [None if each is None else _after(asked, each) for each in (chosen, rejected)]
    assert answers[0] is not None
    return asked, answers[0], answers[1], further


def _asked(row: Mapping[str, Any]) -> tuple[str, Spoken | None]:
    """The column of what is asked, and what that is; none where the answers are whole conversations."""
    given = [key for key in (*_ASKED, _ALPACA[0]) if key in row]
    if len(given) > 1:
        raise DataError(f"row: both {given[0]!r} and {given[1]!r} say what is asked; keep one of them")
    if not given:
        return "", None
    (key,) = given
    value = row[key]
    if key == _ALPACA[0] and (more := row.get(_ALPACA[1], "")) != "":
        if not isinstance(value, str) or not isinstance(more, str):
            raise DataError(f"row: {key!r} and {_ALPACA[1]!r} must both be texts, not {quoted(value, 80)} and {quoted(more, 80)}")
        value = f"{value}\n{more}" if more.strip() else value
    return key, spoken_as(value, "user", key)


def _answers(value: Any, key: str) -> Spoken:
    return read_messages([value], f"row: {key!r}") if isinstance(value, Mapping) else spoken_as(value, "assistant", key)


def _without_last(spoken: Spoken) -> Spoken:
    return Spoken(spoken.turns[:-1], spoken.pictures, spoken.further) if len(spoken.turns) > 1 else _nothing()


def _nothing() -> Spoken:
    raise DataError("row: an answer without anything that is asked; add 'prompt', or the user's turn before it")


def _shared(chosen: Spoken, rejected: Spoken | None) -> Spoken:
    """What two whole conversations begin with; the one of ``chosen`` but its answer where nothing is rejected."""
    turns: list[Turn] = list(chosen.turns[:-1] if rejected is None else shared_beginning(chosen.turns[:-1], rejected.turns))
    return Spoken(tuple(turns), chosen.pictures, chosen.further) if turns else _nothing()


def _after(asked: Spoken, said: Spoken) -> str:
    """The one answer behind what is asked, which a whole conversation repeats."""
    repeats = said.turns[: len(asked.turns)] == asked.turns
    if repeats and any(picture is not None for picture in said.pictures) and said.pictures != asked.pictures:
        remedy = "name those of the rejected answer in 'rejected_images', and the others once"
        raise DataError(f"row: what is asked, chosen and rejected name different pictures in their messages; {remedy}")
    turns = said.turns[len(asked.turns) :] if repeats else said.turns
    if len(turns) != 1:
        raise DataError(f"row: an answer of {len(turns)} turns; chosen and rejected must differ in one answer of the assistant, the last")
    return answer_of(turns[0], "row")
