"""Token ids of prompts and answers, built with the model's chat template. They are identical to the ids that the processor returns.

Only the answer's ids are scored. Anything that the template writes between a prompt and its answer belongs to the prompt. For a thinking
model, this includes the empty thinking block that the template writes when thinking is disabled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cfvlm_ds.core.conversation import Prompt, Turn, messages, texts_of
from cfvlm_ds.core.errors import ConfigError, DataError, is_failure
from cfvlm_ds.core.text import quoted

CHARACTERS_PER_TOKEN = 16
"""Maximum length of a text, in characters per token of the model's window. Written language has about 4 characters per token, and few
tokens have more than 16."""
MAX_CHARACTERS = 1_000_000
"""Maximum length of a text in characters, regardless of the window. Tokenizers take minutes for texts ten times as long."""

_CACHED = 100_000  # limit on cached texts and prompts; a data set may have millions
_FIRST, _MARK, _TEMPLATE = "Describe the image.", "Xanswer1X", "the model's chat template"
_OPEN = re.compile(r"<([\w-]*think[\w-]*)>\s*$")
_EMPTY = re.compile(r"<([\w-]*think[\w-]*)>\s*</\1>\s*$")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (one placeholder per picture), its answer, and the end-of-turn token. ``prompt`` is the prompt as text."""

    prompt: str
    prompt_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens in the answer, including its end-of-turn token."""
        return len(self.text_ids) + len(self.end_ids)


@dataclass(frozen=True)
class _Head:
    """A rendered prompt: its text and ids, the rendered conversation before and after the answer, and the error message, if any.

    ``stem`` is everything before the answer: ``text`` plus any white space that is tokenised with the answer. ``follows`` is True if the
    template writes the answer directly after the prompt.
    """

    text: str
    ids: tuple[int, ...]
    stem: str
    before: str
    after: str
    follows: bool
    problem: str


class _ModelFails(DataError):
    """Raised if the model's chat template or tokenizer raises an exception or alters the conversation."""


def placeholder_id(processor: Any) -> int:
    """Return the token id of a picture's placeholder in a prompt. In some families, visual tokens have a different id."""
    number: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return number


