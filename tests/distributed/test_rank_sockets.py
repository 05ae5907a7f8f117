"""One connection between two ranks."""

from __future__ import annotations

import socket

import pytest

from vgen.distributed.rank_sockets import RankConnection


def send_until_it_fails(connection: RankConnection) -> None:
    for _ in range(100):
        try:
            connection.send(b"error", 1.0)
        except OSError:
            return
    raise AssertionError("the peer is gone, and all sends went well")


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
