"""Back end ``llm``: a server with an OpenAI-compatible API proposes the edits. Replies are untrusted, so every edit is checked against the
caption.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.counterfactuals.http import LONGEST_WAIT_S, CallFailed, Unfit, Unreachable, check_url, post
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, defect, difference
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.decoding import open_image

VERSION = 1
_MOST_BYTES = 1 << 20
_MAX_TOKENS = 700  # limits replies of endless white space, a known failure mode
_SIDE = 768  # longer side, in pixels, of the pictures in requests
IN_A_ROW = 20
"""The step stops after this number of consecutive captions without a usable reply."""
pause = time.sleep
"""Function that waits between two calls."""

SYSTEM = """You write counterfactual captions. Given a caption of a photograph, you propose edits that change exactly one visible thing.
Rules for every edit:
- the new caption is the old one with one word or one short phrase replaced; every other word stays as it is;
- the new caption must be false of the photograph, and a photograph of it must look different in that one thing only;
- no synonyms, no negation, nothing that cannot be seen, no change of two things;
- the new caption is natural, grammatical English;
- "instruction" tells a picture editor in one sentence what to change.
For swap_attribute and swap_object the new caption has the same words in another order. Leave out what the caption does not allow."""


class LanguageModel:
    """Back end ``llm``."""

    def __init__(self, context: Context) -> None:
        self._options = options = context.options
        if not options.llm_url or not options.llm_model:
            raise ConfigError("the back end llm needs --llm_url, an address such as http://node7:8000/v1, and --llm_model")
        address = urlsplit(check_url(options.llm_url, "--llm_url"))
        self._url = address._replace(path=f"{address.path}/chat/completions").geturl()
        self._types, self.threads = options.wanted, max(1, options.llm_calls)
        self._token = os.environ.get("CFVLM_LLM_API_KEY") or os.environ.get("OPENAI_API_KEY", "")
        self._lock, self._answered, self._in_a_row = threading.Lock(), False, 0

    def settings(self) -> Mapping[str, Any]:
        prompt_hash = hashlib.sha256(SYSTEM.encode()).hexdigest()
        request = {"url": self._url, "model": self._options.llm_model, "see": self._options.llm_see, "max_tokens": _MAX_TOKENS}
        return {"version": VERSION, "prompt_sha256": prompt_hash, **request}

    def propose(self, source: Source) -> Found:
        try:
            body = self._request(source)
        except DataError as error:
            return [Rejected("llm", one_line(f"the picture cannot be sent: {error}", 300))]
        try:
            edits = self._reply(body)
        except CallFailed as failure:
            self._count(failure)
            return [Rejected("llm", f"no usable reply: {failure}", failed=True)]
        self._answered, self._in_a_row = True, 0
        return self._judged(source, edits)

    def _count(self, failure: CallFailed) -> None:
        """Count a caption for which no usable reply arrived. Raises ConfigError, which stops the step, if the server is unreachable and has
        never answered, or after IN_A_ROW consecutive failures. Any other failure affects only this caption.
        """
        with self._lock:
            self._in_a_row += 1
            if not self._answered and isinstance(failure, Unreachable):
                raise ConfigError(f"{self._url}: the server cannot be reached ({failure}); start it, or correct the address") from failure
            if self._in_a_row >= IN_A_ROW:
                raise ConfigError(
                    f"{self._url}: no usable reply for {self._in_a_row} captions in a row, the last: {failure}; check the server, or "
                    "correct the address, the model's name or its options"
                ) from failure

    def _reply(self, body: dict[str, Any]) -> list[Any]:
        """Repeat a request until a reply is usable, and return the edits in that reply. Raises CallFailed if every attempt fails, or
        immediately if the server refuses the request with status 400 or 422.
        """
        draw = random.Random(seed_of(json.dumps(body, sort_keys=True)))
        number = 0
        while True:
            number += 1
            try:
                return edits_of(post(self._url, body, token=self._token, timeout_s=self._options.llm_timeout_s, most_bytes=_MOST_BYTES))
            except CallFailed as failure:
                if number == self._options.llm_attempts or isinstance(failure, Unfit):
                    raise
                pause(max(failure.after_s, min(2.0 ** (number - 1), LONGEST_WAIT_S) * (0.5 + draw.random() / 2)))

    def _request(self, source: Source) -> dict[str, Any]:
        question = f"Caption: {json.dumps(source.caption)}\nPropose at most one edit of each of these types: {', '.join(self._types)}."
        content: Any = question
        if self._options.llm_see and source.picture is not None:
            content = [{"type": "image_url", "image_url": {"url": _data_url(source.picture)}}, {"type": "text", "text": question}]
        return {
            "model": self._options.llm_model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
            "temperature": 0.7,
            "seed": self._options.seed,
            "max_tokens": _MAX_TOKENS,
            "response_format": {"type": "json_schema", "json_schema": {"name": "edits", "strict": True, "schema": self._schema()}},
        }

    def _schema(self) -> dict[str, Any]:
        text = {"type": "string"}
        properties = {"type": {"type": "string", "enum": list(self._types)}, "text": text, "instruction": text}
        edit = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        edits = {"type": "array", "items": edit, "maxItems": len(self._types)}
        return {"type": "object", "properties": {"edits": edits}, "required": ["edits"], "additionalProperties": False}

    def _judged(self, source: Source, edits: list[Any]) -> Found:
        """Convert the edits in a reply to proposals and rejections. The changed words are computed, not taken from the reply."""
        results: list[Proposal | Rejected] = []
        counts: Counter[str] = Counter()
        for edit in edits:
            kind, text, instruction = (edit.get(key) if isinstance(edit, dict) else None for key in ("type", "text", "instruction"))
            if not isinstance(kind, str) or not isinstance(text, str) or not isinstance(instruction, str):
                results.append(Rejected("llm", "type, text or instruction is missing"))
                continue
            text, shown = text.strip(), one_line(text, MOST_CHARACTERS)
            reason = None if kind in self._types else "its type was not requested"
            reason = reason or defect(source.caption, text, kind)
            if reason is None and not (printable(instruction) == instruction and 0 < len(instruction) <= MOST_CHARACTERS):
                reason = "its instruction is not one printable line"
            if reason is None and (counts[kind] >= self._options.per_type or any(result.text == text for result in results)):
                reason = "an earlier edit has its type or text"
            if reason is not None:
                results.append(Rejected("llm", reason, kind if kind in self._types else "", shown))
                continue
            counts[kind] += 1
            differs = difference(source.caption, text)
            results.append(Proposal(kind, text, " ".join(differs.before), " ".join(differs.after), instruction, "llm"))
        return results


def edits_of(reply: Any) -> list[Any]:
    """Return the edits in a reply. Raises CallFailed if the reply is truncated or is not JSON of the requested form."""
    try:
        choice = reply["choices"][0]
        ended, content = choice["finish_reason"], choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CallFailed("the reply has no choice with a finish_reason and a message") from None
    if ended == "length":
        raise CallFailed("the reply was cut off at the token limit")
    if not isinstance(content, str):
        raise CallFailed("the reply has no text")
    text = content.strip()
    if text.startswith("```") and text.endswith("```"):  # some servers ignore the schema and write a code block
        text = text.strip("`").removeprefix("json").strip()
    with suppress(ValueError, RecursionError):
        value = parse_json(text)
        if isinstance(value, dict) and isinstance(value.get("edits"), list):
            return list(value["edits"])
    raise CallFailed("the reply is not an object with a list of edits")


def _data_url(picture: Path) -> str:
    image = open_image(picture)
    image.thumbnail((_SIDE, _SIDE))
    image.info.clear()
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