class Prompts:
    """Encodes conversations for a model.

    Args:
        max_length: the model's context window in tokens.
        around: texts that the processor writes before and after each picture.
        vocabulary: size of the model's vocabulary; a tokenizer can have more tokens.
    """

    def __init__(self, processor: Any, max_length: int, around: tuple[str, str] = ("", ""), vocabulary: int | None = None) -> None:
        self.processor = processor
        self.max_length = max_length
        self._around, self._vocabulary = around, vocabulary
        self._texts: dict[tuple[Prompt, str, int], Encoded] = {}
        self._head = functools.lru_cache(_CACHED)(self._new_head)
        self._end_of_turn = functools.lru_cache(_CACHED)(self._end)

    def check(self, name: str) -> None:
        """Raise ConfigError if the chat template or tokenizer of the model ``name`` cannot be used."""
        try:
            head = self._new_head(_FIRST, 1)
        except _ModelFails as error:
            raise ConfigError(f"model {name!r}: {error}; correct its files, or use another model") from error
        if head.problem:
            raise ConfigError(f"model {name!r}: {head.problem}")

    def encoded(self, prompt: Prompt, text: str, num_pictures: int, where: str) -> Encoded:
        """Encode a text as the answer to its prompt. Raises DataError if it cannot be encoded; the message starts with ``where``."""
        key = (prompt, text, num_pictures)
        if key not in self._texts:
            if len(self._texts) >= _CACHED:
                self._texts.clear()
            try:
                self._texts[key] = self._encode(*key, where)
            except _ModelFails as error:
                raise DataError(f"{where} ({text!r}) cannot be formatted as a conversation: {error}") from error
        return self._texts[key]

    def ids(self, text: str) -> list[int]:
        """Tokenize a rendered conversation as the processor's ``apply_chat_template`` does.

        A beginning-of-sequence token is added only if the template has not written one.
        """
        tokenizer, picture = self.processor.tokenizer, self.processor.image_token
        written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        text = text.replace(picture, picture.join(self._around))
        return self._tokens(text, add_special_tokens=not written)

    def _tokens(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return list(self.processor.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        except MemoryError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise _ModelFails(f"the model's tokenizer raises {type(error).__name__} ({' '.join(str(error).split())[:300]})") from error

    def _encode(self, prompt: Prompt, text: str, num_pictures: int, where: str) -> Encoded:
        _check_size(prompt, text, num_pictures, self.max_length, where)
        head = self._head(prompt, num_pictures)
        rendered = self._render(_conversation(prompt, num_pictures, text), False)
        if head.problem:
            raise _ModelFails(head.problem)
        if not head.follows or rendered != head.before + text + head.after:
            raise DataError(
                f"{where} ({text!r}) does not follow its prompt unchanged in the model's chat template; strip white space at its ends, or "
                "repair the template"
            )
        tokenizer = self.processor.tokenizer
        ids = self.ids(head.stem + text)
        if tuple(ids[: len(head.ids)]) != head.ids:
            raise DataError(
                f"{where} ({text!r}) changes the tokens of its prompt: the model's chat template must end the prompt at a token boundary; "
                "repair the template"
            )
        if (shown := ids.count(placeholder_id(self.processor))) > num_pictures:
            raise DataError(f"{where}: a prompt or text contains {self.processor.image_token!r}, which stands for an image; reword it")
        if shown < num_pictures:
            raise DataError(
                f"{where}: the model's chat template includes only {shown} of {num_pictures} pictures; move the pictures to user turns"
            )
        if self._vocabulary and (beyond := [i for i in ids if i >= self._vocabulary and i != placeholder_id(self.processor)]):
            raise _ModelFails(
                f"{tokenizer.convert_ids_to_tokens(beyond[0])!r} has id {beyond[0]} in the model's tokenizer, but the model's vocabulary "
                f"has only {self._vocabulary} tokens; use a model with its own tokenizer"
            )
        answer = ids[len(head.ids) :]
        if control := self._control.intersection(answer):
            raise DataError(f"{where} ({text!r}) contains the control token {tokenizer.convert_ids_to_tokens(min(control))!r}; reword it")
        unknown = {tokenizer.unk_token_id} - {
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        }  # the unknown-token id is allowed unless it is one of these
        for part in texts_of(prompt):
            if inside := self._control.intersection(self._tokens(part)) - unknown:
                raise DataError(
                    f"{where}: its prompt ({part!r}) contains the control token {tokenizer.convert_ids_to_tokens(min(inside))!r}; reword it"
                )
        return Encoded(head.text, head.ids, tuple(answer), self._end_of_turn(head.after))

    def _new_head(self, prompt: Prompt, num_pictures: int) -> _Head:
        """Render a prompt and locate where the template inserts the answer. Raises _ModelFails if the template or tokenizer fails."""
        try:
            question = self._render(_conversation(prompt, num_pictures), True)
        except _ModelFails as error:
            if isinstance(prompt, str):
                raise
            roles = ", ".join(turn.role for turn in prompt[:_ROLES_SHOWN]) + ", ..." * (len(prompt) > _ROLES_SHOWN)
            raise _ModelFails(f"{error} for the turns {roles}; remove or reorder turns as the template requires") from error
        without_thought = question
        if "enable_thinking" in str(self.processor.chat_template):  # otherwise, the option would reach the image processor
            without_thought = self._render(_conversation(prompt, num_pictures), True, enable_thinking=False)
        rendered = self._render(_conversation(prompt, num_pictures, _MARK), False)
        before, mark, after = rendered.rpartition(_MARK)
        text, stem, follows, problem = question, before, bool(mark), ""
        if without_thought != question and _EMPTY.search(without_thought):
            text = stem = without_thought
        elif not before.startswith(question):
            follows = False
            if mark and (opened := _OPEN.search(question)):
                problem = (
                    f"{_TEMPLATE} makes the model think before it answers (<{opened[1]}>) and writes no empty thought before an answer, "
                    "even with enable_thinking=False; use the model's variant without thinking, or add that option to the template"
                )
        elif before[len(question) :].strip():
            text = before
        if not isinstance(prompt, str):
            problem = problem or _left_out(prompt, text)
        return _Head(text, tuple(self.ids(text)), stem, before, after, follows, problem)

    def _render(self, conversation: list[dict[str, Any]], ask: bool, **options: Any) -> str:
        """Render a conversation with the chat template. Raises _ModelFails if the template raises an exception."""
        try:
            written: str = self.processor.apply_chat_template(conversation, add_generation_prompt=ask, **options)
        except Exception as error:  # a template can raise any exception
            raise _ModelFails(f"{_TEMPLATE} raises {type(error).__name__} ({error})") from error
        return written

    @functools.cached_property
    def _control(self) -> frozenset[int]:
        """Ids of control tokens, such as those that delimit turns. A text must not contain them."""
        tokenizer = self.processor.tokenizer
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        return frozenset([*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)])

    def _end(self, tail: str) -> tuple[int, ...]:
        """Return the end-of-turn ids: the template's control token after an answer, else the tokenizer's eos token, else nothing."""
        ends = [i for i in self._tokens(tail) if i in self._control]
        end = ends[0] if ends else self.processor.tokenizer.eos_token_id
        return () if end is None else (end,)


_ROLES_SHOWN = 8


def _left_out(turns: tuple[Turn, ...], written: str) -> str:
    """Return an error message if the template omits or changes part of a conversation, otherwise "".

    An assistant turn's thinking block may be missing, because templates of thinking models omit it.
    """
    place = 0
    for turn in turns:
        for text in (part.strip() for part in turn.parts if isinstance(part, str)):
            if turn.role == "assistant":
                text = text.rpartition("</think>")[2].strip()
            if (position := written.find(text, place)) < 0:
                return f"{_TEMPLATE} omits or changes the {turn.role} turn {quoted(text)}; remove it from the data, or use another model"
            place = position + len(text)
    return ""


def _check_size(prompt: Prompt, text: str, num_pictures: int, window: int, where: str) -> None:
    limit = min(CHARACTERS_PER_TOKEN * window, MAX_CHARACTERS)
    for what, length in (("", len(text)), (" in its prompt", sum(map(len, texts_of(prompt))))):
        if length > limit:
            raise DataError(
                f"{where} has {length} characters{what}; the limit for the model's window of {window} tokens is {limit}; shorten it"
            )
    if num_pictures > window:
        raise DataError(f"{where} has {num_pictures} pictures, more than the {window} tokens of the model's window; use fewer")


def _conversation(prompt: Prompt, num_pictures: int, *answer: str) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        question = [{"role": "user", "content": [{"type": "image"}] * num_pictures + [{"type": "text", "text": prompt}]}]
    else:
        question = messages(prompt)
    return [*question, *({"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answer)]
