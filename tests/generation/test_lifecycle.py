"""The engine's states: which call may run when, and every transition in the telemetry."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sources import SmallSource
from helpers.waiting import wait_until

from vgen import (
    ArgumentError,
    EngineError,
    EngineStateError,
    Generation,
    ProfilingContext,
)
from vgen.engine_protocol import EngineState, PartlyAwake, StateMachine
from vgen.profiling import semconv
from vgen.profiling.semconv_docs import unknown
from vgen.testing import FakeEngine


def transitions(sink):
    return [
        (span.name, event.attributes[semconv.STATE_FROM], event.attributes[semconv.STATE])
        for span in sink.spans
        for event in span.events
        if event.name == semconv.STATE_CHANGED
    ]


def test_semconv_has_the_states_in_their_order():
    assert tuple(EngineState) == semconv.STATES


def test_the_state_machine_knows_every_transition():
    machine = StateMachine()
    with pytest.raises(EngineStateError, match="starting"):
        machine.move("sleep", EngineState.ASLEEP)
    machine.move("construction", EngineState.AWAKE)
    with pytest.raises(EngineStateError, match="awake"):
        machine.move("wake_up", EngineState.WAKING)
    machine.move("close", EngineState.CLOSED)
    for state in EngineState:
        with pytest.raises(EngineStateError):
            machine.move("anything", state)


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
        (semconv.PAUSE, "awake", "paused"),
        (semconv.WEIGHT_SYNC, "paused", "syncing"),
        (semconv.WEIGHT_SYNC, "syncing", "paused"),
        (semconv.RESUME, "paused", "awake"),
        (semconv.SLEEP, "awake", "asleep"),
        (semconv.WAKE_UP, "asleep", "waking"),
        (semconv.WAKE_UP, "waking", "asleep"),
        (semconv.WAKE_UP, "asleep", "waking"),
        (semconv.WAKE_UP, "waking", "awake"),
        (semconv.WEIGHT_SYNC, "awake", "syncing"),
        (semconv.WEIGHT_SYNC, "syncing", "awake"),
        (semconv.ENGINE_GENERATE, "awake", "failed"),
        (semconv.WEIGHT_SYNC, "failed", "syncing"),
        (semconv.WEIGHT_SYNC, "syncing", "awake"),
        (semconv.ENGINE_CLOSE, "awake", "closed"),
    ]
    recorded = [semconv.STATES[int(m.values[0])] for m in sink.measurements if m.instrument is semconv.ENGINE_STATE]
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
    with pytest.raises(EngineStateError, match=r"asleep \(level 2\)"):
        generation.generate([[1]])
    assert transitions(sink) == [
        (semconv.SLEEP, "awake", "asleep"),
        (semconv.SLEEP, "asleep", "awake"),
        (semconv.SLEEP, "awake", "asleep"),
        (semconv.WAKE_UP, "asleep", "waking"),
        (semconv.WAKE_UP, "waking", "asleep"),
    ]
    del engine.raises["wake_up"]
    generation.wake_up()
    assert generation.state == EngineState.AWAKE


@pytest.mark.parametrize("error", [OSError("no memory"), KeyboardInterrupt()])
@pytest.mark.fault(
    point="the engine's states",
    did="Device memory is full at `wake_up`",
    happens="The engine stays asleep; the same call succeeds later",
    within=20,
)
def test_a_wake_up_that_fails_can_be_tried_again(generation, engine, sink, error):
    generation.sleep(2)
    engine.raises["wake_up"] = error
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EngineError) as raised:
            generation.wake_up()
        assert generation.state is EngineState.ASLEEP
        assert sink.named(semconv.WAKE_UP)[-1].error == type(raised.value).__name__
    with pytest.raises(EngineStateError, match="wake_up"):
        generation.sync_weights()
    del engine.raises["wake_up"]
    generation.wake_up()
    assert generation.state is EngineState.AWAKE
    assert generation.generate([[1]])[0].token_ids
    assert "load" in engine.calls  # the sleep discarded the weights


@pytest.mark.fault(
    point="the engine's states",
    did="`wake_up` fails for the second of two tags",
    happens="The next call wakes the rest",
    within=20,
)
def test_a_wake_up_that_fails_half_way_goes_on_with_the_rest(generation, engine):
    generation.sleep()
    engine.raises["wake_up"] = PartlyAwake("3 bytes are still to be allocated, and 2 are free", ["weights"])
    with pytest.raises(EngineError, match=r"still asleep: kv_cache \(3 bytes .* free\)\. Free memory and call wake_up"):
        generation.wake_up()
    generation.sync_weights()  # the weights are awake
    del engine.raises["wake_up"]
    generation.wake_up(["kv_cache"])
    assert generation.state is EngineState.AWAKE


@pytest.mark.parametrize("call", ["sleep", "sync_weights"])
@pytest.mark.parametrize("error", [OSError("x"), KeyboardInterrupt()])
@pytest.mark.fault(
    point="the engine's states",
    did="An engine call raises",
    happens="The state is `failed`; the next calls say so",
    within=20,
)
def test_an_engine_call_that_raises_leaves_it_failed_with_a_red_span(generation, engine, sink, call, error):
    engine.raises["load" if call == "sync_weights" else call] = error
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else (EngineError, OSError)
    with pytest.raises(kind):
        getattr(generation, call)()
    assert generation.state is EngineState.FAILED
    with pytest.raises(EngineStateError, match=f"failed .{call} raised {type(error).__name__}"):
        generation.generate([[1]])
    assert sink.spans[-1].error in {type(error).__name__, "EngineError"} or sink.spans[-2].error


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
                        found[metric.name, point.attributes[semconv.ENGINE_NUMBER]] = point.value
        return found

    held, here = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def sleep(self, level):
            here.set()
            assert held.wait(30)
            return super().sleep(level)

    one = Generation(Slow(), SmallSource(), profiling=profiling)
    other = Generation(FakeEngine(), SmallSource(), profiling=profiling)
    first, second = sorted({number for _, number in scrape()})[-2:]
    assert scrape()[semconv.ENGINE_STATE.name, first] == semconv.STATES.index("awake")
    before = scrape()[semconv.ENGINE_STATE_AGE.name, first]
    assert scrape()[semconv.ENGINE_STATE_AGE.name, first] > before >= 0  # without any call
    thread = threading.Thread(target=one.sleep)
    thread.start()
    assert here.wait(30)
    during = scrape()
    held.set()
    thread.join(30)
    assert during[semconv.ENGINE_STATE.name, first] == semconv.STATES.index("asleep")
    assert during[semconv.ENGINE_STATE_AGE.name, first] < 30
    assert during[semconv.ENGINE_STATE.name, second] == semconv.STATES.index("awake")  # each engine has its own
    assert during[semconv.STALLED.name, first] == 0
    other.close()
    assert scrape()[semconv.ENGINE_STATE.name, second] == semconv.STATES.index("closed")
    one.close()
    del one, other, thread
    assert wait_until(lambda: not scrape(), 20)  # Nothing is kept alive once the stall watch's threads have ended.


@pytest.mark.parametrize("call", ["sync_weights", "generate", "sleep", "pause", "close"])
def test_an_open_stream_refuses_the_calls_that_need_the_engine(generation, engine, call):
    def refusal():
        with pytest.raises(
            EngineStateError, match=rf"{call} .*finish the stream's iterator, or call its close\(\)"
        ) as e:
            generation.generate([[1]]) if call == "generate" else getattr(generation, call)()
        return e.value.state

    stream = generation.stream([[1], [2]])
    next(stream)
    assert refusal() == "held by a stream that this thread has open"
    if call not in ("generate", "close", "sleep"):  # two wait for another thread; a sleep counts its calls
        states = []
        thread = threading.Thread(target=lambda: states.append(refusal()))
        thread.start()
        thread.join(30)
        assert states == ["held by a stream that another thread has open"]
    assert engine.calls == ["stream"]
    assert len(list(stream)) == 1
    generation.sync_weights()
    assert engine.calls == ["stream", "load", "reset_cache"]


def test_a_call_from_within_a_generation_says_that_it_must_wait_for_its_end(generation, engine):
    states = []

    def sync(_):
        with pytest.raises(EngineStateError, match=r"after generate\(\) has returned") as e:
            generation.sync_weights()
        states.append(e.value.state)

    generation.generate([[1]], on_completion=sync)
    assert states == ["generating in this thread"]
    generation.sync_weights()
    assert engine.calls == ["stream", "load", "reset_cache"]


def test_pause_keeps_calls_away_until_resume(generation, engine, sink):
    generation.pause("wait")
    assert generation.state is EngineState.PAUSED
    with pytest.raises(EngineStateError, match="resume"):
        generation.generate([[1]])
    generation.sync_weights()
    assert generation.state is EngineState.PAUSED
    generation.resume()
    assert len(generation.generate([[1]])) == 1
    assert engine.calls == ["pause", "load", "reset_cache", "resume", "stream"]
    assert [s.name for s in sink.spans if s.name in (semconv.PAUSE, semconv.RESUME)] == [semconv.PAUSE, semconv.RESUME]
    with pytest.raises(EngineStateError, match="awake"):
        generation.resume()


def test_waking_from_level_2_restores_the_weights_before_the_first_token(generation, engine, sink):
    generation.sleep(2)
    generation.wake_up()
    assert "load" not in engine.calls
    generation.generate([[1]])
    generation.generate([[1]])
    assert engine.calls == ["sleep", "wake_up", "load", "reset_cache", "stream", "stream"]
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert sync.parent.name == semconv.GENERATE
    assert sink.named(semconv.WAKE_UP)[0].attributes[semconv.RESTORED] is True


def test_level_1_keeps_the_weights(generation, engine):
    generation.sleep(1)
    generation.wake_up()
    generation.generate([[1]])
    assert "load" not in engine.calls


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.fault(
    point="the engine's states",
    did="`sleep` while other threads generate",
    happens="It waits or is refused; nothing is cut off",
    within=20,
)
def test_a_sleep_does_not_cut_off_what_other_threads_generate(engine, concurrent):
    engine.concurrent = concurrent
    made = Generation(engine, SmallSource())
    with ThreadPoolExecutor(1) as other:
        stream = made.stream([[1], [2]])
        other.submit(next, stream).result(30)
        for wait_seconds in (None, 0, 0.01):
            with pytest.raises(EngineStateError, match=r"generating for a call of another thread"):
                made.sleep(wait_seconds=wait_seconds)
        assert made.state is EngineState.AWAKE
        assert "sleep" not in engine.calls
        other.submit(stream.close).result(30)
    made.sleep(wait_seconds=0.01)
    assert made.state is EngineState.ASLEEP


@pytest.mark.parametrize("wrong", [{"level": 3}, {"level": "deep"}, {"wait_seconds": -1}, {"wait_seconds": "long"}])
def test_a_wrong_sleep_is_named(generation, wrong):
    with pytest.raises(ArgumentError, match=f"^{next(iter(wrong))} must be"):
        generation.sleep(**wrong)
    generation.sleep(wait_seconds=1)


def test_a_sleep_of_a_paused_engine_is_refused_at_once(generation):
    generation.pause()
    with pytest.raises(EngineStateError, match="resume"):
        generation.sleep(wait_seconds=1000)


@pytest.mark.fault(
    point="the engine's states",
    did="A forked child generates",
    happens="`EngineStateError` at once; the parent's engine goes on",
    within=60,
)
def test_a_forked_child_is_refused_at_once_and_closes_nothing(generation, engine):
    """As a data loader's worker that has inherited the generation object."""

    def child(connection):
        for call in (lambda: generation.generate([[1]]), generation.sync_weights, generation.sleep):
            try:
                call()
            except EngineStateError as error:
                connection.send(str(error))
        generation.close()
        connection.send(list(engine.calls))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    said = [ours.recv() for _ in range(4) if ours.poll(30)]
    process.join(30)
    assert process.exitcode == 0
    assert all("a forked child cannot use it" in each for each in said[:3])
    assert said[3] == []
    assert generation.generate([[1]])


@pytest.mark.parametrize("call", ["wake_up", "resume"])
def test_a_comparison_that_was_put_off_lies_beneath_the_call_that_makes_it(sink, profiling, call):
    class Engine(FakeEngine):
        def verify_deferred(self, trace):
            with trace.phase("verify"):
                trace.set({semconv.VERIFY: "logprobs"})

    generation = Generation(Engine(), SmallSource(), profiling=profiling)
    generation.generate([[1]])
    (generation.sleep if call == "wake_up" else generation.pause)()
    getattr(generation, call)()
    profiling.flush()
    (outer,) = sink.named(semconv.WAKE_UP if call == "wake_up" else semconv.RESUME)
    (verify,) = [span for span in sink.spans if span.name.endswith(".verify")]
    assert verify.parent_id == outer.span_id
    assert outer.attributes[semconv.VERIFY] == "logprobs"
