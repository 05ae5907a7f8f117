"""What vLLM reports about a finished request, as a completion."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest

from vgen.engine_protocol import Request
from vgen.engines.vllm_outputs import completion_of, timing_of

REQUEST = Request(3, 1, [7, 8], None, rank=2)


def flat(*positions: list[tuple[int, float, int]]) -> SimpleNamespace:
    """Lists as in vLLM's `FlatLogprobs`: at each position `(token id, log-probability, rank)`, its own token first."""
    entries = [entry for position in positions for entry in position]
    ends = [sum(map(len, positions[: index + 1])) for index in range(len(positions))]
    starts = [end - len(position) for end, position in zip(ends, positions, strict=True)]
    tokens, logprobs, ranks = (list(column) for column in zip(*entries, strict=True))
    return SimpleNamespace(start_indices=starts, end_indices=ends, token_ids=tokens, logprobs=logprobs, ranks=ranks)


def output(**changes) -> SimpleNamespace:
    result = {
        "token_ids": (5, 6),
        "logprobs": flat([(5, -0.5, 2), (9, -0.25, 1), (5, -0.5, 2)], [(6, math.nan, 1), (6, math.nan, 1)]),
        "finish_reason": "length",
        "weight_versions": [SimpleNamespace(version="a", start=0, end=1), SimpleNamespace(version="b", start=1, end=2)],
    }
    whole = {
        "request_id": "vgen-1",
        "prompt_token_ids": [7, 8],
        "prompt_logprobs": flat([], [(8, -1.5, 1)]),
        "metrics": None,
        "num_cached_tokens": None,
    }
    result |= {name: changes.pop(name) for name in list(changes) if name in result}
    return SimpleNamespace(outputs=[SimpleNamespace(**result)], **whole | changes)


def test_a_completion_has_everything_that_vllm_reports_under_its_requests_numbers():
    completion = completion_of(REQUEST, output(), top=True)
    assert completion.key == (2, 3, 1)
    assert (completion.token_ids, completion.logprobs) == ([5, 6], [-0.5, None])
    assert completion.top_logprobs == [[(9, -0.25), (5, -0.5)], [(6, None)]]
    assert completion.prompt_logprobs == [None, -1.5]
    assert (completion.weight_version, completion.weight_versions) == ("b", [("a", 0, 1), ("b", 1, 2)])
    assert (completion.finish_reason, completion.request_id, completion.timing) == ("length", "vgen-1", None)


def test_one_log_probability_for_each_token_is_taken_as_it_is():
    plain = flat([(5, -0.5, 1)], [(6, -0.25, 1)])
    completion = completion_of(REQUEST, output(logprobs=plain), top=False)
    assert completion.logprobs is plain.logprobs


def test_as_many_log_probabilities_as_tokens_that_are_not_one_for_each_are_told_apart():
    lopsided = flat([], [(6, -0.25, 1), (9, -3.0, 2)])
    assert completion_of(REQUEST, output(logprobs=lopsided), top=False).logprobs == [None, -0.25]


def test_fewer_log_probabilities_than_tokens_are_an_error():
    with pytest.raises(ValueError, match="log-probabilities of 1 tokens where there are 2"):
        completion_of(REQUEST, output(logprobs=flat([(5, -0.5, 1)])), top=False)


def test_a_request_that_was_aborted_before_its_prefill_has_no_scores_of_its_prompt():
    class Started(list):
        """vLLM's list of log-probabilities when it has only the entry of the first token."""

    aborted = output(token_ids=(), logprobs=None, finish_reason="abort", prompt_logprobs=Started([None]))
    completion = completion_of(REQUEST, aborted, top=False)
    assert (completion.finish_reason, completion.prompt_logprobs) == ("abort", None)


def test_what_was_not_asked_for_is_absent():
    completion = completion_of(REQUEST, output(logprobs=None, prompt_logprobs=None, weight_versions=None), top=True)
    assert completion.logprobs is completion.top_logprobs is completion.prompt_logprobs is None
    assert completion.weight_version is completion.weight_versions is None
    assert completion_of(REQUEST, output(), top=False).top_logprobs is None


def stats(**changes) -> SimpleNamespace:
    now = time.monotonic()
    values = {
        "arrival_time": time.time() - 5.0,
        "queued_ts": now - 4.0,
        "scheduled_ts": now - 3.0,
        "first_token_ts": now - 2.0,
        "last_token_ts": now - 1.0,
        "first_token_latency": 3.5,
        "num_generation_tokens": 11,
        "num_preemptions": 2,
    }
    return SimpleNamespace(**values | changes)


def test_the_intervals_add_up_to_the_whole():
    timing = timing_of(stats(), 16)
    assert timing.admission == pytest.approx(1.0, abs=0.01)
    assert (timing.queue, timing.prefill, timing.decode) == pytest.approx((1.0, 1.0, 1.0))
    assert timing.admission + timing.queue + timing.prefill + timing.decode == pytest.approx(timing.e2e)
    assert timing.finished_ns - timing.queued_ns == pytest.approx(3e9)
    assert timing.time_to_first_token == pytest.approx(3.5)
    assert timing.time_per_output_token == pytest.approx(0.1)
    assert (timing.preemptions, timing.cached_tokens) == (2, 16)


def test_a_clock_that_was_set_meanwhile_makes_no_negative_interval():
    timing = timing_of(stats(arrival_time=time.time() + 100.0), 0)
    assert timing.admission == 0.0
    assert timing.time_to_first_token >= 2.0


def test_one_token_has_no_time_per_token_and_none_has_no_timing():
    assert timing_of(stats(num_generation_tokens=1), 0).time_per_output_token is None
    assert timing_of(stats(first_token_ts=0.0), 0) is None
    assert timing_of(None, 0) is None
