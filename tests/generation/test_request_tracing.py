"""Which requests of a call are traced into the engine, and when their spans end."""

from __future__ import annotations

import pytest

from vgen import Completion, ProfilingContext, PromptError, Sampling
from vgen.distributed.ranks import RankPrompt
from vgen.generation.call_plan import CallPlan, CallRequest, make_requests
from vgen.generation.request_tracing import TracedRequests
from vgen.profiling import semconv
from vgen.testing import MemorySink


@pytest.fixture
def sink():
    return MemorySink()


@pytest.fixture
def profiling(sink):
    with ProfilingContext([sink]) as profiling:
        yield profiling


def traced(profiling, span, count, rank=0):
    prompts = [RankPrompt(5, [1], rank=0), RankPrompt(5, [2], rank=1)]
    call = CallRequest([], Sampling(), 2)
    plan = CallPlan([], {}, make_requests(prompts, 2, None), call)
    return TracedRequests(profiling, span, plan, rank, count, str)


def answer(request, error=None):
    return Completion(
        rank=request.rank,
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=[1],
        error=error,
    )


def test_traced_requests_carry_their_own_span_and_the_others_their_parents(profiling, sink):
    with profiling.span("call") as span, traced(profiling, span, 2) as requests:
        batch = requests.batch()
        for request in batch.requests:
            requests.finish(answer(request))
    profiling.flush()
    spans = {of.span_id for of in sink.named(semconv.REQUEST)}
    contexts = [request.headers["traceparent"].split("-") for request in batch.requests]
    assert {parent for _, _, parent, flags in contexts if flags == "01"} == spans
    assert {parent for _, _, parent, flags in contexts if flags == "00"} == {span.span_id}
    assert len(spans) == 2


def test_another_ranks_request_is_traced_without_its_prompts_place(profiling, sink):
    with profiling.span("call") as span, traced(profiling, span, 4, rank=1) as requests:
        assert requests.own == {(5, 0), (5, 1)}
        for request in requests.batch().requests:
            requests.finish(answer(request))
    profiling.flush()
    places = [of.attributes.get(semconv.PROMPT_INDEX) for of in sink.named(semconv.REQUEST)]
    assert sorted(places, key=str) == [5, 5, None, None]


def test_what_is_still_open_ends_with_the_error_that_was_raised(profiling, sink):
    def call():
        with profiling.span("call") as span, traced(profiling, span, 4) as requests:
            first, second, *_ = requests.batch().requests
            requests.finish(answer(first))
            requests.finish(answer(second, PromptError(5, "is bad")))
            raise OSError("the engine is gone")

    with pytest.raises(OSError, match="gone"):
        call()
    profiling.flush()
    assert sorted(str(of.error) for of in sink.named(semconv.REQUEST)) == ["None", "OSError", "OSError", "PromptError"]


def test_nothing_is_traced_without_profiling(profiling):
    off = ProfilingContext.disabled()
    with off.span("call") as span, traced(off, span, 4) as requests:
        assert requests.own == set()
        assert len(requests.batch().requests) == 4
