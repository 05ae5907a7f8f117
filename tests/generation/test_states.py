"""The engine's states, its memory and the links to syncs, as telemetry."""

from __future__ import annotations

import threading
import time

import pytest

from vgen import EngineError, EngineStateError, ProfilingContext, Sampling
from vgen.engines.base import EngineState
from vgen.generation import Generation
from vgen.profiling import names
from vgen.profiling.reference import unknown
from vgen.testing import FakeEngine, MemorySink
from vgen.types import SleepReport


class Weights:
    bytes, tensors, seconds = 1000, 2, 0.0

    def __iter__(self):
        yield from (("a", None), ("b", None))


@pytest.fixture
def sink():
    return MemorySink()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def generation(engine, sink):
    return Generation(engine, Weights(), profiling=ProfilingContext([sink]))


def transitions(sink):
    return [
        (span.name, event.attributes[names.STATE_FROM], event.attributes[names.STATE])
        for span in sink.spans
        for event in span.events
        if event.name == names.STATE_CHANGED
    ]


def test_names_has_the_states_in_their_order():
    assert tuple(EngineState) == names.STATES


def test_every_transition_is_in_a_span_of_its_own_kind(generation, engine, sink):
    generation.pause()
    generation.sync_weights()
    generation.resume()
    generation.sleep(2)
    generation.wake_up(["weights"])
    generation.wake_up(["kv_cache"])
    generation.generate([[1]])  # restores the weights
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        generation.generate([[1]])
    generation.sync_weights()
    generation.close()
    assert transitions(sink) == [
        (names.PAUSE, "awake", "paused"),
        (names.WEIGHT_SYNC, "paused", "syncing"),
        (names.WEIGHT_SYNC, "syncing", "paused"),
        (names.RESUME, "paused", "awake"),
        (names.SLEEP, "awake", "asleep"),
        (names.WAKE_UP, "asleep", "waking"),
        (names.WAKE_UP, "waking", "asleep"),
        (names.WAKE_UP, "asleep", "waking"),
        (names.WAKE_UP, "waking", "awake"),
        (names.WEIGHT_SYNC, "awake", "syncing"),
        (names.WEIGHT_SYNC, "syncing", "awake"),
        (names.ENGINE_GENERATE, "awake", "failed"),
        (names.WEIGHT_SYNC, "failed", "syncing"),
        (names.WEIGHT_SYNC, "syncing", "awake"),
        (names.ENGINE_CLOSE, "awake", "closed"),
    ]
    recorded = [names.STATES[int(m.values[0])] for m in sink.measurements if m.instrument is names.ENGINE_STATE]
    assert recorded == [to for _, _, to in transitions(sink)]
    assert not unknown(sink.spans, sink.measurements)


def test_a_call_that_the_engine_refuses_leaves_the_state_as_it_was(generation, engine, sink):
    engine.raises["sleep"] = engine.raises["wake_up"] = EngineStateError("that", "beyond control", "name the servers")
    with pytest.raises(EngineStateError, match="beyond control"):
        generation.sleep()
    assert generation.state == EngineState.AWAKE
    del engine.raises["sleep"]
    generation.sleep(2)
    with pytest.raises(EngineStateError, match="beyond control"):
        generation.wake_up()
    assert generation.state == EngineState.ASLEEP
    assert generation._states.describe() == "asleep (level 2)"
    assert transitions(sink) == [
        (names.SLEEP, "awake", "asleep"),
        (names.SLEEP, "asleep", "awake"),
        (names.SLEEP, "awake", "asleep"),
        (names.WAKE_UP, "asleep", "waking"),
        (names.WAKE_UP, "waking", "asleep"),
    ]
    del engine.raises["wake_up"]
    generation.wake_up()
    assert generation.state == EngineState.AWAKE


def test_state_and_age_can_be_scraped_while_nothing_happens_and_while_a_call_lasts():
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider

    from vgen.profiling.sinks.otel import OTelSink

    reader = InMemoryMetricReader()
    profiling = ProfilingContext([OTelSink(TracerProvider(), MeterProvider([reader]))])

    def scrape():
        found = {}
        for resource in reader.get_metrics_data().resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points if metric.name.startswith("vgen.engine.s") else ():
                        found[metric.name, point.attributes[names.ENGINE_NUMBER]] = point.value
        return found

    held, here = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def sleep(self, level):
            here.set()
            assert held.wait(30)
            return super().sleep(level)

    one = Generation(Slow(), Weights(), profiling=profiling)
    other = Generation(FakeEngine(), Weights(), profiling=profiling)
    first, second = sorted({number for _, number in scrape()})[-2:]
    assert scrape()[names.ENGINE_STATE.name, first] == names.STATES.index("awake")
    before = scrape()[names.ENGINE_STATE_AGE.name, first]
    assert scrape()[names.ENGINE_STATE_AGE.name, first] > before >= 0  # without any call
    thread = threading.Thread(target=one.sleep)
    thread.start()
    assert here.wait(30)
    during = scrape()
    held.set()
    thread.join(30)
    assert during[names.ENGINE_STATE.name, first] == names.STATES.index("asleep")
    assert during[names.ENGINE_STATE_AGE.name, first] < 30
    assert during[names.ENGINE_STATE.name, second] == names.STATES.index("awake")  # each engine has its own
    assert during[names.STALLED.name, first] == 0
    other.close()
    assert scrape()[names.ENGINE_STATE.name, second] == names.STATES.index("closed")
    one.close()
    del one, other, thread
    deadline = time.monotonic() + 20
    while scrape() and time.monotonic() < deadline:  # until the stall watch's threads have ended
        time.sleep(0.05)
    assert not scrape()  # nothing is held


