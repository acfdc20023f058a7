"""HTTP calls with limits on reply size, silence and total time, made only with the standard library."""

from __future__ import annotations

import http.client
import io
import ssl
import urllib.error
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib import request as requests

from cfvlm_ds.core.deadline import Deadline


class Reply(NamedTuple):
    """A complete reply of any status; ``headers`` is a mapping that ignores case."""

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

    With ``follow``, the environment's proxies are used and redirects to other http and https addresses are followed. Raises
    urllib.error.URLError if there is no connection; OSError or http.client.HTTPException for a reply that is cut off, or that sends
    nothing for ``silence_s`` seconds; and ValueError for a reply that takes longer than ``whole_s`` seconds or has more than ``most_bytes``
    bytes.
    """
    opener = requests.OpenerDirector()
    with Deadline(whole_s) as deadline:
        for handler in (_Watched(deadline), *(kind() for kind in _FOLLOWING if follow)):
            opener.add_handler(handler)
        try:
            try:
                answer: Any = opener.open(requests.Request(url, body, dict(headers)), timeout=silence_s)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read(most_bytes + 1)
        except (OSError, http.client.HTTPException):
            if not deadline.late:
                raise
    if deadline.late:
        raise ValueError(f"no complete reply within {whole_s:g} s")
    if len(content) > most_bytes:
        raise ValueError(f"the reply has more than {most_bytes} bytes")
    stated = answer.headers.get("Content-Length", "")
    if stated.isdecimal() and int(stated) != len(content) and not 300 <= answer.status < 400:  # a refused redirect is not read
        raise OSError(f"{len(content)} of {stated} bytes were received")
    return Reply(answer.status, answer.reason, answer.headers, content)


class _Watched(requests.HTTPHandler, requests.HTTPSHandler):
    """Handler that opens connections under a deadline."""

    def __init__(self, deadline: Deadline) -> None:
        super().__init__(context=_TLS)
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        return super().do_open(lambda *where, **how: self._deadline.watch(http_class(*where, **how)), req, **options)


class _Redirects(requests.HTTPRedirectHandler):
    """Handler that follows redirects without reading their bodies, which have no limit."""

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
