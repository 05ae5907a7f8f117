"""`Generation`: the context, the step, and what needs a tokenizer."""

from __future__ import annotations

import pytest
from helpers.sources import SmallSource

from vgen import (
    ArgumentError,
    EngineStateError,
    Generation,
    ProfilingContext,
)
from vgen.profiling import Sink, semconv


def test_the_default_context_is_off_and_everything_works(engine):
    with Generation(engine, SmallSource()) as generation:
        assert [c.token_ids for c in generation.generate([[1, 2], [3]], num_generations=2)] == [[1, 2]] * 2 + [[3]] * 2
        assert generation.sync_weights().seconds > 0
        assert generation.sleep().seconds > 0
        assert generation.wake_up().seconds > 0
    assert engine.calls == ["stream", "load", "reset_cache", "sleep", "wake_up", "close"]


def test_a_sink_that_raises_everywhere_does_not_stop_generation(engine):
    class Bad(Sink):
        inline = True

        def on_start(self, span, attributes):
            raise OSError

        on_end = on_measurement = on_step = flush = close = lambda self, *_: 1 / 0

    with ProfilingContext([Bad()]) as profiling, Generation(engine, SmallSource(), profiling=profiling) as generation:
        for step in range(20):
            with profiling.step(step):
                assert len(generation.generate([[1]])) == 1
                generation.sync_weights()


def test_a_trainers_step_is_the_parent_although_the_contexts_are_copies(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, SmallSource(), profiling=profiling.bind(job="a"))
    with profiling.bind(loop="b").step(7):
        generation.generate([[1]])
    (generate,) = sink.named(semconv.GENERATE)
    assert generate.parent.name == semconv.STEP
    assert generate.attributes["job"] == "a"
    assert generate.attributes["loop"] == "b"
    assert generate.attributes[semconv.STEP_NUMBER] == 7


def test_score_wants_a_completion_for_each_prompt(generation):
    with pytest.raises(ArgumentError, match="one for each of 2 prompts, got 1"):
        generation.score([[1], [2]], [[3]])


def test_conversations_need_a_tokenizer(generation):
    with pytest.raises(TypeError, match="processing_class"):
        generation.chat([[{"role": "user", "content": "hi"}]])


async def test_asynchronous_generation_lies_beneath_the_open_span(engine, sink):
    profiling = ProfilingContext([sink])
    generation = Generation(engine, SmallSource(), profiling=profiling)
    with profiling.step(1):
        rollouts = await generation.agenerate([[1, 2]], num_generations=3)
    assert len(rollouts) == 3
    assert sink.named(semconv.GENERATE)[0].parent.name == semconv.STEP


async def test_a_closed_generation_object_refuses_asynchronous_calls_too(generation):
    assert len(await generation.agenerate([[1]])) == 1
    generation.close()
    with pytest.raises(EngineStateError, match="closed"):
        await generation.agenerate([[1]])
