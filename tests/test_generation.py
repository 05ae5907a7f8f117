"""`Generation` around an engine without a model: states, faults, telemetry. The real engine is in tests/real."""

from __future__ import annotations

import pytest

from vgen import EngineError, EngineStateError, ProfilingContext, PromptError, Sampling, WeightSyncError
from vgen.engines.base import EngineState, StateMachine
from vgen.generation import Generation
from vgen.profiling import Sink, names
from vgen.testing import FakeEngine, MemorySink


class Weights:
    bytes, tensors, seconds = 1000, 2, 0.0

    def __iter__(self):
        yield from (("a", None), ("b", None))


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def sink():
    return MemorySink()


@pytest.fixture
def generation(engine, sink):
    return Generation(engine, Weights(), profiling=ProfilingContext([sink]))


def test_the_default_context_is_off_and_everything_works(engine):
    with Generation(engine, Weights()) as generation:
        assert [c.token_ids for c in generation.generate([[1, 2], [3]], num_generations=2)] == [[1, 2]] * 2 + [[3]] * 2
        assert generation.sync_weights().seconds > 0
        assert generation.sleep().seconds > 0
        assert generation.wake_up().seconds > 0
    assert engine.calls == ["stream", "load", "reset_cache", "sleep", "wake_up", "close"]


def test_memory_given_back_and_taken_is_counted(generation, sink):
    for _ in range(2):
        generation.sleep(2)
        generation.wake_up(["weights"])
        generation.wake_up(["kv_cache"])
    freed = [m for m in sink.measurements if m.instrument is names.SLEEP_FREED]
    assert [m.values for m in freed] == [(1 << 20,)] * 2
    assert freed[0].attributes[names.SLEEP_LEVEL] == 2
    taken = [m.values[0] for m in sink.measurements if m.instrument is names.WAKE_TAKEN]
    assert len(taken) == 4
    assert min(taken) > 0
    resident = [m.values[0] for m in sink.measurements if m.instrument is names.MEMORY_RESIDENT]
    assert len(resident) == 6
    assert min(resident) > 1e6


def test_a_sink_that_raises_everywhere_does_not_stop_generation(engine):
    class Bad(Sink):
        inline = True

        def on_start(self, span, attributes):
            raise OSError

        on_end = on_measurement = on_step = flush = close = lambda self, *_: 1 / 0

    with ProfilingContext([Bad()]) as profiling, Generation(engine, Weights(), profiling=profiling) as generation:
        for step in range(20):
            with profiling.step(step):
                assert len(generation.generate([[1]])) == 1
                generation.sync_weights()


def test_a_trainers_step_is_the_parent_although_the_contexts_are_copies(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, Weights(), profiling=profiling.bind(job="a"))
    with profiling.bind(loop="b").step(7):
        generation.generate([[1]])
    (generate,) = sink.named(names.GENERATE)
    assert generate.parent.name == names.STEP
    assert generate.attributes["job"] == "a"
    assert generate.attributes["loop"] == "b"
    assert generate.attributes[names.STEP_NUMBER] == 7


def test_versions_count_up_or_are_the_callers(generation, engine):
    assert generation.weight_version == "0"
    assert generation.sync_weights().version == "1"
    assert generation.sync_weights(version="step-9").version == "step-9"
    assert engine.version == generation.generate([[1]])[0].weight_version == "step-9"
    assert generation.sync_weights().version == "3"


def test_a_resumed_run_continues_the_versions_and_the_steps(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, Weights(), weight_version="41", profiling=profiling)
    with profiling.step(41):
        assert generation.generate([[1]]).weight_version == "41"
        assert generation.sync_weights().version == "42"
    assert sink.rows[0][0] == 41


def test_waking_from_level_2_restores_the_weights_before_the_first_token(generation, engine, sink):
    generation.sleep(2)
    generation.wake_up()
    assert "load" not in engine.calls
    generation.generate([[1]])
    generation.generate([[1]])
    assert engine.calls == ["sleep", "wake_up", "load", "reset_cache", "stream", "stream"]
    (sync,) = sink.named(names.WEIGHT_SYNC)
    assert sync.parent.name == names.GENERATE
    assert sink.named(names.WAKE_UP)[0].attributes[names.RESTORED] is True


