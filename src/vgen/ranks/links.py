"""Connections between the leader and the other ranks, apart from the trainer's process group.

Why not collectives, or a `TCPStore`: a collective whose peer does not come waits for the process group's timeout and
cannot be left. A `TCPStore` breaks its connection over a value above 8 MB, is slower (2.1 MB, half of 256 replies of
2,048 tokens, takes 12 to 25 ms to set and 35 to 47 ms to get; a socket 6 to 23 ms), says nothing when a peer dies, and
its `wait`, whatever the timeout, does not return while its host is stopped: seen with torch 2.13. A socket has
deadlines, can be interrupted, and ends when its peer does. `benchmarks/ranks.py` compares them.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RankError
from .wire import Message

_FRAME = struct.Struct("!Q")
_HELLO = struct.Struct("!32sII")
_HELLO_SECONDS = 5.0
"""How long who connects may take to say who it is."""


class Link:
    """One connection. What breaks in the middle of a message is closed: nothing after it could be understood.

    That is, one direction of it where sending breaks: the peer's last words may have come, and say why it is gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection

    def fileno(self) -> int:
        """For `select`; -1 once closed."""
        return self._socket.fileno()

    def send(self, message: Message, timeout: float) -> int:
        """Returns the bytes sent. Raises OSError when the peer is gone or does not take them in `timeout` seconds."""
        content = message.pack()
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(_FRAME.pack(len(content)))
            self._socket.sendall(content)
        except BaseException:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            raise
        return _FRAME.size + len(content)

    def receive(self, timeout: float) -> tuple[Message, int]:
        """The next message and its bytes. Raises OSError when the peer is gone or stops in the middle."""
        try:
            deadline = time.monotonic() + timeout
            (length,) = _FRAME.unpack(self._exactly(_FRAME.size, deadline))
            return Message.unpack(self._exactly(length, deadline)), _FRAME.size + length
        except BaseException:
            self.close()
            raise

    def _exactly(self, count: int, deadline: float) -> bytearray:
        content = bytearray(count)
        rest = memoryview(content)
        while rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            taken = self._socket.recv_into(rest)
            if not taken:
                raise ConnectionError("closed by the other side")
            rest = rest[taken:]
        return content

    def close(self) -> None:
        self._socket.close()


def ready(links: Mapping[int, Link], timeout: float) -> list[int]:
    """The ranks whose links have something to be received, or were closed, within `timeout` seconds."""
    closed = [rank for rank, link in links.items() if link.fileno() < 0]
    if closed:
        return closed
    poll, ranks = select.poll(), {link.fileno(): rank for rank, link in links.items()}
    for number in ranks:
        poll.register(number, select.POLLIN)
    return [ranks[number] for number, _ in poll.poll(max(timeout, 0) * 1000)]


def meet(index: int, size: int, channels: int, port: int, timeout: float) -> list[dict[int, Link]]:
    """Connect every rank with rank 0, `channels` times. Returns, for each channel, the links by the peer's rank.

    Where rank 0 listens is said in the trainer's default process group; who connects must know a secret that was
    said there too. Ranks of one machine meet on its loopback interface, others at `MASTER_ADDR`.
    """
    import torch.distributed as dist

    places: list[Any] = [None] * size
    box: list[Any] = [None]
    listener, secret = None, secrets.token_bytes(32)
    try:
        dist.all_gather_object(places, _place())
        if index == 0:
            host = "127.0.0.1" if len(set(places)) == 1 else os.environ.get("MASTER_ADDR") or socket.gethostname()
            try:
                listener = _listen("127.0.0.1" if host == "127.0.0.1" else "", port, size * channels)
                box = [(host, listener.getsockname()[1], secret, None)]
            except OSError as error:
                box = [(host, port, secret, os.strerror(error.errno or errno.EIO))]
        dist.broadcast_object_list(box, 0)
    except RuntimeError as error:
        raise RankError(
            "the ranks could not meet in the trainer's own process group, whose own timeout applies there: "
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


def _place() -> tuple[str, str]:
    """What processes have in common that share a loopback interface."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read(), os.readlink("/proc/self/ns/net")
    except OSError:
        return socket.gethostname(), ""


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    if host or not socket.has_dualstack_ipv6():
        return socket.create_server((host, port), backlog=backlog)
    return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)


def _connect(index: int, channels: int, address: tuple[str, int], secret: bytes, timeout: float) -> list[Any]:
    links: list[dict[int, Link]] = []
    try:
        for channel in range(channels):
            connection = socket.create_connection(address, timeout)
            connection.sendall(_HELLO.pack(secret, index, channel))
            links.append({0: Link(connection)})
    except OSError as error:
        raise RankError(
            f"rank {index} cannot reach rank 0 at {address[0]}, port {address[1]}: {type(error).__name__}", rank=0
        ) from error
    return links


def _accept(listener: socket.socket, size: int, channels: int, secret: bytes, timeout: float) -> list[Any]:
    links: list[dict[int, Link]] = [{} for _ in range(channels)]
    deadline = time.monotonic() + timeout
    while missing := sorted({rank for rank in range(1, size) for link in links if rank not in link}):
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise RankError(f"{named(missing)} did not connect within {timeout:g} s", rank=missing[0]) from None
        try:
            connection.settimeout(_HELLO_SECONDS)
            said = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        except OSError:
            said = b""
        if len(said) == _HELLO.size and hmac.compare_digest(said[:32], secret):
            _, rank, channel = _HELLO.unpack(said)
            links[channel][rank] = Link(connection)
        else:
            connection.close()  # somebody else's
    return links


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
