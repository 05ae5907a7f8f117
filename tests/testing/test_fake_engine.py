"""`FakeEngine` behind a generation object: it records, answers and raises as its docstring says."""

from __future__ import annotations

import pytest

from vgen import EngineError, Sampling
from vgen.engine_protocol import EngineState, Source
from vgen.generation.generation import Generation
from vgen.testing import FakeEngine
from vgen.types import SleepReport


class Weights(Source):
    """Two named tensors; plain numbers, because the fake computes nothing."""

    def __iter__(self):
        yield from (("a", 1.0), ("b", 2.0))


def test_each_completion_is_its_prompt_cut_at_max_tokens():
    rollouts = Generation(FakeEngine(), Weights()).generate([[1, 2, 3], [4]], Sampling(max_tokens=2), 2)
    assert [completion.token_ids for completion in rollouts] == [[1, 2], [1, 2], [4], [4]]
    assert [completion.logprobs for completion in rollouts] == [[0.0, 0.0], [0.0, 0.0], [0.0], [0.0]]
    timing = rollouts[0].timing
    assert timing.e2e == pytest.approx(timing.queue + timing.prefill + timing.decode)


def test_it_records_its_calls_its_requests_and_the_weights_of_the_last_sync():
    engine = FakeEngine()
    generation = Generation(engine, Weights(), sleep_mode=True)
    generation.generate([[1, 2]], Sampling(seed=5), 2)
    assert [request.generation_index for request in engine.requests] == [0, 1]
    generation.sync_weights(version="next")
    assert (engine.weights, engine.version) == ({"a": 1.0, "b": 2.0}, "next")
    generation.pause()
    generation.resume()
    generation.sleep()
    generation.wake_up()
    generation.close()
    assert engine.calls == ["stream", "load", "reset_cache", "pause", "resume", "sleep", "wake_up", "close"]


def test_a_call_raises_the_error_that_was_chosen_for_it():
    engine = FakeEngine()
    generation = Generation(engine, Weights())
    engine.raises["reset_cache"] = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        generation.sync_weights()
    del engine.raises["reset_cache"]
    generation.sync_weights()
    engine.raises["stream"] = EngineError("out of memory")
    with pytest.raises(EngineError, match="out of memory"):
        generation.generate([[1]])
    assert generation.state is EngineState.FAILED


def test_sleep_and_wake_up_return_the_reports_of_the_test():
    engine = FakeEngine()
    generation = Generation(engine, Weights(), sleep_mode=True)
    assert generation.sleep().device_bytes == 1 << 20
    engine.reports["wake_up"] = SleepReport(memory_freed=True, device_bytes=7)
    assert generation.wake_up().device_bytes == 7


def test_it_has_the_limits_that_it_was_given():
    generation = Generation(FakeEngine(max_model_length=4, vocabulary_size=10), Weights())
    marked = generation.generate([[1] * 4, [10], [9]], Sampling(max_tokens=1), refused="mark")
    assert [completion.error is None for completion in marked] == [False, False, True]
