"""Connections between processes that share a secret. Strangers who connect keep nobody waiting.

The listener sends random bytes, the member answers with its two numbers and a proof that it knows the secret, and the
listener proves the same in turn. The secret itself is never sent, and what was overheard opens nothing a second time.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Generator
from contextlib import suppress
from typing import NamedTuple

SECRET_BYTES = 32
_CHALLENGE_BYTES = 16
_NUMBERS = struct.Struct("!II")
_PROOF_BYTES = 32
_OWN_BYTES = _NUMBERS.size + _CHALLENGE_BYTES
_STRANGERS = 256
"""How many connections without a proof are kept open. The oldest gives way to the next; a member tries again."""
_PAUSE_SECONDS = 0.05


class _Guest(NamedTuple):
    """Who has connected, and has not proved anything yet."""

    connection: socket.socket
    challenge: bytes
    said: bytearray


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listener at `host` alone; at every address of the machine if `host` is empty. Raises `OSError`."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


def connect(address: tuple[str, int], secret: bytes, numbers: tuple[int, int], deadline: float) -> socket.socket:
    """Connect to a listener of this job as the member with these numbers. Raises `OSError`, by `deadline`."""
    while True:
        connection = socket.create_connection(address, _left(deadline))
        try:
            own = _NUMBERS.pack(*numbers) + secrets.token_bytes(_CHALLENGE_BYTES)
            connection.sendall(own + _proof(secret, b"member", _exactly(connection, _CHALLENGE_BYTES, deadline) + own))
            if hmac.compare_digest(_exactly(connection, _PROOF_BYTES, deadline), _proof(secret, b"listener", own)):
                return connection
            raise PermissionError("the process that listens there is not of this job")
        except ConnectionError:  # it gave way to another
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
        except BaseException:
            connection.close()
            raise


def members(
    listener: socket.socket, secret: bytes, deadline: float
) -> Generator[tuple[tuple[int, int], socket.socket]]:
    """The numbers and the connection of each member that connects before `deadline`.

    It ends earlier when `listener` is shut down, from any thread.
    """
    guests: dict[int, _Guest] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    listener.setblocking(False)
    try:
        while time.monotonic() < deadline:
            for number, _ in poll.poll(_left(deadline) * 1000):
                if number != listener.fileno():
                    guest = guests[number]
                    if _has_more_to_say(guest):
                        continue
                    poll.unregister(number)
                    if _admitted(guests.pop(number), secret):
                        yield _NUMBERS.unpack_from(guest.said), guest.connection
                    continue
                full = len(guests) >= _STRANGERS
                try:
                    guest = _let_in(listener)
                    guests[guest.connection.fileno()] = guest
                    poll.register(guest.connection, select.POLLIN)
                except (BlockingIOError, ConnectionError):  # who hung up before he was let in
                    continue
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        return  # the listener was shut down
                    full = bool(guests)
                if full:
                    oldest = next(iter(guests))
                    poll.unregister(oldest)
                    guests.pop(oldest).connection.close()
                    break  # it may be among those that `poll` named
    finally:
        for guest in guests.values():
            guest.connection.close()


def _let_in(listener: socket.socket) -> _Guest:
    connection, _ = listener.accept()
    connection.setblocking(False)
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    try:
        connection.send(challenge)
    except OSError:
        connection.close()
        raise
    return _Guest(connection, challenge, bytearray())


def _has_more_to_say(guest: _Guest) -> bool:
    """Read what has come. False if it is a whole answer, or nothing more will come."""
    try:
        part = guest.connection.recv(_OWN_BYTES + _PROOF_BYTES - len(guest.said))
    except BlockingIOError:
        return True
    except OSError:
        return False
    guest.said.extend(part)
    return bool(part) and len(guest.said) < _OWN_BYTES + _PROOF_BYTES


def _admitted(guest: _Guest, secret: bytes) -> bool:
    own, proof = bytes(guest.said[:_OWN_BYTES]), bytes(guest.said[_OWN_BYTES:])
    with suppress(OSError):
        if hmac.compare_digest(proof, _proof(secret, b"member", guest.challenge + own)):
            guest.connection.setblocking(True)
            guest.connection.send(_proof(secret, b"listener", own))
            return True
    guest.connection.close()
    return False


def _proof(secret: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + said, "sha256")


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    content = b""
    while len(content) < count:
        connection.settimeout(_left(deadline))
        if not (part := connection.recv(count - len(content))):
            raise ConnectionError("closed by the other side")
        content += part
    return content


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