def test_a_sync_after_waking_is_not_done_twice(generation, engine):
    generation.sleep(2)
    generation.wake_up(["weights"])
    generation.sync_weights()
    generation.wake_up(["kv_cache"])
    generation.generate([[1]])
    assert engine.calls.count("load") == 1


def test_level_1_keeps_the_weights(generation, engine):
    generation.sleep(1)
    generation.wake_up()
    generation.generate([[1]])
    assert "load" not in engine.calls


@pytest.mark.parametrize("call", ["sleep", "wake_up", "sync_weights"])
@pytest.mark.parametrize("error", [OSError("x"), KeyboardInterrupt()])
def test_an_engine_call_that_raises_leaves_it_failed_with_a_red_span(generation, engine, sink, call, error):
    if call == "wake_up":
        generation.sleep()
    engine.raises["load" if call == "sync_weights" else call] = error
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else (EngineError, OSError)
    with pytest.raises(kind):
        getattr(generation, call)()
    assert generation.state is EngineState.FAILED
    with pytest.raises(EngineStateError, match=f"failed .{call} raised {type(error).__name__}"):
        generation.generate([[1]])
    assert sink.spans[-1].error in {type(error).__name__, "EngineError"} or sink.spans[-2].error


def test_a_failed_sync_is_brought_back_by_the_next(generation, engine):
    engine.raises["load"] = WeightSyncError("gone", phase="load", parameter="a")
    with pytest.raises(WeightSyncError, match="parameter 'a'"):
        generation.sync_weights()
    with pytest.raises(EngineStateError, match="failed"):
        generation.generate([[1]])
    engine.raises.clear()
    generation.sync_weights()
    assert len(generation.generate([[1]])) == 1


def test_an_engine_that_breaks_while_generating_is_failed(generation, engine):
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        generation.generate([[1]])
    assert generation.state is EngineState.FAILED


def test_a_refused_parameter_is_not_the_engines_fault(generation, engine):
    engine.raises["stream"] = ValueError("bad parameter")
    with pytest.raises(ValueError, match="bad parameter"):
        generation.generate([[1]])
    assert generation.state is EngineState.AWAKE


def test_text_needs_a_tokenizer(generation):
    with pytest.raises(TypeError, match="prompt 1 is text"):
        generation.generate([[1], "two"])


def test_prompt_errors_hold_no_prompt(generation):
    with pytest.raises(PromptError) as caught:
        generation.generate([[7777777]])
    assert "7777777" not in str(caught.value)
    assert caught.value.limit == 100


def test_no_prompts_at_all(generation):
    assert len(generation.generate([])) == 0
    assert len(generation.generate([[]], refused="mark")) == 1


def test_num_generations_and_level_are_checked(generation):
    with pytest.raises(ValueError, match="num_generations"):
        generation.generate([[1]], num_generations=0)
    with pytest.raises(ValueError, match="level"):
        generation.sleep(3)


def test_only_the_slowest_requests_become_spans_and_all_are_counted(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, Weights(), profiling=profiling, request_spans=3, traced_requests=0)
    with profiling.step(1) as row:
        generation.generate([[1, 2]] * 10, Sampling(max_tokens=2))
    assert len(sink.named(names.REQUEST)) == 3
    assert row.summary()["vgen.request.e2e.count"] == 10
    assert "vgen.request.duration.count" not in row.summary()  # three of ten are no distribution
    assert row.summary()["vgen.generate.output_tokens"] == 20


def test_nothing_recorded_holds_a_prompt_or_a_completion(engine, sink):
    generation = Generation(engine, Weights(), profiling=ProfilingContext([sink]))
    generation.generate([[41, 42, 43]], Sampling(max_tokens=3))
    for span in sink.spans:
        for value in span.attributes.values():
            assert value not in ([41, 42, 43], (41, 42, 43), 41, 42, 43)


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


