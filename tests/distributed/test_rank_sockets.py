"""Connections between ranks: how they come about, and how one ends."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from vgen import RankError
from vgen.distributed import rank_sockets
from vgen.distributed.rank_sockets import RankConnection

SECRET = bytes(range(32))


def send_until_it_fails(connection: RankConnection) -> None:
    for _ in range(100):
        try:
            connection.send(b"error", 1.0)
        except OSError:
            return
    raise AssertionError("the peer is gone, and all sends went well")


@pytest.mark.fault(
    point="the ranks' connections",
    did="The peer reports an error and is gone",
    happens="Its report is still read",
    within=20,
)
def test_the_last_words_of_a_peer_that_is_gone_are_heard_after_a_send_that_failed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = RankConnection(socket.create_connection(listener.getsockname()))
        peer = RankConnection(listener.accept()[0])
    here.send(b"error", 1.0)  # never read, so that the peer's end is a reset
    peer.send(b"why", 1.0)
    peer.close()
    send_until_it_fails(here)
    assert here.receive(1.0)[0] == b"why"
    with pytest.raises(OSError):  # noqa: PT011
        here.receive(1.0)
    here.close()


def test_every_rank_is_connected_once_for_each_channel_whoever_else_connects():
    with rank_sockets._listen("127.0.0.1", 0, 8) as listener, ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        address = listener.getsockname()
        strangers = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        strangers[0].sendall(SECRET[::-1] + bytes(8))
        start = time.monotonic()
        accepted = pool.submit(rank_sockets._accept, listener, 3, 2, SECRET, 60.0)
        others = list(pool.map(lambda rank: rank_sockets._connect(rank, 2, address, SECRET, 60.0), (1, 2)))
        by_channel = accepted.result(10)
        assert time.monotonic() - start < 20  # who waited for a stranger would wait for a minute
        assert [sorted(by_rank) for by_rank in by_channel] == [[1, 2], [1, 2]]
        for rank, channels in enumerate(others, 1):
            for channel, connections in enumerate(channels):
                connections[0].send(f"{rank} {channel}".encode(), 1.0)
                assert by_channel[channel][rank].receive(1.0)[0] == f"{rank} {channel}".encode()


@pytest.mark.fault(
    point="the ranks' connections",
    did="Strangers and another job's rank connect",
    happens="They are let go within the deadline",
    within=60,
)
def test_strangers_and_other_jobs_ranks_do_not_move_the_deadline():
    with rank_sockets._listen("127.0.0.1", 0, 8) as listener, ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        address = listener.getsockname()
        for _ in range(5):
            stack.enter_context(socket.create_connection(address))
        start = time.monotonic()
        other_job = pool.submit(rank_sockets._connect, 1, 1, address, SECRET[::-1], 0.5)
        with pytest.raises(RankError, match=r"ranks 1, 2 did not connect within 0\.5 s"):
            rank_sockets._accept(listener, 3, 1, SECRET, 0.5)
        assert time.monotonic() - start < 10
        listener.close()
        with pytest.raises(RankError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1, port {address[1]}"):
            other_job.result(10)


def test_a_member_with_a_number_that_no_rank_has_is_let_go():
    with rank_sockets._listen("127.0.0.1", 0, 8) as listener, ThreadPoolExecutor(3) as pool:
        address = listener.getsockname()
        accepted = pool.submit(rank_sockets._accept, listener, 2, 1, SECRET, 10.0)
        for rank, channels in ((7, 1), (0, 1)):
            connection = rank_sockets._connect(rank, channels, address, SECRET, 10.0)[0][0]
            with pytest.raises(OSError):  # noqa: PT011
                connection.receive(5.0)
        rank_sockets._connect(1, 1, address, SECRET, 10.0)
        assert [list(by_rank) for by_rank in accepted.result(10)] == [[1]]


@pytest.mark.parametrize(
    ("name", "elsewhere"), [("127.0.0.1", False), ("127.0.0.2", True), ("no.such.name.invalid", True), ("own", False)]
)
def test_the_leader_listens_where_the_other_ranks_look_for_it(name, elsewhere):
    """A name that means the loopback interface here means something else on the other machines."""
    if name == "own":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("203.0.113.1", 9))
            except OSError:
                pytest.skip("this machine has the loopback interface alone")
            name = probe.getsockname()[0]
    with rank_sockets._listen(name, 0, 1) as listener:
        port = listener.getsockname()[1]
        with ExitStack() if elsewhere else pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.3", port), 5.0).close()
