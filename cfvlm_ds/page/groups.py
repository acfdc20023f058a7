"""A counterfactual group as an item of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cfvlm_ds.core.groups import SHAM, CounterfactualGroup, Edit
from cfvlm_ds.page.records import Fact, Image, Item, Prompt, ScoreTable, Text

UNLABELLED = "unlabelled"
"""Edit type of a group that names none."""


def group_item(
    group: CounterfactualGroup,
    scores: Sequence[ScoreTable] = (),
    facts: Sequence[Fact] = (),
    filters: Mapping[str, Sequence[str]] | None = None,
) -> Item:
    """The item of a group: its edits say what each image and text is, and the words of a text are compared with those of its prompt's
    anchor. ``facts`` and ``filters`` are added to those of the group itself."""
    prompts = group.prompt_ids
    anchors = {prompt: c for prompt, (_, c) in group.anchors.items()}
    first = {prompt: c for c, prompt in reversed(list(enumerate(prompts)))}
    shown: list[Prompt] = [_prompt(group.candidates[first[prompt]].prompt) for prompt in sorted(first)]
    texts = [
        Text(candidate.text, _text_label(group, c), prompts[c], _reference(c, anchors.get(prompts[c], first[prompts[c]])))
        for c, candidate in enumerate(group.candidates)
    ]
    own: list[Fact] = [("source", group.source)] * bool(group.source)
    own += [("weight", f"{group.weight:g}")] * (group.weight != 1)
    types = {edit.type: None for edit in group.edits} or {UNLABELLED: None}
    return Item(
        id=group.id,
        images=[Image(pictures, _image_label(group, i)) for i, pictures in enumerate(group.images)],
        texts=texts,
        match=group.match,
        prompts=shown if any(shown) else (),
        facts=[*own, *facts],
        changes=[_change(edit) for edit in group.edits],
        scores=scores,
        filters={"edit type": list(types), "source": [group.source or "(none)"], **(filters or {})},
        meta=_meta(group.meta),
    )


def _reference(c: int, anchor: int) -> int | None:
    return None if c == anchor else anchor


def _prompt(prompt: Any) -> Prompt:
    """A conversation as turns of plain parts; what is no string in a turn is the place of a picture."""
    if isinstance(prompt, str):
        return prompt
    return [(turn.role, [part if isinstance(part, str) else None for part in turn.parts]) for turn in prompt]


def _image_label(group: CounterfactualGroup, i: int) -> str:
    types = list(dict.fromkeys(edit.type for edit in group.edits if edit.image == i))
    return "factual" if i == 0 else ", ".join("sham (rendered again)" if kind == SHAM else kind for kind in types)


def _text_label(group: CounterfactualGroup, c: int) -> str:
    types = list(dict.fromkeys(edit.type for edit in group.edits if edit.text == c))
    return "factual" if c == 0 else ", ".join(types)


def _change(edit: Edit) -> str:
    words = f": {edit.source or '(nothing)'} \N{RIGHTWARDS ARROW} {edit.target or '(nothing)'}" if edit.source or edit.target else ""
    places = [f"{kind} {place}" for kind, place in (("image", edit.image), ("text", edit.text)) if place is not None]
    return f"{edit.type}{words} ({', '.join(places)})" if places else f"{edit.type}{words}"


def _meta(meta: str) -> str:
    """Metadata on lines of its own; it was JSON when it was read."""
    try:
        return json.dumps(json.loads(meta), ensure_ascii=False, indent=1) if meta else ""
    except (ValueError, RecursionError):
        return meta
