"""How a command prints and ends."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable

from cfvlm_ds.cluster.signals import EXIT_DISK_FULL, EXIT_INTERRUPTED
from cfvlm_ds.core.errors import InputError, StorageError
from cfvlm_ds.core.ranks import printed_once
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.verbosity import shows_everything

_DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_PIPE_CLOSED = 141  # what shells have for a program that SIGPIPE has ended


def print_anything() -> None:
    """Captions and paths are in any script; what the terminal's encoding lacks is printed by its number and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def files_named(function: Callable[[], None]) -> None:
    """What the system has against a file that a command reads or writes, such as a full disk, is one sentence too."""
    try:
        function()
        sys.stdout.flush()
    except (BrokenPipeError, ConnectionError, TimeoutError) as error:
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        sys.exit(_PIPE_CLOSED)
    except OSError as error:
        if error.errno is None:
            raise
        named = f"{error.filename}: " if error.filename is not None else ""
        raise StorageError(f"{named}{error.strerror}; make room, or correct the path or its permissions") from error


def exit_cleanly(function: Callable[[], None]) -> None:
    """Bad input is the user's to correct: one sentence on stderr and exit code 2, and a traceback only with --verbose. Of several ranks one
    prints it. A full disk has a code of its own, since room may come back without a correction."""
    try:
        function()
    except InputError as error:
        with printed_once(str(error)) as mine:
            if mine and shows_everything():
                print_line(traceback.format_exc().rstrip("\n"), error=True)
            if mine:
                print(f"error: {error}", file=sys.stderr, flush=True)
        full = isinstance(error, StorageError) and any(reason in str(error) for reason in _DISK_FULL)  # ranks exchange the text alone
        sys.exit(EXIT_DISK_FULL if full else 2)
    except KeyboardInterrupt:  # of a command; a training answers Ctrl-C itself
        sys.exit(EXIT_INTERRUPTED)


def leave_at_once(function: Callable[[], None]) -> None:
    """Run a training. An exit code that is not 0 is left with at once: torch takes seconds to tear down, and the TERM that launchers send
    when the first rank has left would change the code."""
    try:
        function()
    except SystemExit as left:
        if not left.code:
            raise
        sys.stdout.flush()
        os._exit(int(left.code))
