"""Who knows the secret is let in, and who does not costs nobody anything."""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest
from helpers.waiting import wait_until

from vgen.distributed import handshake
from vgen.distributed.handshake import connect, listen, members

SECRET = secrets.token_bytes(32)
SOON = 10.0


@pytest.fixture
def listener():
    with listen("127.0.0.1", 0, 16) as listener:
        yield listener


def came(listener: socket.socket, count: int, seconds: float = SOON) -> Future[list[tuple[int, int]]]:
    """The numbers of the first `count` members, or of those who come within `seconds`."""
    found: Future[list[tuple[int, int]]] = Future()

    def run() -> None:
        numbers = []
        with closing(members(listener, SECRET, time.monotonic() + seconds)) as coming:
            while len(numbers) < count and (member := next(coming, None)):
                numbers.append(member[0])
                member[1].sendall(b"welcome")
                member[1].close()
        found.set_result(numbers)

    threading.Thread(target=run, daemon=True).start()
    return found


def member(listener: socket.socket, numbers: tuple[int, int], secret: bytes = SECRET) -> bytes:
    with connect(listener.getsockname(), secret, numbers, time.monotonic() + SOON) as connection:
        return connection.recv(100, socket.MSG_WAITALL)


def answered(listener: socket.socket, said: bytes) -> bytes:
    """What a stranger who says this hears after the challenge, until he is shown the door."""
    with socket.create_connection(listener.getsockname(), SOON) as stranger:
        stranger.settimeout(SOON)
        stranger.recv(16, socket.MSG_WAITALL)
        stranger.sendall(said)
        try:
            return stranger.recv(100)
        except ConnectionResetError:
            return b""


def test_members_are_let_in_with_their_numbers(listener):
    found = came(listener, 2)
    assert member(listener, (1, 2)) == member(listener, (7, 0)) == b"welcome"
    assert found.result(SOON) == [(1, 2), (7, 0)]


NUMBERS = struct.pack("!II", 1, 0)
OWN = NUMBERS + bytes(16)


@pytest.mark.parametrize(
    "said",
    [
        OWN + bytes(32),
        OWN + SECRET,
        SECRET + OWN,  # as a hello once was
        OWN + hmac.digest(SECRET, b"member" + OWN, "sha256"),  # without the challenge
        OWN + hmac.digest(b"another secret", b"member" + bytes(16) + OWN, "sha256"),
        secrets.token_bytes(56),
    ],
)
def test_whoever_proves_nothing_is_not_let_in(listener, said):
    found = came(listener, 1)
    assert answered(listener, said) == b""
    assert member(listener, (3, 0)) == b"welcome"
    assert found.result(SOON) == [(3, 0)]


@pytest.mark.fault(
    point="the ranks' connections",
    did="A stranger repeats a proof that it overheard",
    happens="It is not let in",
    within=60,
)
def test_a_proof_that_was_overheard_opens_nothing_again(listener):
    found = came(listener, 2)
    with socket.create_server(("127.0.0.1", 0)) as between, ThreadPoolExecutor(1) as pool:
        legitimate = pool.submit(member, between, (1, 0))
        inner, _ = between.accept()
        with inner, socket.create_connection(listener.getsockname()) as outer:
            inner.sendall(outer.recv(16, socket.MSG_WAITALL))
            overheard = inner.recv(56, socket.MSG_WAITALL)
            outer.sendall(overheard)
            inner.sendall(outer.recv(32, socket.MSG_WAITALL) + b"welcome")
        assert legitimate.result(SOON) == b"welcome"
    assert answered(listener, overheard) == b""
    assert member(listener, (2, 0)) == b"welcome"
    assert found.result(SOON) == [(1, 0), (2, 0)]


