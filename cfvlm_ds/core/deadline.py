"""Deadline of a server call: a limit on its total time, however slowly the server sends."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any


class Deadline:
    """Context manager that closes the connections opened within its block after a number of seconds. Their readers then get an error, or
    the end of the stream.

    A socket's timeout restarts with every byte, and headers, trailers and a TLS handshake may arrive byte by byte without end.
    """

    def __init__(self, seconds: float) -> None:
        self._lock, self._sockets, self.late = threading.Lock(), list[socket.socket](), False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for duplicate in self._sockets:
                duplicate.close()
            self._sockets.clear()

    def watch(self, connection: Any) -> Any:
        """Put an http.client connection, which must not be open yet, under this deadline and return it."""
        opened = connection._create_connection

        def connect(*arguments: Any) -> socket.socket:
            created: socket.socket = opened(*arguments)
            with self._lock:
                self._sockets.append(created.dup())  # a duplicate, because TLS detaches the socket
            if self.late:
                self._end()
            return created

        connection._create_connection = connect
        return connection

    def _end(self) -> None:
        self.late = True
        with self._lock:
            for duplicate in self._sockets:
                with contextlib.suppress(OSError):
                    duplicate.shutdown(socket.SHUT_RDWR)