def test_a_stream_yields_each_completion_and_leaves_its_span(generation, engine, sink):
    found = list(generation.stream([[1], [], [3, 4]], num_generations=2, refused="mark"))
    assert sorted((c.prompt_index, c.generation_index) for c in found) == [(p, g) for p in range(3) for g in range(2)]
    assert [c.error is not None for c in found[:2]] == [True, True]
    (span,) = sink.named(names.GENERATE)
    assert span.attributes[names.COMPLETIONS] == 4
    assert names.REBUILT not in span.attributes


def test_no_span_is_open_while_the_caller_has_a_streams_completion_in_hand(engine):
    profiling = ProfilingContext()
    generation = Generation(engine, Weights(), profiling=profiling)
    with profiling.span("mine") as mine:
        for _ in generation.stream([[1], [2]]):
            assert profiling.current_span() is mine


def test_while_a_stream_is_open_its_thread_is_refused_and_closing_it_frees_the_engine(generation):
    stream = generation.stream([[1], [2]])
    next(stream)
    for call in (lambda: generation.generate([[1]]), generation.sync_weights, lambda: list(generation.stream([[1]]))):
        with pytest.raises(EngineStateError):
            call()
    stream.close()
    assert len(generation.generate([[1]])) == 1


def test_a_stream_that_breaks_fails_the_engine_and_its_span(generation, engine, sink):
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        list(generation.stream([[1]]))
    assert generation.state is EngineState.FAILED
    assert sink.named(names.GENERATE)[0].error == "EngineError"


async def test_asynchronous_generation_lies_beneath_the_open_span(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, Weights(), profiling=profiling)
    with profiling.step(1):
        rollouts = await generation.agenerate([[1, 2]], num_generations=3)
    assert len(rollouts) == 3
    assert sink.named(names.GENERATE)[0].parent.name == names.STEP


def test_score_wants_a_completion_for_each_prompt(generation):
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        generation.score([[1], [2]], [[3]])


def test_conversations_need_a_tokenizer(generation):
    with pytest.raises(TypeError, match="processing_class"):
        generation.chat([[{"role": "user", "content": "hi"}]])


@pytest.mark.parametrize(("asked", "traced"), [(0, 0), (2, 2), (99, 20), (lambda step: 3 if step == 1 else 0, 3)])
def test_random_requests_are_traced_from_their_dispatch_and_the_engine_is_told_of_no_other(engine, sink, asked, traced):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, Weights(), profiling=profiling, request_spans=0, traced_requests=asked)
    with profiling.step(1):
        generation.generate([[1, 2]] * 10, Sampling(max_tokens=2), 2)
    (engine_span,) = sink.named(names.ENGINE_GENERATE)
    requests = sink.named(names.REQUEST)
    sent = [request.headers["traceparent"] for request in engine.requests]
    assert sorted(parent for parent in sent if parent.endswith("-01")) == sorted(
        f"00-{span.trace_id}-{span.span_id}-01" for span in requests
    )
    assert len(requests) == traced
    assert {parent for parent in sent if parent.endswith("-00")} <= {
        f"00-{engine_span.trace_id}-{engine_span.span_id}-00"
    }
    for span in requests:
        assert span.parent is engine_span
        assert span.attributes[names.OUTPUT_TOKENS] == 2
        assert engine_span.start_ns <= span.start_ns <= span.end_ns <= engine_span.end_ns
    assert len({(s.attributes[names.PROMPT_INDEX], s.attributes[names.GENERATION_INDEX]) for s in requests}) == traced


def test_a_traced_request_that_the_engine_loses_ends_with_the_error(engine, sink):
    generation = Generation(engine, Weights(), profiling=ProfilingContext([sink]))
    engine.raises["stream"] = EngineError("gone")
    with pytest.raises(EngineError):
        generation.generate([[1]])
    (request,) = sink.named(names.REQUEST)
    assert request.error == "EngineError"


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
    assert [s.name for s in sink.spans if s.name in (names.PAUSE, names.RESUME)] == [names.PAUSE, names.RESUME]
    with pytest.raises(EngineStateError, match="awake"):
        generation.resume()