def test_a_member_does_not_take_a_stranger_for_its_listener():
    with socket.create_server(("127.0.0.1", 0)) as stranger, ThreadPoolExecutor(1) as pool:
        legitimate = pool.submit(member, stranger, (1, 0))
        connection, _ = stranger.accept()
        with connection:
            connection.sendall(bytes(16))
            said = connection.recv(56, socket.MSG_WAITALL)
            connection.sendall(said[24:])  # the member's own proof
            with pytest.raises(PermissionError, match="not of this job"):
                legitimate.result(SOON)
    assert SECRET not in said


@pytest.mark.fault(
    point="the ranks' connections",
    did="Strangers connect and say nothing",
    happens="Members are let in at once",
    within=60,
)
def test_strangers_keep_no_member_waiting_and_are_let_go(listener):
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        silent[1].sendall(b"GET / HTTP/1.1\r\n")  # and no more
        found = came(listener, 1)
        start = time.monotonic()
        assert member(listener, (1, 0)) == b"welcome"
        assert found.result(SOON) == [(1, 0)]
        assert time.monotonic() - start < SOON
        for stranger in silent:
            stranger.settimeout(SOON)
            stranger.recv(16, socket.MSG_WAITALL)
            with suppress(ConnectionResetError):  # of the one who had said something
                assert stranger.recv(1) == b""


def test_a_stranger_who_hangs_up_half_way_is_let_go_at_once(listener):
    found = came(listener, 1)
    with socket.create_connection(listener.getsockname(), SOON) as stranger:
        stranger.recv(16, socket.MSG_WAITALL)
        stranger.sendall(b"abc")
        stranger.shutdown(socket.SHUT_WR)
        start = time.monotonic()
        assert stranger.recv(1) == b""
        assert time.monotonic() - start < 2.0
    assert member(listener, (1, 0)) == b"welcome"
    assert found.result(SOON) == [(1, 0)]


def test_what_a_member_proves_a_listener_does_not():
    said = secrets.token_bytes(40)
    assert handshake._proof(SECRET, b"member", said) != handshake._proof(SECRET, b"listener", said)


def test_strangers_cost_nothing_beyond_the_deadline(listener):
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        start = time.monotonic()
        assert came(listener, 1, 0.3).result(SOON) == []
        assert 0.3 <= time.monotonic() - start < SOON


def test_of_more_strangers_than_are_heard_the_oldest_gives_way(listener, monkeypatch):
    monkeypatch.setattr(handshake, "_STRANGERS", 2)
    found = came(listener, 1)
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(listener.getsockname(), SOON)) for _ in range(3)]
        strangers[0].recv(16, socket.MSG_WAITALL)
        assert strangers[0].recv(1) == b""
        assert member(listener, (1, 0)) == b"welcome"
    assert found.result(SOON) == [(1, 0)]


def test_a_member_who_gave_way_tries_again(listener):
    with socket.create_server(("127.0.0.1", 0)) as full, ThreadPoolExecutor(1) as pool:
        legitimate = pool.submit(member, full, (1, 0))
        full.accept()[0].close()
        connection, _ = full.accept()
        connection.close()
        full.close()
        with pytest.raises(ConnectionRefusedError):
            legitimate.result(SOON)


def test_a_listener_that_is_shut_down_ends_the_wait(listener):
    found = came(listener, 1, 300.0)
    wait_until(lambda: answered(listener, bytes(56)) == b"")
    listener.shutdown(socket.SHUT_RDWR)
    assert found.result(SOON) == []


def test_one_address_is_listened_on_and_no_other():
    with listen("127.0.0.1", 0, 1) as here:
        port = here.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), SOON)
    with listen("", 0, 1) as everywhere:
        socket.create_connection(("127.0.0.2", everywhere.getsockname()[1]), SOON).close()


def test_a_stranger_who_hangs_up_before_he_is_let_in_keeps_nobody_waiting(listener):
    """`accept` would wait for the next one."""
    with closing(members(listener, SECRET, time.monotonic() + 0.05)) as coming:
        assert next(coming, None) is None
    start = time.monotonic()
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert time.monotonic() - start < 1.0
