"""Members who know the secret find each other; strangers can neither read, write nor hold anybody up."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers.waiting import wait_until

from vgen import WeightSyncError
from vgen.weights.transports.collective import GroupMember
from vgen.weights.transports.rendezvous import Rendezvous, RendezvousStore

SOON = 10.0


def rendezvous(size: int = 2, *, port: int = 0, timeout: float = SOON) -> closing[Rendezvous]:
    return closing(Rendezvous("127.0.0.1", port, size, timeout))


def test_what_one_member_sets_another_gets_and_waits_for():
    with rendezvous() as meeting, ThreadPoolExecutor(1) as pool:
        zero, one = (RendezvousStore(meeting.description, rank) for rank in range(2))
        with closing(zero), closing(one):
            zero.set("a", b"\0first")
            assert one.get("a") == b"\0first"
            waits = pool.submit(lambda: (one.wait(["a", "b"], timedelta(seconds=SOON)), one.get("b")))
            zero.set("b", b"second")
            zero.set("a", b"changed")
            assert waits.result(SOON) == (None, b"second")
            assert one.get("a") == b"changed"


@pytest.mark.fault(
    point="a group that weights travel through",
    did="A member never comes",
    happens="The wait ends at its limit",
    within=60,
)
def test_a_key_that_nobody_sets_is_waited_for_until_the_limit():
    with rendezvous(1) as meeting, closing(RendezvousStore(meeting.description, 0)) as store:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not all members have come within 0\.2 s"):
            store.wait(["a"], timedelta(seconds=0.2))
        assert 0.2 <= time.monotonic() - start < SOON
        store.set("a", b"still of use")
        assert store.get("a") == b"still of use"


def test_whoever_waits_is_let_go_when_the_trainer_gives_up():
    with ThreadPoolExecutor(1) as pool:
        with rendezvous(1, timeout=300.0) as meeting:
            store = RendezvousStore(meeting.description, 0)
            waits = pool.submit(store.get, "a")
            wait_until(store._lock.locked)
        with closing(store), pytest.raises((TimeoutError, OSError)):
            waits.result(SOON)


def refused(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), SOON).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_listens_on_one_address_and_only_until_all_members_have_come():
    with rendezvous(timeout=300.0) as meeting:
        port = meeting.description["port"]
        assert refused("127.0.0.2", port)
        assert not refused("127.0.0.1", port)
        with closing(RendezvousStore(meeting.description, 0)):
            assert not refused("127.0.0.1", port)
            with closing(RendezvousStore(meeting.description, 1)):
                wait_until(lambda: refused("127.0.0.1", port))


def test_nobody_can_connect_once_the_trainer_has_given_up():
    with rendezvous(timeout=60.0) as meeting:
        description, start = meeting.description, time.monotonic()
    assert time.monotonic() - start < SOON
    assert refused("127.0.0.1", description["port"])
    with pytest.raises(ConnectionRefusedError):
        RendezvousStore(description, 1)


@pytest.mark.fault(
    point="a group that weights travel through",
    did="A stranger connects to the rendezvous",
    happens="It gets nothing",
    within=60,
)
def test_a_stranger_with_torchs_own_store_or_a_guessed_secret_gets_nothing():
    with rendezvous() as meeting:
        description: dict[str, Any] = meeting.description
        with closing(RendezvousStore(description, 0)) as member:
            member.set("0/0", b"true")
            store = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]
            with pytest.raises(Exception, match=r"(?i)tim|connect|closed|reset|recv|valid"):
                store("127.0.0.1", description["port"], None, False, timedelta(seconds=1)).set("0/0", b"false")
            with pytest.raises(OSError):  # noqa: PT011
                RendezvousStore({**description, "secret": "00" * 32, "timeout": 0.3}, 1)
            with socket.create_connection(("127.0.0.1", description["port"]), SOON) as stranger:
                stranger.recv(16, socket.MSG_WAITALL)
                stranger.sendall(bytes(8) + b"\x93\x91\xa30/0\xc4\x05false\xcb" + bytes(60))
                stranger.settimeout(SOON)
                try:
                    heard = stranger.recv(100)
                except ConnectionResetError:
                    heard = b""
            assert heard == b""
            assert member.get("0/0") == b"true"
            with closing(RendezvousStore(description, 1)) as other:
                assert other.get("0/0") == b"true"


def test_each_rendezvous_has_a_secret_of_its_own():
    with rendezvous() as one, rendezvous() as other:
        secrets = {one.description["secret"], other.description["secret"]}
    assert {len(secret) for secret in secrets} == {64}
    assert len(secrets) == 2


def test_a_port_that_is_taken_is_said():
    with rendezvous() as meeting:
        port = meeting.description["port"]
        with pytest.raises(
            WeightSyncError, match=f"cannot listen on 127.0.0.1, port {port}: .*choose another group_po"
        ):
            rendezvous(port=port)


def test_a_group_is_made_beside_strangers_and_again_on_the_same_port():
    port, silent = 0, []
    for value in (3.0, 4.0):
        with rendezvous(port=port) as meeting, ThreadPoolExecutor(2) as pool:
            description = {**meeting.description, "backend": "gloo"}
            port = description["port"]
            silent += [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
            start = time.monotonic()
            made = pool.map(lambda rank: GroupMember(description, rank, torch.device("cpu"), "127.0.0.1"), range(2))  # noqa: B023
            zero, one = made
            assert time.monotonic() - start < SOON
        sent, received = torch.full((5,), value), torch.zeros(5)
        under_way = zero.broadcast(sent)
        one.wait(one.broadcast(received))
        zero.wait(under_way)
        assert torch.equal(sent, received)
        zero.close()
        one.close()
    for stranger in silent:
        stranger.close()
