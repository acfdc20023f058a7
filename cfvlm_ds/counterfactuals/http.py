"""HTTP calls to untrusted servers. The size and duration of a reply are limited, redirects are refused, and secrets are removed from stored
messages.

Only the standard library is used, because the openai 3.57 client gives none of these guarantees. Despite a timeout of 0.5 s, it waited 6 s
for a body that arrived byte by byte. It also read a 200 MB body, followed a redirect, and did not retry after a reply that was prose or
truncated JSON.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
from typing import Any
from urllib.parse import urlsplit

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.http import Reply, call
from cfvlm_ds.core.reading import parse_json
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import one_line, printable

LONGEST_WAIT_S = 60.0


class CallFailed(Exception):
    """A call without a usable reply. ``after_s`` is the pause that the server requests before the next call, in seconds."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(one_line(without_secrets(reason), 300))
        self.after_s = after_s


class Unreachable(CallFailed):
    """A call that failed because the server could not be reached."""


class Unfit(CallFailed):
    """A request that the server refuses with status 400 or 422. Either its caption or picture is at fault, or the server refuses every
    request.
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
