"""Exit codes and error output of commands."""

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
_PIPE_CLOSED = 141  # exit code that shells report for a program ended by SIGPIPE


def escape_unencodable() -> None:
    """Make stdout and stderr escape characters that the terminal's encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def explain_os_errors(function: Callable[[], None]) -> None:
    """Call a function and flush stdout. Re-raises an OSError (a full disk, for example) as a StorageError with a one-sentence message.
    Exits if the reader of stdout has closed the pipe.
    """
    try:
        function()
        sys.stdout.flush()
    except (BrokenPipeError, ConnectionError, TimeoutError) as error:
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, such as `| head`, has closed the pipe
        sys.exit(_PIPE_CLOSED)
    except OSError as error:
        if error.errno is None:
            raise
        path = f"{error.filename}: " if error.filename is not None else ""
        raise StorageError(f"{path}{error.strerror}; free some space, or correct the path or its permissions") from error


def exit_cleanly(function: Callable[[], None]) -> None:
    """Call a function. If it raises an InputError, print the message to stderr and exit with code 2; --verbose adds a traceback.

    If there are several ranks, only one prints the error. A full disk has its own exit code, because the command can succeed once space is
    freed.
    """
    try:
        function()
    except InputError as error:
        with printed_once(str(error)) as mine:
            if mine and shows_everything():
                print_line(traceback.format_exc().rstrip("\n"), error=True)
            if mine:
                print(f"error: {error}", file=sys.stderr, flush=True)
        full = isinstance(error, StorageError) and any(reason in str(error) for reason in _DISK_FULL)  # ranks share only error messages
        sys.exit(EXIT_DISK_FULL if full else 2)
    except KeyboardInterrupt:  # in a command; training handles Ctrl-C itself
        sys.exit(EXIT_INTERRUPTED)


def leave_at_once(function: Callable[[], None]) -> None:
    """Call a training function. If it exits with a non-zero code, terminate the process without torch's teardown.

    The teardown takes seconds. Launchers send SIGTERM to the other ranks once the first rank has exited. A SIGTERM that arrived during the
    teardown would change the exit code.
    """
    try:
        function()
    except SystemExit as left:
        if not left.code:
            raise
        sys.stdout.flush()
        os._exit(int(left.code))
