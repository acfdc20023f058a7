"""The errors of this package: input that is refused, and a disk or a memory that does not hold what a run needs."""

from __future__ import annotations

from pathlib import Path

from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.core.text import printable


def unwritten(path: Path, error: OSError) -> str:
    """Why a file could not be written: the file, which such errors often lack, and the system's own words."""
    return f"{path} cannot be written ({error.strerror or error})"


def first_line(error: BaseException) -> str:
    """The kind of a library's error, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class InputError(ValueError):
    """What the user can correct: input, or the room that a run is given. A command ends with it and exit code 2.

    The message is one printable line without secrets, whatever it quotes.
    Ids, paths and values come from files that nobody vouches for: a line break would end the sentence, an escape sequence would command
    the terminal, and half a surrogate pair cannot be printed at all. Such characters are shown as Python writes them, and a quotation of
    thousands of characters loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = printable(without_secrets(message))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class DataError(InputError):
    """Bad input data. The message is one sentence that names the file, the row and the remedy."""


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the option, its value and the remedy."""


class StorageError(InputError):
    """A file that the system does not let be written or read: a full disk, a quota, permissions. The message names it and the remedy."""


class OutOfMemory(InputError):
    """A device has less memory than what was asked of it takes. The message names its size and what to lower."""


_LONGEST = 2000  # characters


def is_failure(error: BaseException) -> bool:
    """Whether a library raised this about its input: an Exception, or the panic of a library in Rust, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
