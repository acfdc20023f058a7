"""HTTP calls to untrusted servers: limits of reply size and total time, no redirects, and no secrets in stored messages.

Only the standard library is used. The client of openai 3.57 keeps none of these promises: with a timeout of 0.5 s it waited 6 s for a body
that arrived byte by byte, read a body of 200 MB, followed a redirect, and did not repeat a call after prose or truncated JSON.
"""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from cfvlm_ds.core.deadline import Deadline
from cfvlm_ds.core.errors import ConfigError
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
    """A call without a connection."""


class Unfit(CallFailed):
    """A request that the server refuses (400, 422): one caption or picture may be at fault, or all requests are."""


def check_url(url: str, option: str) -> str:
    """Return an http or https address. Raises ConfigError for any other, and for one with user or password."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and printable(url) == url and " " not in url
    except ValueError:
        right, parts = False, urlsplit("")
    if not right:
        raise ConfigError(f"{option} {url!r}: not an address such as http://node7:8000/v1")
    if parts.username or parts.password:
        raise ConfigError(f"{option}: the address has a user or password in it; secrets come from the environment")
    return url.rstrip("/")


def post(url: str, body: Any, *, token: str = "", timeout_s: float, most_bytes: int) -> Any:
    """Post JSON and return the parsed reply.

    Raises CallFailed for any reply except JSON of status 200 within the limits, and ConfigError for a failure that repeating the call
    cannot solve.
    """
    parts = urlsplit(url)
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    with Deadline(timeout_s) as deadline:
        deadline.watch(connection)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise Unreachable(f"{type(error).__name__}: {error}") from error
            connection.request(
                "POST", parts._replace(scheme="", netloc="", fragment="").geturl() or "/", json.dumps(body).encode(), headers
            )
            response = connection.getresponse()
            content = response.read(most_bytes + 1)
            if deadline.late:
                raise CallFailed(f"no whole reply within {timeout_s:g} s")
            if len(content) > most_bytes:
                raise CallFailed(f"the reply has more than {most_bytes} bytes")
            if response.status != 200:
                _refuse(url, response, content)
        except CallFailed:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if deadline.late or isinstance(error, TimeoutError):
                raise CallFailed(f"no whole reply within {timeout_s:g} s") from error
            raise CallFailed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
    try:
        return parse_json(content.decode())
    except (ValueError, RecursionError) as error:
        raise CallFailed(f"the reply is no JSON: {error}") from error


def _refuse(url: str, response: Any, content: bytes) -> None:
    """Raise for a status that is not 200."""
    message = one_line(content[:400].decode("utf-8", "replace"), 200)
    if response.status in (400, 422):
        raise Unfit(f"status {response.status}: {message}")
    if response.status in (401, 403, 404, 405) or 300 <= response.status < 400:
        raise ConfigError(f"{url}: the server answers {response.status} ({message}); correct the address, the model's name or the token")
    wait = response.getheader("Retry-After", "")
    raise CallFailed(f"status {response.status}: {message}", after_s=min(float(wait), LONGEST_WAIT_S) if wait.isdecimal() else 0.0)
