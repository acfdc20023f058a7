"""Errors that a user can correct: bad input, and insufficient disk space or device memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import printable


def unwritten(path: Path, error: OSError) -> str:
    """Return a message about a file that could not be written. It contains the path, which the system's error often lacks."""
    return f"{path} cannot be written ({error.strerror or error})"


def first_line(error: BaseException) -> str:
    """Return a library error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class InputError(ValueError):
    """An error that the user can correct: bad input, or too little space for the run. The command then exits with code 2.

    The message is one printable line with secrets masked. It can quote ids, paths and values from untrusted files, so unprintable
    characters are escaped (see ``printable``). The middle of a message longer than 2,000 characters is cut out.
    """

    def __init__(self, message: str) -> None:
        line = printable(without_secrets(message))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class DataError(InputError):
    """Bad input data. The message is one sentence that names the file, the row and the remedy."""


class ConfigError(InputError):
    """A configuration that cannot run. The message names the option, its value and the remedy."""


class StorageError(InputError):
    """A file that cannot be written or read because of a full disk, a quota or permissions. The message names the file and the remedy."""


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Convert an OSError raised in the block to a StorageError, whose message contains ``path`` and ``remedy``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{unwritten(path, error)}; {remedy}") from error


class OutOfMemory(InputError):
    """Too little device memory for the run. The message states what was being processed and which options to lower."""


_LONGEST = 2000  # characters


def is_failure(error: BaseException) -> bool:
    """Return whether an error is a library failure rather than a request to exit. Failures are Exceptions, and panics in Rust libraries,
    which do not derive from Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
