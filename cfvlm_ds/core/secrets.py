"""Secret masking: passwords, tokens and signatures are masked in all output, printed or written."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

MASK = "***"

_URL = re.compile(r":/+(?:(?!:/)\S)+")  # a URL within a URL matches separately
_USERINFO = re.compile(r"^(://?)(?!/)(?:[^/\s]*@(?=\S)|[^/\s:@]*:(?!\d*(?:[/?#]|$))\S*@(?=\S))")
"""User name and password in a URL. A single slash also matches, because pathlib merges the two slashes of a URL; three slashes begin a
path. The second alternative matches a password that contains a slash.
"""
_PARAMETER = re.compile(r"([?&#][^=&#\s\"<>]*=|[?&](?![^=&#\s\"<>]*=))[^&#\s\"<>]*[^&#\s\"<>)\]}',.:;!]")
"""A parameter in a query or fragment, or a value without a name in a query. Anchors and punctuation after the URL do not match."""
_QUERY = re.compile(r"[?#]\S+")
_CLOSING = ")]}',.:;!"
"""Punctuation after a value that belongs to the surrounding sentence."""

_NAME = re.compile(r"(?<![\w.\-])(?:([\w.\-]+)([\"']?\s{0,2}[=:]\s{0,2})|(-[\w.\-]+)([\"']?,?\s{1,2})(?!-))")
"""A name and the separator before its value. After an option, the separator can also be a space, as in ``--api-key VALUE``."""
_VALUE = re.compile(r"(?:(?:Bearer|Basic|Token)\s+)?(?:\"[^\"]{0,1000}\"|'[^']{0,1000}'|[^\s\"'&,;)\]}]+)", re.IGNORECASE)
_ALWAYS = re.compile(
    r"pass(?:word|wd|phrase)s?$|^pwd$|secrets?$|credentials?$|^authorization$"
    r"|(?:api|access|account|auth|private|secret|session|refresh|security|signing|subscription|shared)[_.\-]?(?:key|token)s?$"
    r"|(?:hf|hub|bearer|wandb|github|gitlab|client)[_.\-](?:key|token)s?$"
)
"""Names, or endings of names, whose value is always a secret. The words of a name are joined by ``_`` before they are matched."""
_UNLESS_NUMBER = {"token", "tokens", "key", "keys", "signature", "sig", "sas", "auth", "bearer", "cookie"}
"""Words that mark a value as a secret unless it is a number, as for num_key_value_heads or token_budget."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def without_secrets(text: str) -> str:
    """Return the text with *** in place of everything that looks like a secret.

    These count as secrets: the user name and password in a URL; the values in a URL's query and fragment, because a signed URL carries its
    signature there; and the value in ``name=value``, ``name: value`` or ``--name value`` if the name denotes a credential.
    """
    text = _URL.sub(
        lambda url: _QUERY.sub(lambda query: _PARAMETER.sub(rf"\1{MASK}", query[0]), _USERINFO.sub(rf"\1{MASK}@", url[0])), text
    )
    kept, done = [], 0
    for name in _NAME.finditer(text):
        words = _words(name[1] or name[3])
        certain = bool(_ALWAYS.search("_".join(words)))
        likely = "=" in (name[2] or "=") and not _UNLESS_NUMBER.isdisjoint(words[-1:])  # "token: x" may be English
        if name.start() < done or not (certain or likely) or not (value := _VALUE.match(text, name.end())):
            continue
        if not value[0].startswith(MASK) and (certain or not re.fullmatch(r"[\"']?[-+.\d]+[\"']?", value[0])):
            quote = value[0][-1] if value[0][-1] in "\"'" else ""
            closing = "" if quote else value[0][len(value[0].rstrip(_CLOSING)) :]
            kept.append(f"{text[done : name.end()]}{quote}{MASK}{quote}{closing}")
            done = value.end()
    return "".join((*kept, text[done:]))


def is_secret(name: str, value: Any) -> bool:
    """Return whether an option's value is a secret, judging by its dotted name. A number under an ambiguous name is not a secret."""
    words = _words(name)
    if any(_ALWAYS.search(part) for part in ("_".join(words), *words)):
        return True
    return bool(_UNLESS_NUMBER & set(words)) and not isinstance(value, (int, float))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def masked(value: Any, name: str = "") -> Any:
    """Return a JSON-serialisable copy of a value in which credentials, and secrets within strings, are masked."""
    if isinstance(value, Mapping):
        return {without_secrets(str(key)): masked(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name, value):
        return MASK
    return value if isinstance(value, (int, float)) else without_secrets(str(value))


def mask_tracebacks() -> None:
    """Make Python mask secrets when it prints uncaught exceptions, including exceptions in threads."""

    def print_exception(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        print_line("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)

    sys.excepthook = print_exception
    threading.excepthook = lambda ended: print_exception(ended.exc_type, ended.exc_value, ended.exc_traceback)


def print_line(message: str, error: bool = False) -> None:
    """Print a line with secrets masked: to stderr if ``error`` is True, otherwise to stdout. A line that cannot be written, for instance to
    a log on a full disk, is lost.
    """
    with contextlib.suppress(OSError):
        print(without_secrets(message), file=sys.stderr if error else sys.stdout, flush=True)
