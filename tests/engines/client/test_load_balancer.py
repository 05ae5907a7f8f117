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
    EngineError,
    EngineStateError,
    ProfilingContext,
    PromptError,
    RequestTracing,
    Sampling,
    ServerError,
    WeightSyncOptions,
)
from vgen import completion_codec as codec
from vgen.engine_protocol import Batch, Request
from vgen.engines.client import load_balancer
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


# --- attempts and deadlines ------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch):
    """Servers that failed are tried again at once."""
    monkeypatch.setattr(load_balancer, "BACKOFF_SECONDS", (0.01,))


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_is_sent_four_times_at_most(hurried, features, status):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as server, generation(server, frozen=True) as made:
        server.faults[path] = [status] * 99
        with pytest.raises(ServerError, match="the server says no") as caught:
            made.generate([[1]])
        assert caught.value.status == status
        assert len(calls(server, path)) == 4
        server.faults[path] = [status] * 3
        assert tokens(made.generate([[1]])) == [[1]]
        assert len(calls(server, path)) == 8


def test_attempts_are_counted_for_each_request(hurried, ours):
    """Not for the call that carries several of them."""

    def failing(prompt_index):
        """An answer in which the request of this prompt fails, wherever it is in the call."""

        def change(frame):
            if not isinstance(frame, codec.Done) or first_token(frame) != PROMPTS[prompt_index][0]:
                return frame
            return codec.Failed(frame.index, 503, "no")

        return change

    with generation(ours, frozen=True) as made:
        ours.faults[BATCH] = [failing(3), failing(3), failing(3)]
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        ours.faults[BATCH] = [failing(3)] * 99
        before = len(calls(ours, BATCH))
        with pytest.raises(ServerError, match="a request failed in the engine: no"):
            made.generate(PROMPTS)
        assert len(calls(ours, BATCH)) == before + 4


def first_token(frame):
    return codec.unpack(frame.completion, shift_ns=0, rank=0, prompt_index=0, generation_index=0, server="").token_ids[
        0
    ]


def test_a_request_that_failed_waits_for_another_server_that_is_busy(hurried, server):
    """Else the server that fails at once would use up its attempts."""
    held = Held(finished)
    with FaultyServer() as other, generation(server, other, frozen=True) as made, ThreadPoolExecutor() as pool:
        server.faults[COMPLETIONS] = [503] * 99
        other.faults[COMPLETIONS] = [held]
        flight = pool.submit(made.generate, [[1], [2]], Sampling(logprobs=None))
        assert held.begun.wait(20)
        wait_until(lambda: calls(server, COMPLETIONS))
        with suppress(AssertionError):
            wait_until(lambda: len(calls(server, COMPLETIONS)) > 1, 1.0)
        held.answer()
        assert tokens(flight.result(20)) == [[1], [2]]
    assert len(calls(server, COMPLETIONS)) == 1
    assert len(calls(other, COMPLETIONS)) == 2


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
@pytest.mark.parametrize("fault", ["silent", 429])
def test_all_attempts_share_one_deadline(features, fault, monkeypatch):
    monkeypatch.setattr(load_balancer, "ATTEMPTS", 10**6)
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as server, generation(server, frozen=True, timeout=1.0) as made:
        server.faults[path] = [fault] * 10**4
        begun = time.monotonic()
        with pytest.raises(ServerError):
            made.generate([[1]])
        assert time.monotonic() - begun < 4.0


def test_the_deadline_is_one_for_all_attempts(server):
    """The second attempt has only what the first one has left."""

    def slowly(body):
        threading.Event().wait(2.0)
        return aborted(body)

    with generation(server, frozen=True, timeout=3.0) as made:
        server.faults[COMPLETIONS] = [slowly, *["silent"] * 9]
        begun = time.monotonic()
        with pytest.raises(ServerError):
            made.generate([[1]], Sampling(logprobs=None))
        assert len(calls(server, COMPLETIONS)) == 2
        assert time.monotonic() - begun < 4.5


def test_a_server_that_fails_now_and_then_is_not_given_up(hurried, server, monkeypatch):
    monkeypatch.setattr(load_balancer, "CONCURRENCY", 1)
    with generation(server, frozen=True) as made:
        server.faults[COMPLETIONS] = [503, None] * len(PROMPTS)
        assert tokens(made.generate(PROMPTS)) == PROMPTS


def test_a_server_that_always_fails_is_given_up(hurried, server, monkeypatch):
    """Before every request of a large batch has failed there."""
    monkeypatch.setattr(load_balancer, "CONCURRENCY", 1)
    held = Held(finished)
    with FaultyServer() as other, generation(server, other, frozen=True) as made, ThreadPoolExecutor() as pool:
        server.faults[COMPLETIONS] = [503] * 99
        other.faults[COMPLETIONS] = [held]
        flight = pool.submit(made.generate, [[i] for i in range(40)], Sampling(logprobs=None))
        wait_until(lambda: len(calls(server, COMPLETIONS)) == 9)
        with suppress(AssertionError):
            wait_until(lambda: len(calls(server, COMPLETIONS)) > 9, 1.0)
        held.answer()
        assert tokens(flight.result(20)) == [[i] for i in range(40)]
    assert len(calls(server, COMPLETIONS)) == 9


def test_what_fails_after_the_deadline_ends_with_its_own_error():
    dispatch = load_balancer.Dispatch(Batch([Request(0, 0, [1], None)], Sampling()), timing=False, timeout=-1.0)
    error = ServerError("it is busy", url="http://one", status=429, retryable=True)
    with pytest.raises(ServerError, match="it is busy"):
        dispatch.put_back(dispatch.take(1, "http://one"), error, "http://one")


def test_a_generation_ends_at_once_when_its_engine_is_closed(server):
    server.faults[COMPLETIONS] = ["silent"]
    made = generation(server, timeout=300.0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(made.generate, PROMPTS)
        wait_until(lambda: calls(server, COMPLETIONS))
        made.close()
        assert isinstance(running.exception(30), EngineError)
