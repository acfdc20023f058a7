"""The time that one call of a server may take in all, whatever the server sends meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any


class Deadline:
    """Ends the connections made within its block when the seconds are over: a reader gets an error, or the end.

    A timeout of a socket begins again with every byte; headers, trailers and a TLS handshake may come byte by byte for ever.
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
            for each in self._sockets:
                each.close()
            self._sockets.clear()

    def watch(self, connection: Any) -> Any:
        """An http.client connection, which has not been opened yet, under this deadline."""
        opened = connection._create_connection

        def connect(*arguments: Any) -> socket.socket:
            made: socket.socket = opened(*arguments)
            with self._lock:
                self._sockets.append(made.dup())  # TLS takes the socket itself away
            if self.late:
                self._end()
            return made

        connection._create_connection = connect
        return connection

    def _end(self) -> None:
        self.late = True
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
