"""Weight syncs: versions, syncs that are made up for, and links from rollouts to the syncs of their weights."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.sources import SmallSource

from vgen import (
    EngineStateError,
    Generation,
    ProfilingContext,
    Sampling,
    WeightSyncError,
)
from vgen.profiling import semconv
from vgen.testing import FakeEngine


def test_versions_count_up_or_are_the_callers(generation, engine):
    assert generation.weight_version == "0"
    assert generation.sync_weights().version == "1"
    assert generation.sync_weights(version="step-9").version == "step-9"
    assert engine.version == generation.generate([[1]])[0].weight_version == "step-9"
    assert generation.sync_weights().version == "3"


def test_a_resumed_run_continues_the_versions_and_the_steps(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, SmallSource(), weight_version="41", profiling=profiling)
    with profiling.step(41):
        assert generation.generate([[1]]).weight_version == "41"
        assert generation.sync_weights().version == "42"
    assert sink.rows[0][0] == 41


def test_a_sync_after_waking_is_not_done_twice(generation, engine):
    generation.sleep(2)
    generation.wake_up(["weights"])
    generation.sync_weights()
    generation.wake_up(["kv_cache"])
    generation.generate([[1]])
    assert engine.calls.count("load") == 1


def test_two_calls_that_find_stale_weights_bring_them_once(engine):
    engine.concurrent = True
    made, both = Generation(engine, SmallSource(), stale=True), threading.Barrier(2)
    exclude = made._lifecycle.exclusive_within_generation

    def exclude_after_meeting():
        both.wait(30)  # both have seen that the weights are stale
        return exclude()

    made._lifecycle.exclusive_within_generation = exclude_after_meeting
    with ThreadPoolExecutor() as pool:
        flights = [pool.submit(made.generate, [[1]]) for _ in range(2)]
        assert [len(flight.result(30)) for flight in flights] == [1, 1]
    assert engine.calls.count("load") == 1
    made.generate([[1]])
    assert engine.calls.count("load") == 1


@pytest.mark.fault(
    point="a weight sync of a generation",
    did="A sync fails",
    happens="Nothing is generated until the next sync succeeds",
    within=20,
)
def test_a_failed_sync_is_brought_back_by_the_next(generation, engine):
    engine.raises["load"] = WeightSyncError("gone", phase="load", parameter="a")
    with pytest.raises(WeightSyncError, match="parameter 'a'"):
        generation.sync_weights()
    with pytest.raises(EngineStateError, match="failed"):
        generation.generate([[1]])
    engine.raises.clear()
    generation.sync_weights()
    assert len(generation.generate([[1]])) == 1


def test_a_rollout_points_at_the_sync_that_made_its_weights(generation, engine, profiling, sink):
    generation.generate([[1]])
    with profiling.step(1):
        generation.sync_weights("a")
    with profiling.step(2):
        generation.generate([[1]])
        list(generation.stream([[1]]))
    engine.version = "b"  # nobody here has sent that
    generation.generate([[1]])
    before, first, streamed, foreign = sink.named(semconv.GENERATE)
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert not before.links
    for span in (first, streamed, foreign):
        (link,) = span.links
        assert (link.trace_id, link.span_id) == (sync.trace_id, sync.span_id)
        assert link.attributes == {semconv.WEIGHT_VERSION: "a"}
    assert first.trace_id != sync.trace_id


def test_weights_that_come_in_flight_are_pointed_at_as_well(sink):
    class Swapping(FakeEngine):
        """A server whose weights are replaced while it generates."""

        concurrent = True

        def _completion(self, request, sampling):
            generation.sync_weights("b")
            whole = super()._completion(request, sampling)
            return replace(whole, weight_version="b", weight_versions=[("a", 0, 1), ("b", 1, 2), ("c", 2, 3)])

    generation = Generation(Swapping(), SmallSource(), profiling=ProfilingContext([sink]))
    generation.sync_weights("a")
    rollouts = generation.generate([[1, 2, 3]], Sampling(max_tokens=3))
    assert rollouts.weight_version == "a"
    (generate,), (first, second) = sink.named(semconv.GENERATE), sink.named(semconv.WEIGHT_SYNC)
    assert [link.span_id for link in generate.links] == [first.span_id, second.span_id]
    (request,) = sink.named(semconv.REQUEST)
    assert (request.attributes[semconv.FIRST_VERSION], request.attributes[semconv.WEIGHT_VERSION]) == ("a", "b")


def test_only_the_last_syncs_are_remembered(sink):
    class Versioned(FakeEngine):
        """A server whose completions say which versions of the weights sampled them."""

        def _completion(self, request, sampling):
            versions = [(str(number), number, number + 1) for number in range(40)]
            return replace(super()._completion(request, sampling), weight_versions=versions)

    generation = Generation(Versioned(), SmallSource(), profiling=ProfilingContext([sink]))
    for number in range(40):
        generation.sync_weights(str(number))
    generation.generate([[1]])
    (generate,), syncs = sink.named(semconv.GENERATE), sink.named(semconv.WEIGHT_SYNC)
    assert generate.links[0].span_id == syncs[-1].span_id
    assert {link.span_id for link in generate.links} == {sync.span_id for sync in syncs[-16:]}


def test_present_weights_are_verified_without_a_sync(generation, engine, sink):
    generation.sync_weights(version="5")
    loads = engine.calls.count("load")
    report = generation.verify("bits")
    assert (report.how, report.tensors) == ("bits", len(engine.weights))
    assert (report.ratio, report.largest, report.mean) == (0, 0, 0)
    assert engine.calls.count("load") == loads
    assert engine.calls[-1] == "verify"
    span = sink.named(semconv.VERIFICATION)[-1]
    assert span.attributes[semconv.WEIGHT_VERSION] == "5"
    generation.source = [(name := "a", torch.ones(2))]
    engine.weights = {name: torch.zeros(2)}
    with pytest.raises(WeightSyncError, match="differs") as caught:
        generation.verify("bits")
    assert (caught.value.phase, caught.value.parameter) == ("verify", name)
    assert generation.state == "awake"  # the trainer may only have gone on
    assert generation.generate([[1]])


def test_weights_that_sleep_or_are_paused_cannot_be_verified_and_how_is_checked(generation):
    for stop, start in ((generation.sleep, generation.wake_up), (generation.pause, generation.resume)):
        stop()
        with pytest.raises(EngineStateError, match="verify"):
            generation.verify("bits")
        start()
    for how in ("logprobs", "none", "bytes"):
        with pytest.raises(ValueError, match="how must be one of bits"):
            generation.verify(how)


def test_the_report_says_how_a_sync_was_verified(generation, engine):
    assert generation.sync_weights().verified is None

    def sync(source, version, trace, verify=None):
        trace.set({semconv.VERIFY: "skipped"})

    engine.sync = sync
    assert generation.sync_weights().verified == "skipped"
