"""Calls of leader ranks that are threads, held at one step: who hears of what, in which order, and by when."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from vgen import Completion, ProfilingContext
from vgen.distributed import leader_ranks, rank_sockets
from vgen.distributed.placement import Placement
from vgen.distributed.rank_consensus import RankGroup
from vgen.distributed.ranks import RankPrompt
from vgen.errors import RankError
from vgen.profiling import semconv
from vgen.testing import MemorySink

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")
pytest.importorskip("torch", reason="torch is not installed")

from helpers.socket_ranks import on_leader_ranks

from vgen.distributed.rank_sockets import RankConnection


def one_each(prompts) -> list[Completion]:
    return [
        Completion(rank=p.rank, prompt_index=p.prompt_index, generation_index=0, token_ids=[p.rank]) for p in prompts
    ]


@pytest.mark.fault(
    point="a call of all ranks",
    did="Two ranks fail, one after the other",
    happens="Every rank raises the first error with its rank",
    within=20,
)
def test_of_two_ranks_errors_the_first_is_raised_on_the_leader(monkeypatch):
    """Rank 2 fails before rank 1, whose connection is looked at first."""
    second_has_failed, both_have_failed = threading.Event(), threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            if ranks.leading:
                assert both_have_failed.wait(5)
                call.raise_reported()
            elif ranks.index == 2:
                call.report(ValueError("the first"))
                second_has_failed.set()
            else:
                assert second_has_failed.wait(5)
                call.report(ValueError("the second"))
                both_have_failed.set()

    assert str(on_leader_ranks(monkeypatch, 3, work)[0]) == "the first"


def test_what_came_before_a_rank_asked_for_errors_is_not_lost(monkeypatch):
    sent = threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            if not ranks.leading:
                assert sent.wait(5)
                call.check()  # reads the leader's `done` and `data`
            call.lead(list)
            result = call.share(lambda: "shared")
            sent.set()
            return result

    assert on_leader_ranks(monkeypatch, 2, work) == ["shared", "shared"]


def test_a_rank_that_checks_hears_of_the_leaders_error(monkeypatch):
    failed = threading.Event()

    def work(ranks):
        with ranks.call("sync_weights") as call:
            call.gather([], {})
            if ranks.leading:
                call.report(ValueError("the receiver is full"))
                failed.set()
            else:
                assert failed.wait(5)
                call.check()

    assert str(on_leader_ranks(monkeypatch, 2, work)[1]) == "the receiver is full"


def test_a_rank_that_fails_second_raises_what_failed_first(monkeypatch):
    first = threading.Event()

    def work(ranks):
        with ranks.call("sync_weights") as call:
            call.gather([], {})
            if ranks.index == 1:
                call.report(ValueError("the cause"))
                first.set()
            elif ranks.index == 2:
                assert first.wait(5)
                return call.verdict(ValueError("a consequence"))
            else:
                assert first.wait(5)
                while True:
                    call.raise_reported()

    leader, _, second = on_leader_ranks(monkeypatch, 3, work)
    assert (str(leader), str(second)) == ("the cause", "the cause")


def test_the_others_wait_until_the_leader_has_sampled_and_have_nothing_themselves(monkeypatch):
    returned = threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            prompts = call.gather([RankPrompt(0, [1], rank=ranks.index)], {})

            def sample():
                assert not returned.wait(0.2)
                return one_each(prompts)

            sampled = call.lead(sample)
            if not ranks.leading:
                returned.set()
            call.scatter(sampled)
            return len(sampled)

    assert on_leader_ranks(monkeypatch, 2, work) == [2, 0]


def test_each_ranks_spans_say_how_many_bytes_it_sent_and_received(monkeypatch):
    sinks = [MemorySink(), MemorySink()]

    def work(ranks):
        own = [RankPrompt(0, list(range(100 * (ranks.index + 1))), rank=ranks.index)]
        with ranks.call("generate") as call:
            prompts = call.gather(own, {})
            call.scatter(call.lead(lambda: one_each(prompts)))
        profilers[ranks.index].flush()
        return {span.name: span.attributes[semconv.RANKS_BYTES] for span in sinks[ranks.index].spans}

    profilers = [ProfilingContext([sink]) for sink in sinks]
    original = leader_ranks.LeaderRanks.__init__

    def with_profiling(self, index, size, **more):
        original(self, index, size, **{**more, "profiling": profilers[index]})

    monkeypatch.setattr(leader_ranks.LeaderRanks, "__init__", with_profiling)
    leader, other = on_leader_ranks(monkeypatch, 2, work)
    assert leader == other
    assert set(leader) == {semconv.RANKS_GATHER, semconv.RANKS_SCATTER}
    assert min(leader.values()) > 30


@pytest.mark.fault(
    point="a call of all ranks",
    did="A rank is gone when its completions come",
    happens="`RankError` names it; the other ranks get theirs",
    within=20,
)
def test_a_rank_that_is_gone_when_its_completions_come_is_named_and_the_others_get_theirs(monkeypatch):
    gone = threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            prompts = call.gather([RankPrompt(0, [1], rank=ranks.index)], {})
            if ranks.index == 1:
                ranks.close()
                gone.set()
                return None
            sampled = call.lead(lambda: one_each(prompts))
            assert gone.wait(5)
            return [completion.token_ids for completion in call.scatter(sampled)]

    leader, _, third = on_leader_ranks(monkeypatch, 3, work)
    assert isinstance(leader, RankError)
    assert leader.rank == 1
    assert third == [[2]]


def test_a_message_within_less_than_a_second_is_waited_for(monkeypatch):
    def work(ranks):
        with ranks.call("generate") as call:
            if ranks.leading:
                call.tell("done")
                return None
            return call.wait("done", seconds=0.9)[0].kind

    assert on_leader_ranks(monkeypatch, 2, work) == [None, "done"]


@pytest.mark.fault(
    point="a call of all ranks",
    did="The leader is silent",
    happens="`RankError` after the given seconds",
    within=20,
)
def test_silence_is_an_error_after_the_seconds_that_were_given(monkeypatch):
    ended = threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            if ranks.leading:
                call._settled = True
                assert ended.wait(30)
                return None
            start = time.monotonic()
            with pytest.raises(RankError, match=r"rank 0 .* generate for 0\.3 s") as caught:
                call.wait("done", seconds=0.3)
            ended.set()
            return caught.value.rank, 0.25 < time.monotonic() - start < 10

    assert on_leader_ranks(monkeypatch, 2, work)[1] == (0, True)


# Connections ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    """The ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = RankConnection(socket.create_connection(listener.getsockname()))
        other = RankConnection(listener.accept()[0])
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("length", [0, 1, 3_000_000])
def test_both_ends_count_a_message_alike(two, length):
    one, other = two
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(other.receive, 10.0)
        sent = one.send(bytes(length), 10.0)
        content, size = received.result(10)
    assert (len(content), sent, size) == (length, length + 8, length + 8)


