"""Chat server: calls to a server with an OpenAI-compatible API. The size and duration of replies are limited, redirects are refused, and
secrets are removed from error messages.

The server is called with the standard library, because the openai client (version 3.57) does not give these guarantees. Despite a timeout
of 0.5 s, it waited 6 s for a body that arrived byte by byte. It also read a 200 MB body, followed a redirect, and did not retry after a
reply in prose or truncated JSON.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.http import Reply, call
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import one_line, printable
from cfvlm_ds.counterfactuals.work_folder import seed_of
from cfvlm_ds.data.decoding import MAX_PIXELS, open_image

_MOST_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
IN_A_ROW = 20
"""A step stops after this many consecutive requests without a usable reply."""
pause = time.sleep
"""Function that waits before a repeated call; tests replace it."""

T = TypeVar("T")


class ChatServer:
    """Chat completions of a server. Requests can be sent from several threads.

    Args:
        url: the server's address, such as http://node7:8000/v1.
        timeout_s: time limit per call, in seconds.
        attempts: maximum number of calls per request.
    """

    def __init__(self, url: str, timeout_s: float, attempts: int) -> None:
        address = urlsplit(url)
        self.url = address._replace(path=f"{address.path}/chat/completions").geturl()
        self._timeout_s, self._attempts = timeout_s, attempts
        self._token = os.environ.get("CFVLM_LLM_API_KEY") or os.environ.get("OPENAI_API_KEY", "")
        self._lock, self._answered, self._in_a_row = threading.Lock(), False, 0

    def ask(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request, and return its reply as converted by ``read``, which raises CallFailed for an unusable reply.

        Calls are repeated until a reply is usable. Raises CallFailed if every attempt fails, or immediately if the server refuses the
        request with status 400 or 422. Raises ConfigError, which stops the step, if the server is unreachable and has never answered, or
        after IN_A_ROW consecutive failures.
        """
        try:
            result = self._repeated(body, read)
        except CallFailed as failure:
            self._count(failure)
            raise
        self._answered, self._in_a_row = True, 0
        return result

    def _count(self, failure: CallFailed) -> None:
        with self._lock:
            self._in_a_row += 1
            if not self._answered and isinstance(failure, Unreachable):
                raise ConfigError(f"{self.url}: the server cannot be reached ({failure}); start it, or correct the address") from failure
            if self._in_a_row >= IN_A_ROW:
                raise ConfigError(
                    f"{self.url}: no usable reply to {self._in_a_row} requests in a row, the last: {failure}; check the server, or "
                    "correct the address, the model's name or its options"
                ) from failure

    def _repeated(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        draw = random.Random(seed_of(json.dumps(body, sort_keys=True)))
        number = 0
        while True:
            number += 1
            try:
                return read(post(self.url, body, token=self._token, timeout_s=self._timeout_s, most_bytes=_MOST_BYTES))
            except CallFailed as failure:
                if number == self._attempts or isinstance(failure, Unfit):
                    raise
                pause(max(failure.after_s, min(2.0 ** (number - 1), LONGEST_WAIT_S) * (0.5 + draw.random() / 2)))


def image_part(picture: Path, longest: int, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Return a picture as part of a message: a JPEG whose longer side has at most ``longest`` pixels. Raises DataError if the picture
    cannot be opened or has more than ``max_pixels`` pixels.
    """
    image = open_image(picture, max_pixels)
    image.thumbnail((longest, longest))
    image.info.clear()
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"}}


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
