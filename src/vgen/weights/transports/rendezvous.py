"""Where the members of a process group find each other: a store like torch's `TCPStore`, for those who know a secret.

A `TCPStore` listens on every address and asks nobody who he is: a stranger lists, reads and replaces what the members
tell each other, and so decides whom they connect to. This one listens on one address, admits only who proves that he
knows the secret, and stops to listen when all members have come.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import timedelta
from threading import Condition, Lock, Thread
from typing import Any

import msgspec
import torch.distributed as dist

from ...distributed.handshake import SECRET_BYTES, connect, listen, members
from ...distributed.rank_sockets import RankConnection
from ...errors import WeightSyncError

_PATIENCE = 5.0
"""Seconds that a member waits for an answer beyond the limit it has told."""


class _Request(msgspec.Struct, array_like=True):
    """Set `value` if there is one; then wait until all keys are there, and return their values."""

    keys: list[str]
    value: bytes | None
    seconds: float


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(_Request).decode
_decode_values = msgspec.msgpack.Decoder(list[bytes] | None).decode


class Rendezvous:
    """The trainer's end, which holds what the members say. `size` members come within `timeout` seconds, or not at all.

    Raises `WeightSyncError` where nothing can listen at `address` and `port` (0 for any free port).
    """

    def __init__(self, address: str, port: int, size: int, timeout: float) -> None:
        self._secret, self._size, self._timeout = secrets.token_bytes(SECRET_BYTES), size, timeout
        self._values: dict[str, bytes] = {}
        self._changed, self._closed = Condition(), False
        try:
            self._listener = listen(address, port, size)
        except OSError as error:
            problem = f"the trainer cannot listen on {address}, port {port}: {error.strerror or error}"
            raise WeightSyncError(f"{problem}; choose another group_port", phase="transfer") from error
        self.description = {
            "address": address,
            "port": self._listener.getsockname()[1],
            "secret": self._secret.hex(),
            "size": size,
            "timeout": timeout,
        }
        """What a member must know. It travels by the servers' control routes alone."""
        self._admission = Thread(target=self._admit, args=(time.monotonic() + timeout,), daemon=True)
        self._admission.start()

    def close(self) -> None:
        """Stop to listen, and let go of the members."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._admission.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _admit(self, deadline: float) -> None:
        come = set[int]()
        with self._listener, closing(members(self._listener, self._secret, deadline)) as coming:
            while len(come) < self._size and (member := next(coming, None)):
                (rank, _), connection = member
                come.add(rank)
                Thread(target=self._serve, args=(RankConnection(connection),), daemon=True).start()

    def _serve(self, connection: RankConnection) -> None:
        with closing(connection), suppress(OSError, msgspec.MsgspecError):
            while not self._closed:
                request = _decode_request(connection.receive(self._timeout)[0])
                connection.send(_encode(self._answer(request)), _PATIENCE)

    def _answer(self, request: _Request) -> list[bytes] | None:
        with self._changed:
            if request.value is not None:
                self._values[request.keys[0]] = request.value
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._values.keys() >= {*request.keys}, request.seconds)
            values = [self._values.get(key) for key in request.keys]
            return None if None in values else values  # pyright: ignore[reportReturnType]


class RendezvousStore(dist.Store):  # pyright: ignore[reportPrivateImportUsage]
    """A member's end, as torch's process groups use a store. One call runs at a time."""

    def __init__(self, description: Mapping[str, Any], rank: int) -> None:
        super().__init__()
        self._seconds, self._lock = float(description["timeout"]), Lock()
        address = description["address"], int(description["port"])
        deadline = time.monotonic() + self._seconds
        self._connection = RankConnection(connect(address, bytes.fromhex(description["secret"]), (rank, 0), deadline))

    def set(self, key: str, value: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._ask([key], bytes(value))

    def get(self, key: str) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._ask([key])[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # pyright: ignore
        self._ask([*keys], seconds=self._seconds if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Never: torch's NCCL groups ask for their whole life whether some rank wants a dump, and nobody here does."""
        return False

    def close(self) -> None:
        self._connection.close()

    def _ask(self, keys: list[str], value: bytes | None = None, seconds: float | None = None) -> list[bytes]:
        seconds = self._seconds if seconds is None else seconds
        with self._lock:
            self._connection.send(_encode(_Request(keys, value, seconds)), seconds + _PATIENCE)
            values = _decode_values(self._connection.receive(seconds + _PATIENCE)[0])
        if values is None:
            raise TimeoutError(f"not all members have come within {seconds:g} s")
        return values
