"""A TCP proxy in front of a server, which cuts all connections in the middle of a call when it is told to."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from ..errors import CheckError

CHUNK = 1 << 16


class CuttingProxy:
    """Forwards connections to the server of `url`; `url` of the proxy is what clients use. Use it in a `with` block.

    Raises `CheckError` if the server does not use plain HTTP.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise CheckError(f"{url} is not an address like http://host:port")
        self._server = parts.hostname, parts.port or 80
        self._listener = socket.create_server(("127.0.0.1", 0))
        place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        credentials, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit((parts.scheme, credentials + at + place, parts.path, "", ""))
        self.cut = threading.Event()
        """Set once connections have been cut."""
        self._posts_left: int | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="vgen-check-proxy", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self, posts: int) -> None:
        """Cut everything once the `posts`-th POST from now on has been forwarded, before its answer comes."""
        self.cut.clear()
        self._posts_left = posts

    def disarm(self) -> None:
        """Forward everything again."""
        self._posts_left = None

    def close(self) -> None:
        """End all connections, and accept no more."""
        self._listener.close()
        self._cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server, timeout=10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            for source, sink, requests in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(source, sink, requests), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, requests: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                sink.sendall(data)
                if requests and self._posts_left is not None and data.startswith(b"POST "):
                    self._posts_left -= 1
                    if self._posts_left == 0:
                        self._cut_all()
                        self.cut.set()
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            with self._lock:
                self._open.discard(each)

    def _cut_all(self) -> None:
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
