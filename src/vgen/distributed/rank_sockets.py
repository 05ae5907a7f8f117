"""Connections between the leader and the other ranks, apart from the trainer's process group.

Why not collectives or a `TCPStore`: a collective whose peer does not come waits for the process group's timeout and
cannot be left. A `TCPStore` breaks its connection over a value above 8 MB. It is slower: 2.1 MB, half of 256 replies of
2,048 tokens, take 12 to 25 ms to set and 35 to 47 ms to get, and 6 to 23 ms over a socket. It reports nothing when a
peer dies. While its host is stopped, its `wait` does not return, whatever the timeout (seen with torch 2.13). A socket
has deadlines, can be interrupted, and ends when its peer does. `benchmarks/ranks.py` compares them.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .._addresses import this_host
from ..errors import RankError
from .handshake import SECRET_BYTES, connect, listen, members

_FRAME = struct.Struct("!Q")


class RankConnection:
    """A connection to another rank, which carries messages of bytes. It is closed if it breaks within a message.

    If sending breaks, only that direction is closed: the peer's last messages may have arrived, and say why it is gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection

    def fileno(self) -> int:
        """For `select`; -1 once closed."""
        return self._socket.fileno()

    def send(self, content: bytes, timeout: float) -> int:
        """Send one message and return the bytes sent.

        Raises `OSError` when the peer is gone or does not take the message within `timeout` seconds.
        """
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(_FRAME.pack(len(content)))
            self._socket.sendall(content)
        except BaseException:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            raise
        return _FRAME.size + len(content)

    def receive(self, timeout: float) -> tuple[bytearray, int]:
        """The next message, and how many bytes were received for it.

        Raises `OSError` when the peer is gone, or does not finish the message within `timeout` seconds.
        """
        try:
            deadline = time.monotonic() + timeout
            (length,) = _FRAME.unpack(self._exactly(_FRAME.size, deadline))
            return self._exactly(length, deadline), _FRAME.size + length
        except BaseException:
            self.close()
            raise

    def _exactly(self, count: int, deadline: float) -> bytearray:
        content = bytearray(count)
        rest = memoryview(content)
        while rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            received = self._socket.recv_into(rest)
            if not received:
                raise ConnectionError("closed by the other side")
            rest = rest[received:]
        return content

    def close(self) -> None:
        self._socket.close()


def ready(connections: Mapping[int, RankConnection], timeout: float) -> list[int]:
    """Wait for at most `timeout` seconds; returns the ranks that have sent something or whose connection is closed."""
    closed = [rank for rank, connection in connections.items() if connection.fileno() < 0]
    if closed:
        return closed
    poll, ranks = select.poll(), {connection.fileno(): rank for rank, connection in connections.items()}
    for number in ranks:
        poll.register(number, select.POLLIN)
    return [ranks[number] for number, _ in poll.poll(max(timeout, 0) * 1000)]


def meet(index: int, size: int, channels: int, port: int, timeout: float) -> list[dict[int, RankConnection]]:
    """Connect every rank with rank 0, `channels` times. Returns each channel's connections by the peer's rank.

    Rank 0 broadcasts its address and a secret in the trainer's default process group; a process that connects must
    prove that it knows the secret. Ranks of one machine connect through its loopback interface, others at
    `MASTER_ADDR`.
    """
    import torch.distributed as dist

    machines: list[Any] = [None] * size
    box: list[Any] = [None]
    listener, secret = None, secrets.token_bytes(SECRET_BYTES)
    try:
        dist.all_gather_object(machines, _machine())
        if index == 0:
            host = "127.0.0.1" if len(set(machines)) == 1 else os.environ.get("MASTER_ADDR") or socket.gethostname()
            try:
                listener = _listen(host, port, size * channels)
                box = [(host, listener.getsockname()[1], secret, None)]
            except OSError as error:
                box = [(host, port, secret, os.strerror(error.errno or errno.EIO))]
        dist.broadcast_object_list(box, 0)
    except RuntimeError as error:
        raise RankError(
            "the ranks could not exchange addresses in the trainer's process group, within its own timeout: "
            f"{str(error).splitlines()[0]}",
            rank=index,
        ) from error
    host, port, secret, problem = box[0]
    if problem is not None:
        raise RankError(f"rank 0 cannot listen on port {port}: {problem}; choose another group_port", rank=0)
    if listener is None:
        return _connect(index, channels, (host, port), secret, timeout)
    with listener:
        return _accept(listener, size, channels, secret, timeout)


def _machine() -> tuple[str, str]:
    """A value that is equal for processes that share a loopback interface."""
    with contextlib.suppress(OSError):
        return this_host(), os.readlink("/proc/self/ns/net")
    return socket.gethostname(), ""


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """At the address by which the other ranks know this machine; at all its addresses where that one is not its own."""
    if host != "127.0.0.1":
        address = ""
        with contextlib.suppress(OSError):
            address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
        # The name of a machine often means its loopback interface there, and only there.
        if address and not ipaddress.ip_address(str(address).partition("%")[0]).is_loopback:
            with contextlib.suppress(OSError):
                return listen(str(address), port, backlog)
        host = ""
    return listen(host, port, backlog)


def _connect(index: int, channels: int, address: tuple[str, int], secret: bytes, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    try:
        return [
            {0: RankConnection(connect(address, secret, (index, channel), deadline))} for channel in range(channels)
        ]
    except OSError as error:
        raise RankError(
            f"rank {index} cannot reach rank 0 at {address[0]}, port {address[1]}: {type(error).__name__}", rank=0
        ) from error


def _accept(listener: socket.socket, size: int, channels: int, secret: bytes, timeout: float) -> list[Any]:
    connections: list[dict[int, RankConnection]] = [{} for _ in range(channels)]
    expected = {(rank, channel) for rank in range(1, size) for channel in range(channels)}
    missing = set(expected)
    with contextlib.closing(members(listener, secret, time.monotonic() + timeout)) as coming:
        while missing and (member := next(coming, None)):
            (rank, channel), connection = member
            if (rank, channel) in expected:
                missing.discard((rank, channel))
                connections[channel][rank] = RankConnection(connection)
            else:
                connection.close()
    if missing:
        ranks = sorted({rank for rank, _ in missing})
        raise RankError(f"{named(ranks)} did not connect within {timeout:g} s", rank=ranks[0])
    return connections


def named(ranks: Sequence[int]) -> str:
    """The ranks for a message: `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
