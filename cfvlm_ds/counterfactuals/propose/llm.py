"""Back end ``llm``: a server with an OpenAI-compatible API proposes the edits. Replies are untrusted: every edit is checked against the
caption.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.counterfactuals.chat_server import CallFailed, ChatServer, check_url, image_part
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, defect, difference

VERSION = 1
_MAX_TOKENS = 700  # limits replies of endless white space, a known failure mode
_SIDE = 768  # longer side, in pixels, of the pictures in requests

SYSTEM = """You write counterfactual captions. Given a caption of a photograph, you propose edits that change exactly one visible thing.
Rules for every edit:
- the new caption is the old one with one word or one short phrase replaced; every other word stays as it is;
- the new caption must be false of the photograph, and a photograph of it must look different in that one thing only;
- no synonyms, no negation, nothing that cannot be seen, no change of two things;
- the new caption is natural, grammatical English;
- "instruction" tells a picture editor in one sentence what to change.
For swap_attribute and swap_object the new caption has the same words in another order. Leave out what the caption does not allow."""


class LanguageModel:
    """Back end ``llm``: requests edits of a caption from a language model, and checks them."""

    def __init__(self, context: Context) -> None:
        self._options = options = context.options
        if not options.llm_url or not options.llm_model:
            raise ConfigError("the back end llm needs --llm_url, an address such as http://node7:8000/v1, and --llm_model")
        self._server = ChatServer(check_url(options.llm_url, "--llm_url"), options.llm_timeout_s, options.llm_attempts)
        self._types, self.threads = options.wanted, max(1, options.llm_calls)

    def settings(self) -> Mapping[str, Any]:
        prompt_hash = hashlib.sha256(SYSTEM.encode()).hexdigest()
        request = {"url": self._server.url, "model": self._options.llm_model, "see": self._options.llm_see, "max_tokens": _MAX_TOKENS}
        return {"version": VERSION, "prompt_sha256": prompt_hash, **request}

    def propose(self, source: Source) -> Found:
        try:
            body = self._request(source)
        except DataError as error:
            return [Rejected("llm", one_line(f"the picture cannot be sent: {error}", 300))]
        try:
            edits = self._server.ask(body, edits_of)
        except CallFailed as failure:
            return [Rejected("llm", f"no usable reply: {failure}", failed=True)]
        return self._judged(source, edits)

    def _request(self, source: Source) -> dict[str, Any]:
        question = f"Caption: {json.dumps(source.caption)}\nPropose at most one edit of each of these types: {', '.join(self._types)}."
        content: Any = question
        if self._options.llm_see and source.picture is not None:
            content = [image_part(source.picture, _SIDE), {"type": "text", "text": question}]
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
