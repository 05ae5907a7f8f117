"""Requests spread over servers that go wrong: each is answered once, or ends in a typed error in time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from helpers.server_generation import BATCH, COMPLETIONS, PROMPTS, calls, generation, tokens
from helpers.waiting import wait_until

from vgen import (
    EngineStateError,
    ProfilingContext,
    PromptError,
    RequestTracing,
    Sampling,
    ServerError,
    WeightSyncOptions,
)
from vgen import completion_codec as codec
from vgen.generation.call_plan import request_seed
from vgen.testing import FaultyServer, MemorySink


@pytest.mark.parametrize("fault", ["reset", "truncated", "not json", 429, 500, 502, 503])
@pytest.mark.fault(
    point="a request on its way to a server",
    did="The connection is reset or cut off, a proxy answers, or the status is 429 or 5xx",
    happens="The request is sent again; each completion comes once",
    within=60,
)
def test_what_may_pass_is_sent_again_and_nothing_is_lost_or_doubled(server, fault):
    server.faults[COMPLETIONS] = [fault]
    with FaultyServer() as other, generation(server, other) as made:
        assert tokens(made.generate(PROMPTS, Sampling(max_tokens=2))) == [prompt[:2] for prompt in PROMPTS]


@pytest.mark.parametrize("request_timing", [True, False])
@pytest.mark.fault(
    point="a request on its way to a server",
    did="One of several servers dies during a call",
    happens="The others take its requests; each completion comes once",
    within=60,
)
def test_a_server_that_dies_has_its_work_moved_to_the_others(request_timing):
    with FaultyServer() as other, FaultyServer() as dying:
        dying.faults[COMPLETIONS] = ["reset"] * 100
        with generation(dying, other, request_timing=request_timing) as made:
            assert tokens(made.generate(PROMPTS, Sampling(max_tokens=2))) == [prompt[:2] for prompt in PROMPTS]
        assert len([1 for path, _, _ in other.seen if path == COMPLETIONS]) > 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_refuses_is_named_and_does_not_lose_the_others(server, status):
    with generation(server) as made:
        server.faults[COMPLETIONS] = [status]
        with pytest.raises(PromptError, match="the server says no") as caught:
            made.generate([[1]])
        assert caught.value.__cause__.status == status
        server.faults[COMPLETIONS] = [status]
        rollouts = made.generate(PROMPTS, refused="mark")
    (refused,) = [completion for completion in rollouts if completion.error is not None]
    assert refused.error.index == refused.prompt_index
    assert len(rollouts) == 20


@pytest.mark.fault(
    point="the batch route, seen by its client",
    did="The server refuses a batch as a whole",
    happens="Its prompts are sent one by one; the bad one is named",
    within=60,
)
def test_a_batch_that_is_refused_is_sent_one_by_one(server):
    with generation(server, request_timing=False) as made:
        server.faults[COMPLETIONS] = [400, *[None] * 7, 400]
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2), refused="mark")
    assert [completion.prompt_index for completion in rollouts if completion.error is not None] != []
    assert len([completion for completion in rollouts if completion.error is None]) == 19


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "silent", "truncated", "not json", "not vllm", 500])
@pytest.mark.fault(
    point="a request on its way to a server",
    did="The only server fails in every way, again and again",
    happens="`ServerError` within the call's timeout; the next call succeeds",
    within=60,
)
def test_when_nobody_is_left_it_ends_within_the_deadline(server, fault):
    with generation(server, timeout=0.75) as made:
        server.faults[COMPLETIONS] = [fault] * 100
        start = time.monotonic()
        with pytest.raises(ServerError) as caught:
            made.generate(PROMPTS)
        assert time.monotonic() - start < 10.0
        assert caught.value.url == server.url
        server.faults.clear()

        def recovered() -> bool:  # on a busy machine one call may miss the short deadline again
            with suppress(ServerError):
                return len(made.generate(PROMPTS)) == 20
            return False

        wait_until(recovered)  # it is back, with the weights that it should hold


def test_one_call_brings_every_completion_with_its_timing(ours):
    with generation(ours) as made:
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2, seed=3), 2)
    assert tokens(rollouts) == [prompt[:2] for prompt in PROMPTS for _ in range(2)]
    assert len(calls(ours, BATCH)) == 1
    for completion in rollouts:
        timing = completion.timing
        assert timing.e2e == pytest.approx(0.005)
        assert abs(time.monotonic_ns() - timing.finished_ns) < 60e9
        assert completion.weight_versions == [("0", 0, 2)]


def test_each_request_of_a_batch_has_its_own_seed_and_trace_context(ours):
    from vgen import completion_codec as codec

    profiling = ProfilingContext([MemorySink()])
    with (
        generation(ours, profiling=profiling, request_tracing=RequestTracing(traced_requests=3)) as made,
        profiling.step(1),
    ):
        made.generate(PROMPTS[:3], Sampling(seed=7), 2)
    batch = codec.decode_request(calls(ours, BATCH)[0]["batch"])
    seeds = [request_seed(7, place, generation) for place in range(3) for generation in range(2)]
    assert [wanted.seed for wanted in batch.wanted] == seeds
    assert [wanted.prompt for wanted in batch.wanted] == [0, 0, 1, 1, 2, 2]
    assert len(batch.prompts) == 3
    assert sorted(wanted.traceparent[-2:] for wanted in batch.wanted) == ["00"] * 3 + ["01"] * 3


@pytest.mark.parametrize("fault", ["reset", "truncated", 429, 500, 503])
@pytest.mark.fault(
    point="the batch route, seen by its client",
    did="The answer of a batch is cut off half way",
    happens="Only the missing requests are sent again",
    within=60,
)
def test_what_a_batch_has_not_answered_is_sent_again_and_nothing_is_doubled(ours, fault):
    ours.faults[BATCH] = [fault]
    seen = []
    with generation(ours) as made:
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2), on_completion=seen.append)
    assert tokens(rollouts) == [prompt[:2] for prompt in PROMPTS]
    assert len(seen) == 20
    assert len(calls(ours, BATCH)) == 2


@pytest.mark.fault(
    point="the batch route, seen by its client",
    did="The engine refuses one request of a batch and loses another",
    happens="The refused one is marked, the lost one is sent again",
    within=60,
)
def test_a_request_that_the_engine_refuses_or_loses_is_its_own_matter(ours):
    from vgen import completion_codec as codec

    def failing(status):
        return lambda f: codec.Failed(3, status, "no") if getattr(f, "index", None) == 3 else f

    with generation(ours) as made:
        ours.faults[BATCH] = [failing(400)]
        rollouts = made.generate(PROMPTS, refused="mark")
        assert [c.prompt_index for c in rollouts if c.error is not None] == [3]
        ours.faults[BATCH] = [failing(503)]
        assert tokens(made.generate(PROMPTS)) == PROMPTS
    assert len(calls(ours, BATCH)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "reset", "truncated", "not json", 500])
@pytest.mark.fault(
    point="the batch route, seen by its client",
    did="No server answers a batch",
    happens="`ServerError` within the call's timeout",
    within=60,
)
def test_a_batch_that_nobody_answers_ends_within_the_deadline(ours, fault):
    ours.faults[BATCH] = [fault] * 100
    with generation(ours, timeout=0.75) as made:
        start = time.monotonic()
        with pytest.raises(ServerError):
            made.generate(PROMPTS)
        assert time.monotonic() - start < 10.0


def test_a_batch_is_spread_over_servers(ours):
    with FaultyServer(features=["batch"]) as other, generation(ours, other, frozen=True) as made:
        assert tokens(made.generate(PROMPTS, num_generations=2)) == [p for p in PROMPTS for _ in range(2)]
        assert calls(ours, BATCH)
        assert calls(other, BATCH)


def aborted(body):
    """What a stock server answers whose requests another client has aborted."""
    choice = {"index": 0, "token_ids": body["prompt"][:1], "finish_reason": "abort"}
    return {"id": "x", "choices": [choice]}


def aborted_frame(frame):
    if not isinstance(frame, codec.Done):
        return frame
    completion = codec.unpack(frame.completion, shift_ns=0, rank=0, prompt_index=0, generation_index=0, server="")
    return msgspec.structs.replace(frame, completion=codec.pack(replace(completion, finish_reason="abort")))


@pytest.mark.parametrize(("features", "fault"), [((), aborted), (("batch", "lease"), aborted_frame)])
@pytest.mark.fault(
    point="a server that another client changed",
    did="A client aborts this trainer's requests",
    happens="They are sampled again",
    within=60,
)
def test_what_another_client_aborts_is_sampled_again_and_never_looks_finished(features, fault):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as server, generation(server, frozen=True) as made:
        server.faults[path] = [fault]
        rollouts = made.generate([[1, 2, 3]], Sampling(logprobs=None))
        assert [completion.finish_reason for completion in rollouts] == ["length"]
        assert tokens(rollouts) == [[1, 2, 3]]
        server.faults[path] = [fault] * 40
        with pytest.raises(ServerError, match="another client had the server abort a request"):
            made.generate([[1, 2, 3]], Sampling(logprobs=None))


class Held:
    """A fault that answers nothing until the test says so."""

    def __init__(self, answer):
        self.begun, self._go, self._answer = threading.Event(), threading.Event(), answer

    def __call__(self, body):
        self.begun.set()
        assert self._go.wait(30)
        return self._answer(body)

    def answer(self):
        self._go.set()


def finished(body):
    choice = {"index": 0, "token_ids": body["prompt"], "finish_reason": "length"}
    return {"id": "x", "choices": [choice]}


@pytest.mark.parametrize("call", ["pause", "sync"])
def test_what_this_trainer_aborts_ends_as_it_is(server, call):
    held = Held(aborted)
    with generation(server, weight_sync=WeightSyncOptions(pause_mode="abort")) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        server.faults[COMPLETIONS] = [held]
        flight = pool.submit(made.generate, [[1, 2, 3]], Sampling(logprobs=None))
        assert held.begun.wait(20)
        {"pause": lambda: made.pause("abort"), "sync": lambda: made.sync_weights(verify="none")}[call]()
        held.answer()
        (completion,) = flight.result(20)
        assert (completion.token_ids, completion.finish_reason) == ([1], "abort")


def test_a_sleep_is_refused_while_others_generate_or_waits_for_them(server):
    held = Held(finished)
    with generation(server) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        server.faults[COMPLETIONS] = [held]
        flight = pool.submit(made.generate, [[1, 2, 3]], Sampling(logprobs=None))
        assert held.begun.wait(20)
        with pytest.raises(EngineStateError, match="generating for a call of another thread"):
            made.sleep()
        assert not calls(server, "/sleep")
        sleeping = pool.submit(made.sleep, wait_seconds=20)
        held.answer()
        sleeping.result(20)
        (completion,) = flight.result(20)
        assert (completion.token_ids, completion.finish_reason) == ([1, 2, 3], "length")
        assert len(calls(server, "/sleep")) == 1


def test_a_request_that_leaves_with_a_sleep_is_refused_and_reaches_no_server(server):
    held = Held(dict)
    with generation(server) as made, ThreadPoolExecutor() as pool:
        made.sync_weights(verify="none")
        server.faults["/sleep"] = [held]
        sleeping = pool.submit(made.sleep)
        assert held.begun.wait(20)
        late = pool.submit(made.generate, [[1, 2, 3]], Sampling(logprobs=None))
        held.answer()
        with pytest.raises(EngineStateError, match="wake_up"):
            late.result(20)
        sleeping.result(20)
        assert not calls(server, COMPLETIONS)
        made.wake_up()
        assert tokens(made.generate([[1, 2, 3]], Sampling(logprobs=None))) == [[1, 2, 3]]
