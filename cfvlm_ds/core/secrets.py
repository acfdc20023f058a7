"""Passwords, tokens and signatures are masked before anything is printed or written."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

MASK = "***"

_URL = re.compile(r":(/+)((?:(?!:/)\S)+)")  # pathlib makes one slash of two; a URL within a URL begins its own
_USERINFO = re.compile(r"[^/\s]*@(?=\S)|[^/\s:@]*:(?!\d*(?:[/?#]|$))\S*@(?=\S)")  # the second: a password with a slash, which is no port
_PARAMETER = re.compile(r"([?&#])([^=&#\s\"<>]*)(=?)([^&#\s\"<>]*)")
_CLOSING = ")]}',.:;!"
"""What follows a URL in a sentence rather than ending it."""

_NAME = re.compile(r"(?<![\w.\-])(?:([\w.\-]+)([\"']?\s{0,2}[=:]\s{0,2})|(-[\w.\-]+)([\"']?,?\s{1,2})(?!-))")
"""A name and what binds it to a value; a space binds the name of an option, as in ``--api-key VALUE``."""
_VALUE = re.compile(r"(?:(?:Bearer|Basic|Token)\s+)?(?:\"[^\"]{0,1000}\"|'[^']{0,1000}'|[^\s\"'&,;)\]}]+)", re.IGNORECASE)
_ALWAYS = re.compile(
    r"pass(?:word|wd|phrase)s?$|^pwd$|secrets?$|credentials?$|^authorization$"
    r"|(?:api|access|account|auth|private|secret|session|refresh|security|signing|subscription|shared)[_.\-]?(?:key|token)s?$"
    r"|(?:hf|hub|bearer|wandb|github|gitlab|client)[_.\-](?:key|token)s?$"
)
"""Names, or their last words joined by ``_``, whose value is a secret whatever it looks like."""
_UNLESS_NUMBER = {"token", "tokens", "key", "keys", "signature", "sig", "sas", "auth", "bearer", "cookie"}
"""Words of a name whose value is a secret unless it is a number: num_key_value_heads and token_budget are counts."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def without_secrets(text: str) -> str:
    """The text with *** in place of what looks like a secret.

    That is the user and password of every URL in it, the values of a URL's query and fragment (signed addresses carry their signature
    there), and the value of every ``name=value``, ``name: value`` or ``--name value`` whose name is that of a credential.
    """
    text = _URL.sub(_masked_url, text)
    kept, done = [], 0
    for name in _NAME.finditer(text):
        certain, likely = _is_credential(name[1] or name[3], name[2] or "=")
        if name.start() < done or not (certain or likely) or not (value := _VALUE.match(text, name.end())):
            continue
        if not value[0].startswith(MASK) and (certain or not _is_number(value[0])):
            quote = value[0][-1] if value[0][-1] in "\"'" else ""
            closing = "" if quote else value[0][len(value[0].rstrip(_CLOSING)) :]
            kept.append(f"{text[done : name.end()]}{quote}{MASK}{quote}{closing}")
            done = value.end()
    return "".join((*kept, text[done:]))


def _masked_url(found: re.Match[str]) -> str:
    slashes, rest = found[1], found[2]
    if len(slashes) < 3 and (user := _USERINFO.match(rest)):  # three slashes begin a path
        rest = f"{MASK}@{rest[user.end() :]}"
    address = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f":{slashes}{address}{_PARAMETER.sub(_masked_parameter, rest[len(address) :])}"


def _masked_parameter(found: re.Match[str]) -> str:
    mark, name, equals, value = found.groups()
    if not equals:  # a value without a name, or the name of a place in a page
        name, value = (name, "") if mark == "#" else ("", name)
    closing = value[len(value.rstrip(_CLOSING)) :]
    return f"{mark}{name}{equals}{MASK if len(value) > len(closing) else ''}{closing}"


def _is_credential(name: str, binding: str) -> tuple[bool, bool]:
    """Whether a name in a text is that of a credential whatever its value, and whether it is unless its value is a number."""
    words = _words(name)
    if not words:
        return False, False
    return bool(_ALWAYS.search("_".join(words))), "=" in binding and words[-1] in _UNLESS_NUMBER  # "token: x" is English


def is_secret(name: str, value: Any) -> bool:
    """Whether a value has to be masked because of its dotted name alone."""
    words = _words(name)
    if any(_ALWAYS.search(part) for part in ("_".join(words), *words)):
        return True
    return bool(_UNLESS_NUMBER & set(words)) and not isinstance(value, (int, float))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _is_number(text: str) -> bool:
    try:
        float(text.strip("\"'"))
    except ValueError:
        return False
    return True


def masked(value: Any, name: str = "") -> Any:
    """A JSON-ready copy without secrets: the values of names of credentials, and what ``without_secrets`` finds within texts."""
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
    """Print the exception that ends this process, or one of its threads, without secrets."""

    def shown(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        print_line("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)

    sys.excepthook = shown
    threading.excepthook = lambda ended: shown(ended.exc_type, ended.exc_value, ended.exc_traceback)


def print_line(message: str, error: bool = False) -> None:
    """Print a line without secrets, to stderr if it is about an ``error``; a log on a full disk does not end a run."""
    with contextlib.suppress(OSError):
        print(without_secrets(message), file=sys.stderr if error else sys.stdout, flush=True)
