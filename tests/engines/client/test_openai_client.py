"""`/v1/completions`: order, seeds, timing and trace context."""

from __future__ import annotations

import pytest
from helpers.server_generation import COMPLETIONS, PROMPTS, generation, tokens

from vgen import (
    ProfilingContext,
    Sampling,
)
from vgen.generation.call_plan import request_seed
from vgen.profiling import semconv
from vgen.testing import MemorySink


def rebuilt(span):
    return span.attributes.get(semconv.REBUILT, False)


@pytest.mark.parametrize("request_timing", [True, False])
def test_completions_come_in_prompt_order(server, request_timing):
    with generation(server, request_timing=request_timing) as made:
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2), 2)
    assert tokens(rollouts) == [prompt[:2] for prompt in PROMPTS for _ in range(2)]
    assert all((completion.timing is not None) == request_timing for completion in rollouts)
    assert len([path for path, _, _ in server.seen if path == COMPLETIONS]) == (40 if request_timing else 1)
    if request_timing:
        assert rollouts[0].timing.e2e == pytest.approx(0.006)
        assert rollouts[0].timing.time_to_first_token == pytest.approx(0.003)


def test_each_completion_of_a_group_has_a_seed_of_its_own(server):
    with generation(server, request_timing=False) as made:
        made.generate(PROMPTS[:3], Sampling(seed=7), 2)
    seeds = {request_seed(7, place, generation) for place in range(3) for generation in range(2)}
    assert {body["seed"] for path, _, body in server.seen if path == COMPLETIONS} == seeds
    assert len(seeds) == 6


def test_the_open_spans_context_travels_with_every_request(server):
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with generation(server, profiling=profiling) as made, profiling.step(1):
        made.generate(PROMPTS[:3])
    (engine_span,) = sink.named(semconv.ENGINE_GENERATE)
    sent = {headers["traceparent"] for path, headers, _ in server.seen if path == COMPLETIONS}
    traced = {f"00-{span.trace_id}-{span.span_id}-01" for span in sink.named(semconv.REQUEST) if not rebuilt(span)}
    assert len(traced) == 2
    assert sent == {f"00-{engine_span.trace_id}-{engine_span.span_id}-00", *traced}


def test_likeliest_tokens_are_given_where_the_server_sent_more_than_the_sampled_one(server):
    def with_top(body):
        ids = body["prompt"][:1]
        top = [{"token_id:7": -1.5, "token_id:3": -0.25}]
        logprobs = {"token_logprobs": [-1.5], "top_logprobs": top}
        choice = {"index": 0, "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}
        return {"id": "cmpl", "choices": [choice], "metrics": None, "usage": {}}

    with generation(server) as made:
        (plain,) = made.generate([[7]], Sampling(max_tokens=1, logprobs=0))
        server.faults[COMPLETIONS] = [with_top]
        (top,) = made.generate([[7]], Sampling(max_tokens=1, logprobs=2))
    assert (plain.logprobs, plain.top_logprobs) == ([-0.5], None)
    assert (top.logprobs, top.top_logprobs) == ([-1.5], [[(3, -0.25), (7, -1.5)]])


def test_log_probabilities_of_a_prompt_are_those_of_its_own_tokens(server):
    def scored(body):
        ids = body["prompt"]
        positions = [None, *({str(token): {"logprob": -token / 10}, "99": {"logprob": -9.0}} for token in ids[1:])]
        choice = {"index": 0, "text": "", "token_ids": ids[:1], "finish_reason": "length", "prompt_logprobs": positions}
        return {"id": "cmpl", "choices": [choice], "metrics": None, "usage": {}}

    with generation(server) as made:
        made.sync_weights(verify="none")
        server.faults[COMPLETIONS] = [scored]
        (completion,) = made.generate([[7, 3, 5]], Sampling(max_tokens=1, logprobs=None, prompt_logprobs=0))
    assert completion.prompt_logprobs == [None, -0.3, -0.5]
