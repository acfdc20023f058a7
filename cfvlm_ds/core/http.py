"""HTTP calls with limits on reply size, idle time and total time. Only the standard library is used."""

from __future__ import annotations

import io
import ssl
import time
import urllib.error
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib import request as requests


class Reply(NamedTuple):
    """A complete HTTP reply, of any status. ``headers`` is a case-insensitive mapping."""

    status: int
    reason: str
    headers: Any
    content: bytes


def call(
    url: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    silence_s: float,
    whole_s: float,
    most_bytes: int,
    follow: bool = False,
) -> Reply:
    """Send a GET request, or a POST request if there is a ``body``, and return the reply.

    If ``follow`` is True, the proxies set in the environment are used, and redirects to http and https addresses are followed. Raises
    urllib.error.URLError if there is no connection; OSError or http.client.HTTPException if the reply is cut off or nothing arrives for
    ``silence_s`` seconds; and ValueError if the body is incomplete after ``whole_s`` seconds or has more than ``most_bytes`` bytes.
    """
    opener, end = requests.OpenerDirector(), time.monotonic() + whole_s
    for handler in (requests.HTTPHandler(), requests.HTTPSHandler(context=_TLS), *(kind() for kind in _FOLLOWING if follow)):
        opener.add_handler(handler)
    try:
        answer: Any = opener.open(requests.Request(url, body, dict(headers)), timeout=silence_s)
    except urllib.error.HTTPError as error:
        answer = error
    content = bytearray()
    with answer:
        while len(content) <= most_bytes and (part := answer.read1(most_bytes + 1 - len(content))):
            content += part
            if time.monotonic() > end:
                raise ValueError(f"no complete reply within {whole_s:g} s")
    if len(content) > most_bytes:
        raise ValueError(f"the reply has more than {most_bytes} bytes")
    stated = answer.headers.get("Content-Length", "")
    if stated.isdecimal() and int(stated) != len(content) and not 300 <= answer.status < 400:  # the body of a refused redirect is not read
        raise OSError(f"{len(content)} of {stated} bytes were received")
    return Reply(answer.status, answer.reason, answer.headers, bytes(content))


class _Redirects(requests.HTTPRedirectHandler):
    """Handler that follows redirects but does not read their bodies, which can have any size."""

    def http_error_302(self, req: Any, fp: Any, *reply: Any) -> Any:
        fp.close()
        return super().http_error_302(req, io.BytesIO(), *reply)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


_TLS = ssl.create_default_context()
_FOLLOWING: tuple[Any, ...] = (
    requests.ProxyHandler,
    _Redirects,
    requests.HTTPErrorProcessor,
    requests.HTTPDefaultErrorHandler,
    requests.UnknownHandler,
)
