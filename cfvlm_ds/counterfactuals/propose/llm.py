"""Back end ``llm``: a server with an OpenAI-compatible API proposes the edits. Replies are untrusted: every edit is checked against the
caption, the size and duration of replies are limited, redirects are refused, and secrets are removed from stored messages.

The server is called with the standard library, because the openai client (version 3.57) does not give these guarantees. Despite a timeout
of 0.5 s, it waited 6 s for a body that arrived byte by byte. It also read a 200 MB body, followed a redirect, and did not retry after a
reply in prose or truncated JSON.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.core.http import Reply, call
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.counterfactuals.propose.base import Context, Found, Proposal, Rejected, Source
from cfvlm_ds.counterfactuals.propose.word_difference import MOST_CHARACTERS, defect, difference
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.decoding import open_image

VERSION = 1
_MOST_BYTES = 1 << 20
_MAX_TOKENS = 700  # limits replies of endless white space, a known failure mode
_SIDE = 768  # longer side, in pixels, of the pictures in requests
LONGEST_WAIT_S = 60.0
IN_A_ROW = 20
"""The step stops after this many consecutive captions without a usable reply."""
pause = time.sleep
"""Function that waits before a repeated call; tests replace it."""

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
        """Count a caption without a usable reply. Raises ConfigError, which stops the step, if the server is unreachable and has never
        answered, or after IN_A_ROW consecutive failures. Any other failure affects only this caption.
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


# calls ---------------------------------------------------------------------------------------------------------------------------------


class CallFailed(Exception):
    """A call without a usable reply. ``after_s`` is the pause that the server requests before the next call, in seconds."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(one_line(without_secrets(reason), 300))
        self.after_s = after_s


class Unreachable(CallFailed):
    """A call that failed because the server could not be reached."""


class Unfit(CallFailed):
    """A request that the server rejects with status 400 or 422, because of its caption or picture, or because the server rejects all
    requests.
    """


def check_url(url: str, option: str) -> str:
    """Return ``url`` without trailing slashes. Raises ConfigError if it is not an http(s) address or contains a user name or password."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and printable(url) == url and " " not in url
    except ValueError:
        right = False
    if not right:
        raise ConfigError(f"{option} {url!r}: not an address such as http://node7:8000/v1")
    if parts.username or parts.password:
        raise ConfigError(f"{option}: the address contains a user name or password; set secrets in environment variables")
    return url.rstrip("/")


def post(url: str, body: Any, *, token: str = "", timeout_s: float, most_bytes: int) -> Any:
    """Post JSON and return the parsed reply.

    Raises ConfigError if the status indicates a wrong address, model name or token, and CallFailed for any other failure: no reply,
    a status other than 200, invalid JSON, or an exceeded limit.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = call(url, headers, json.dumps(body).encode(), silence_s=timeout_s, whole_s=timeout_s, most_bytes=most_bytes)
    except urllib.error.URLError as error:
        raise Unreachable(f"{type(error.reason).__name__}: {error.reason}") from error
    except TimeoutError as error:
        raise CallFailed(f"no complete reply within {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CallFailed(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}") from error
    if reply.status != 200:
        _refuse(url, reply)
    try:
        return parse_json(reply.content.decode())
    except (ValueError, RecursionError) as error:
        raise CallFailed(f"the reply is not JSON: {error}") from error


def _refuse(url: str, reply: Reply) -> None:
    message = one_line(reply.content[:400].decode("utf-8", "replace"), 200)
    if reply.status in (400, 422):
        raise Unfit(f"status {reply.status}: {message}")
    if reply.status in (401, 403, 404, 405) or 300 <= reply.status < 400:
        raise ConfigError(
            f"{url}: the server replied with status {reply.status} ({message}); correct the address, the model's name or the token"
        )
    wait = reply.headers.get("Retry-After", "")
    raise CallFailed(f"status {reply.status}: {message}", after_s=min(float(wait), LONGEST_WAIT_S) if wait.isdecimal() else 0.0)