GIB = 1 << 30


def test_sleep_and_wake_say_what_was_expected_and_what_came_by_tag(generation, engine, sink):
    engine.reports["sleep"] = SleepReport(
        memory_freed=True,
        device_bytes=5 * GIB,
        host_bytes=2 * GIB,
        expected={"weights": 2 * GIB, "kv_cache": 3 * GIB},
        device_in_use=GIB,
    )
    engine.reports["wake_up"] = SleepReport(
        memory_freed=True, device_bytes=2 * GIB, host_bytes=GIB, expected={"weights": 2 * GIB}, taken={"weights": GIB}
    )
    generation.sleep(1)
    generation.wake_up(["weights"])
    slept, woke = sink.named(names.SLEEP)[0].attributes, sink.named(names.WAKE_UP)[0].attributes
    assert slept[names.SLEEP_LEVEL] == woke[names.SLEEP_LEVEL] == 1
    assert (slept[names.DEVICE_BYTES], slept[names.MEMORY_EXPECTED]) == (5 * GIB, 5 * GIB)
    assert (slept[names.WEIGHTS_EXPECTED], slept[names.KV_CACHE_EXPECTED]) == (2 * GIB, 3 * GIB)
    assert (slept[names.HOST_BYTES], slept[names.LEAKED]) == (2 * GIB, 0)
    assert woke[names.WAKE_TAGS] == ["weights"]
    assert (woke[names.WEIGHTS_BYTES], woke[names.WEIGHTS_EXPECTED]) == (GIB, 2 * GIB)
    assert woke[names.HOST_BYTES] == GIB
    assert names.KV_CACHE_BYTES not in woke
    assert names.KV_CACHE_EXPECTED not in woke


def test_an_engine_that_frees_nothing_says_that_and_no_bytes(generation, engine, sink):
    engine.reports |= {call: SleepReport(memory_freed=False) for call in ("sleep", "wake_up")}
    generation.sleep()
    generation.wake_up()
    for span in (*sink.named(names.SLEEP), *sink.named(names.WAKE_UP)):
        assert span.attributes[names.MEMORY_FREED] is False
        assert not {names.DEVICE_BYTES, names.MEMORY_EXPECTED, names.HOST_BYTES, names.LEAKED} & set(span.attributes)
    assert not [m for m in sink.measurements if m.instrument is names.LEAKED_TOTAL]


def test_what_later_sleeps_leave_in_use_is_a_leak_of_their_level(generation, engine, sink):
    for level, in_use in ((1, 1000), (2, 400), (1, 1000), (1, 1600), (1, 1200), (2, 400), (1, 1900), (2, 350)):
        engine.reports["sleep"] = SleepReport(memory_freed=True, device_in_use=in_use)
        generation.sleep(level)
        generation.wake_up()
    assert [span.attributes[names.LEAKED] for span in sink.named(names.SLEEP)] == [0, 0, 0, 600, 200, 0, 900, 0]
    leaked = [m for m in sink.measurements if m.instrument is names.LEAKED_TOTAL]
    assert [sum(m.values[0] for m in leaked if m.attributes[names.SLEEP_LEVEL] == n) for n in (1, 2)] == [900, 0]


def test_a_rollout_points_at_the_sync_that_made_its_weights(generation, engine, sink):
    profiling = generation._profiling
    generation.generate([[1]])
    with profiling.step(1):
        generation.sync_weights("a")
    with profiling.step(2):
        generation.generate([[1]])
        list(generation.stream([[1]]))
    engine.version = "b"  # nobody here has sent that
    generation.generate([[1]])
    before, first, streamed, foreign = sink.named(names.GENERATE)
    (sync,) = sink.named(names.WEIGHT_SYNC)
    assert not before.links
    for span in (first, streamed, foreign):
        (link,) = span.links
        assert (link.trace_id, link.span_id) == (sync.trace_id, sync.span_id)
        assert link.attributes == {names.WEIGHT_VERSION: "a"}
    assert first.trace_id != sync.trace_id


def test_weights_that_come_in_flight_are_pointed_at_as_well(sink):
    class Swapping(FakeEngine):
        """A server whose weights are replaced while it generates."""

        concurrent = True

        def _completion(self, request, sampling):
            from dataclasses import replace

            generation.sync_weights("b")
            whole = super()._completion(request, sampling)
            return replace(whole, weight_version="b", weight_versions=[("a", 0, 1), ("b", 1, 2), ("c", 2, 3)])

    generation = Generation(Swapping(), Weights(), profiling=ProfilingContext([sink]))
    generation.sync_weights("a")
    rollouts = generation.generate([[1, 2, 3]], Sampling(max_tokens=3))
    assert rollouts.weight_version == "a"
    (generate,), (first, second) = sink.named(names.GENERATE), sink.named(names.WEIGHT_SYNC)
    assert [link.span_id for link in generate.links] == [first.span_id, second.span_id]
    (request,) = sink.named(names.REQUEST)
    assert (request.attributes[names.FIRST_VERSION], request.attributes[names.WEIGHT_VERSION]) == ("a", "b")


def test_only_the_last_syncs_are_remembered(generation, sink):
    for number in range(40):
        generation.sync_weights(str(number))
    assert len(generation._made) == 16
    generation.generate([[1]])
    assert sink.named(names.GENERATE)[0].links[0].span_id == sink.named(names.WEIGHT_SYNC)[-1].span_id
