"""An engine that rank 0 has and all ranks call: facts, reports, syncs and what fails."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from vgen import EngineError, EngineVerification, Sampling, WeightSyncError, WeightVerification
from vgen.engine_protocol import Batch, Request, Source
from vgen.errors import RankError
from vgen.testing import FakeEngine
from vgen.weights import source_of

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from helpers.socket_ranks import on_leader_ranks

from vgen.engines.leader_engine import LeaderEngine


class Trace:
    @contextmanager
    def phase(self, name, /):
        yield None

    def set(self, attributes, /):
        pass


class Weights(Source):
    """A source that counts how far its passes got; with a barrier, each tensor takes all ranks, like a collective."""

    def __init__(
        self, *, collective: bool = True, fails_at: int | None = None, barrier: threading.Barrier | None = None
    ) -> None:
        self.was_collective, self._fails_at, self._barrier, self.seen = collective, fails_at, barrier, 0

    def __iter__(self):
        for number in range(4):
            if number == self._fails_at:
                raise OSError("lost its shard")
            if self._barrier is not None:
                self._barrier.wait(5.0)
            self.seen += 1
            yield f"layer.{number}", number


def engines(monkeypatch, work, size=2, make=FakeEngine):
    return on_leader_ranks(monkeypatch, size, lambda ranks: work(LeaderEngine(ranks, make), ranks))


def test_all_ranks_know_the_engines_facts(monkeypatch):
    facts = engines(monkeypatch, lambda engine, _: (engine.kind, engine.max_model_length, engine.verifications), 3)
    assert facts == [("fake", 64, ("bits", "none"))] * 3


def test_an_engine_that_cannot_be_made_raises_on_all_ranks(monkeypatch):
    def make():
        raise EngineError("no server there")

    errors = engines(monkeypatch, lambda *_: None, make=make)
    assert [str(error) for error in errors] == ["no server there"] * 2


def test_only_the_leader_drives_the_engine(monkeypatch):
    def work(engine, ranks):
        report = engine.sleep(1)
        engine.wake_up(["weights", "kv_cache"])
        engine.pause("keep")
        engine.resume()
        return report.device_bytes, engine.inner.calls if ranks.leading else None

    (freed, calls), (others, _) = engines(monkeypatch, work)
    assert freed == others == 1 << 20
    assert calls == ["sleep", "wake_up", "pause", "resume"]


def test_another_rank_has_no_engine_to_stream_from(monkeypatch):
    def work(engine, ranks):
        return [c.token_ids for c in engine.stream(Batch([Request(0, 0, [1, 2], None)], Sampling()))]

    zero, one = engines(monkeypatch, work)
    assert zero == [[1, 2]]
    assert isinstance(one, EngineError)
    assert "only rank 0 has the engine, and this is rank 1" in str(one)


def sync(monkeypatch, sources, prepare=lambda engine: None):
    """What a sync raises and how many tensors were taken, on each rank; and the weights that the engine got."""

    def work(engine, ranks):
        if ranks.leading:
            prepare(engine.inner)
        try:
            engine.sync(sources[ranks.index], "a", Trace())
            return None
        except Exception as error:
            return error

    errors = engines(monkeypatch, work)
    return errors, [source.seen for source in sources]


class Partial(FakeEngine):
    """Takes one tensor, then fails."""

    def sync(self, source, version, trace, verify=None):
        for _ in source:
            raise WeightSyncError("the server is full", phase="transfer", receiver="a server")


def test_all_ranks_iterate_a_collective_source(monkeypatch):
    barrier = threading.Barrier(2)
    assert sync(monkeypatch, [Weights(barrier=barrier), Weights(barrier=barrier)]) == ([None, None], [4, 4])


def test_a_plain_source_is_the_leaders_alone(monkeypatch):
    assert sync(monkeypatch, [Weights(collective=False), Weights(collective=False)]) == ([None, None], [4, 0])


@pytest.mark.fault(
    point="the workers of one engine in several processes",
    did="The receiver leaves a pass of a sharded source",
    happens="All ranks finish the pass",
    within=20,
)
def test_a_pass_that_the_receiver_leaves_is_finished_on_all_ranks(monkeypatch):
    barrier = threading.Barrier(2)
    sources = [Weights(barrier=barrier), Weights(barrier=barrier)]

    def work(engine, ranks):
        engine.sync(sources[ranks.index], "a", Trace())

    errors = engines(monkeypatch, work, make=Partial)
    assert [(type(error), error.problem) for error in errors] == [(WeightSyncError, "the server is full")] * 2
    assert [source.seen for source in sources] == [4, 4]


@pytest.mark.parametrize("collective", [True, False])
def test_a_verification_runs_on_all_ranks_and_each_gets_the_report(monkeypatch, collective):
    sources, probed = [Weights(collective=collective) for _ in range(2)], []
    report = WeightVerification(
        how="logprobs", engines=(EngineVerification(engine="a", ratio=0.5, decoded_ratio=0.1, largest=2.0, mean=1.0),)
    )

    class Verified(FakeEngine):
        def verify(self, source, how, trace):
            assert how == "logprobs"
            source.probe_logprobs([1, 2], 2**-9)
            return report

    for rank, source in enumerate(sources):
        source.probe_logprobs = lambda token_ids, unit, rank=rank: probed.append((rank, token_ids, unit))

    def work(engine, ranks):
        return engine.verify(sources[ranks.index], "logprobs", Trace())

    assert engines(monkeypatch, work, make=Verified) == [report, report]
    assert sorted(probed) == [(rank, [1, 2], 2**-9) for rank in range(2 if collective else 1)]


def test_a_verification_that_finds_a_difference_raises_on_all_ranks(monkeypatch):
    def work(engine, ranks):
        engine.sync(source_of([("layer.0", torch.zeros(1))]), "1", Trace())
        with pytest.raises(WeightSyncError) as caught:
            engine.verify(source_of([("layer.0", torch.ones(1))]), "bits", Trace())
        return caught.value.phase, caught.value.parameter

    assert engines(monkeypatch, work) == [("verify", "layer.0")] * 2


@pytest.mark.slow
def test_a_source_that_fails_on_one_rank_is_named_on_all(monkeypatch):
    barrier = threading.Barrier(2)
    errors, _ = sync(monkeypatch, [Weights(barrier=barrier), Weights(fails_at=2, barrier=barrier)])
    for error in errors:
        assert isinstance(error, WeightSyncError)
        assert (error.phase, error.receiver) == ("gather", "rank 1")
        assert "lost its shard" in error.problem


def test_an_interrupted_leader_is_a_rank_error_elsewhere(monkeypatch):
    def work(engine, ranks):
        if ranks.leading:
            engine.inner.raises["pause"] = KeyboardInterrupt()
        engine.pause("keep")

    zero, one = engines(monkeypatch, work)
    assert isinstance(zero, KeyboardInterrupt)
    assert (type(one), str(one)) == (RankError, "rank 0 raised KeyboardInterrupt")