@pytest.mark.parametrize("begun", [b"", b"\0\0", b"\0" * 7 + b"\x05ab"])
@pytest.mark.fault(
    point="the ranks' connections",
    did="A peer stops in the middle of a message",
    happens="An error at the timeout; the connection is closed",
    within=20,
)
def test_a_peer_that_stops_within_a_message_costs_the_timeout_and_the_connection(two, begun):
    one, other = two
    one._socket.sendall(begun)
    start = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011
        other.receive(0.3)
    assert 0.25 < time.monotonic() - start < 10
    assert other.fileno() == -1


def test_a_connection_that_is_closed_is_ready_at_once(two):
    one, other = two
    start = time.monotonic()
    assert rank_sockets.ready({3: one}, 0.2) == []
    assert time.monotonic() - start >= 0.19
    other.send(b"x", 1.0)
    assert rank_sockets.ready({3: one}, 5.0) == [3]
    one.close()
    assert rank_sockets.ready({3: one, 4: other}, 5.0) == [3]


# Meeting -------------------------------------------------------------------------------------------------------------


class Group:
    """torch's collectives of objects, for ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.rank, self._barrier, self._objects = threading.local(), threading.Barrier(size, timeout=10), [None] * size

    def all_gather_object(self, into, value) -> None:
        self._objects[self.rank.number] = value
        self._barrier.wait()
        into[:] = self._objects
        self._barrier.wait()

    def broadcast_object_list(self, box, source) -> None:
        if self.rank.number == source:
            self._objects[0] = box[0]
        self._barrier.wait()
        box[0] = self._objects[0]


@pytest.fixture
def met(monkeypatch):
    """A function: what `meet` returns or raises on each of so many ranks."""
    import torch.distributed as dist

    def meet(size: int, channels: int = 2, port: int = 0, timeout: float = 10.0) -> list:
        group = Group(size)
        monkeypatch.setattr(dist, "all_gather_object", group.all_gather_object)
        monkeypatch.setattr(dist, "broadcast_object_list", group.broadcast_object_list)

        def run(rank: int):
            group.rank.number = rank
            try:
                return rank_sockets.meet(rank, size, channels, port, timeout)
            except RankError as error:
                return error

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(run, range(size)))

    return meet


def test_ranks_of_one_machine_meet_at_its_loopback_interface_and_each_channel_is_their_own(met, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    leader, *others = met(3)
    assert [sorted(by_rank) for by_rank in leader] == [[1, 2], [1, 2]]
    for rank, channels in enumerate(others, 1):
        assert [list(by_rank) for by_rank in channels] == [[0], [0]]
        for channel in (1, 0):
            channels[channel][0].send(f"{rank}/{channel}".encode(), 1.0)
        for channel in (0, 1):
            assert leader[channel][rank].receive(5.0)[0] == f"{rank}/{channel}".encode()
    for connection in (each for channels in (leader, *others) for by_rank in channels for each in by_rank.values()):
        connection.close()


def test_ranks_of_several_machines_meet_at_the_masters_address(met, monkeypatch):
    machines = iter([("one", ""), ("two", "")])
    asked = list[str]()
    monkeypatch.setattr(rank_sockets, "_machine", lambda: next(machines))
    monkeypatch.setenv("MASTER_ADDR", "the-master")
    listen = rank_sockets._listen
    monkeypatch.setattr(
        rank_sockets, "_listen", lambda host, port, backlog: (asked.append(host), listen("127.0.0.1", port, backlog))[1]
    )
    connect = rank_sockets.connect
    monkeypatch.setattr(
        rank_sockets,
        "connect",
        lambda address, *more: (asked.append(address[0]), connect(("127.0.0.1", address[1]), *more))[1],
    )
    met(2, channels=1)
    assert asked == ["the-master", "the-master"]


@pytest.mark.fault(
    point="the port of a server",
    did="The ranks' port is taken on rank 0",
    happens="`RankError` names the port on every rank",
    within=20,
)
def test_a_port_that_is_taken_is_named_on_every_rank(met):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        errors = met(3, port=port)
    assert [str(error).split(":")[0] for error in errors] == [f"rank 0 cannot listen on port {port}"] * 3
    assert [error.rank for error in errors] == [0, 0, 0]


def test_processes_of_one_host_in_different_containers_are_not_one_machine(monkeypatch):
    here = rank_sockets._machine()
    assert here == rank_sockets._machine()
    monkeypatch.setattr(os, "readlink", lambda path: "net:[another]")
    assert rank_sockets._machine() != here


def test_a_ranks_number_and_the_number_of_ranks_are_not_mixed_up(monkeypatch):
    made = []
    monkeypatch.setattr("vgen.distributed.placement.initialized", lambda: True)
    monkeypatch.setattr(leader_ranks, "LeaderRanks", lambda *numbers, **more: made.append((numbers, more)))
    placement = Placement.of(SimpleNamespace(process_index=3, num_processes=5))
    placement.leader_ranks(timeout=7.0, group_port=9, profiling=ProfilingContext.disabled())
    ((numbers, more),) = made
    assert numbers == (3, 5)
    assert (more["timeout"], more["group_port"]) == (7.0, 9)


def test_a_leader_that_closes_right_after_the_result_is_not_missed(monkeypatch):
    closed = threading.Event()

    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            if not ranks.leading:
                assert closed.wait(5)
                call.raise_reported()  # reads `done`, `data` and the end of the connection
            call.lead(list)
            result = call.share(lambda: "shared")
            ranks.close()
            closed.set()
            return result

    assert on_leader_ranks(monkeypatch, 2, work) == ["shared", "shared"]


def test_a_group_of_torchs_exchanges_values_and_errors_in_rank_order(monkeypatch):
    import torch.distributed as dist

    group = Group(2)
    monkeypatch.setattr(dist, "get_rank", lambda given: group.rank.number)
    monkeypatch.setattr(dist, "get_world_size", lambda given: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda into, value, group: into_all(into, value, group))

    def into_all(into, value, given):
        assert given == "the group"
        group.all_gather_object(into, value)

    def run(rank: int):
        group.rank.number = rank
        ranks = RankGroup("the group")
        values = ranks.gather(f"of rank {rank}"), ranks.any(rank == 1), ranks.any(False)
        if rank == 1:
            ranks.report(ValueError("no"))
            return values, None
        with pytest.raises(ValueError, match="no") as caught:
            ranks.confirm()
        return values, caught.value.__notes__

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    expected = (["of rank 0", "of rank 1"], True, False)
    assert found == [(expected, ["raised on rank 1"]), (expected, None)]
