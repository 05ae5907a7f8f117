"""`ServerGeneration` beside servers that go wrong: each fault ends in a typed error or a recovery, in time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from vgen import (
    EngineError,
    EngineStateError,
    ProfilingContext,
    Sampling,
    ServerError,
    ServerGeneration,
    WeightSyncError,
)
from vgen.engines.base import EngineState
from vgen.profiling import names
from vgen.testing import FaultyServer, MemorySink

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

PROMPTS = [[i, i + 1, i + 2] for i in range(20)]
COMPLETIONS = "/v1/completions"


class Model:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def named_parameters(self, remove_duplicate):
        return []


def generation(*servers: FaultyServer, **more) -> ServerGeneration:
    return ServerGeneration(Model(), base_urls=[server.url for server in servers], **{"timeout": 20.0, **more})


@pytest.fixture
def server():
    with FaultyServer() as made:
        yield made


def tokens(rollouts):
    return [completion.token_ids for completion in rollouts]


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
    assert sorted(body["seed"] for path, _, body in server.seen if path == COMPLETIONS) == list(range(7, 13))


@pytest.mark.parametrize("fault", ["reset", "truncated", "not json", 429, 500, 502, 503])
def test_what_may_pass_is_sent_again_and_nothing_is_lost_or_doubled(server, fault):
    server.faults[COMPLETIONS] = [fault]
    with FaultyServer() as other, generation(server, other) as made:
        assert tokens(made.generate(PROMPTS, Sampling(max_tokens=2))) == [prompt[:2] for prompt in PROMPTS]


@pytest.mark.parametrize("request_timing", [True, False])
def test_a_server_that_dies_has_its_work_moved_to_the_others(request_timing):
    with FaultyServer() as other, FaultyServer() as dying:
        dying.faults[COMPLETIONS] = ["reset"] * 100
        with generation(dying, other, request_timing=request_timing) as made:
            assert tokens(made.generate(PROMPTS, Sampling(max_tokens=2))) == [prompt[:2] for prompt in PROMPTS]
        assert len([1 for path, _, _ in other.seen if path == COMPLETIONS]) > 0


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_cannot_pass_is_a_typed_error_with_the_servers_own_words(server, status):
    with generation(server) as made:
        server.faults[COMPLETIONS] = [status]
        with pytest.raises(ServerError, match="the server says no") as caught:
            made.generate([[1]])
        assert caught.value.status == status
        assert len([1 for path, _, _ in server.seen if path == COMPLETIONS]) == 1


@pytest.mark.parametrize("fault", ["reset", "silent", "truncated", "not json", "not vllm", 500])
def test_when_nobody_is_left_it_ends_within_the_deadline(server, fault):
    with generation(server, timeout=1.0) as made:
        server.faults[COMPLETIONS] = [fault] * 100
        start = time.monotonic()
        with pytest.raises(ServerError) as caught:
            made.generate(PROMPTS)
        assert time.monotonic() - start < 10.0
        assert caught.value.url == server.url
        assert made.state is EngineState.FAILED
        with pytest.raises(EngineStateError):
            made.generate([[1]])


def test_a_wrong_address_and_a_server_that_is_not_vllm(server):
    server.faults["/v1/models"] = ["not vllm"]
    with pytest.raises(EngineError, match="is it one"):
        generation(server)
    server.faults["/v1/models"] = ["silent"]
    gone = FaultyServer()
    gone.close()
    with pytest.raises(ServerError, match="failed"):
        generation(gone)


def test_keys_travel_in_headers_and_are_never_repeated(server):
    url = server.url.replace("http://", "http://user:password@")
    keys = dict(api_key="the-api-key", control_key="the-control-key", timeout=1.0)
    with ServerGeneration(Model(), base_urls=[url], **keys) as made:
        made.sleep()
        made.wake_up()
        server.faults[COMPLETIONS] = ["reset"] * 9
        with pytest.raises(ServerError) as caught:
            made.generate([[1]])
    shown = str(caught.value) + repr(caught.value.__cause__)
    assert not [secret for secret in ("password", "the-api-key", "the-control-key") if secret in shown]
    for path, headers, _ in server.seen:
        if path == COMPLETIONS:
            assert headers["Authorization"] == "Bearer the-api-key"
            assert "X-Vgen-Control-Key" not in headers
        if path.startswith("/sleep"):
            assert headers["X-Vgen-Control-Key"] == "the-control-key"


def test_the_open_spans_context_travels_with_every_request(server):
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with generation(server, profiling=profiling) as made, profiling.step(1):
        made.generate(PROMPTS[:3])
    (engine_span,) = sink.named(names.ENGINE_GENERATE)
    sent = {headers["traceparent"] for path, headers, _ in server.seen if path == COMPLETIONS}
    assert sent == {f"00-{engine_span.trace_id}-{engine_span.span_id}-01"}


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"])
@pytest.mark.parametrize("fault", [500, "reset", "silent"])
def test_a_sync_that_fails_names_phase_and_server_and_is_never_sent_twice(server, path, fault):
    pytest.importorskip("safetensors")
    with generation(server, timeout=2.0) as made:
        server.faults[path] = [fault]
        start = time.monotonic()
        with pytest.raises(WeightSyncError) as caught:
            made.sync_weights()
        assert time.monotonic() - start < 10.0
        assert caught.value.receiver == server.url
        assert caught.value.phase == {"/collective_rpc": "load", "/reset_prefix_cache": "reset_cache"}.get(
            path, path[1:]
        )
        assert len([1 for seen, _, _ in server.seen if seen.partition("?")[0] == path]) == 1
        with pytest.raises(EngineStateError, match="failed"):
            made.generate([[1]])
        made.sync_weights()
        assert len(made.generate([[1]])) == 1


def test_a_cache_that_could_not_be_reset_is_an_error(server):
    pytest.importorskip("safetensors")
    server.answers["/reset_prefix_cache"] = {"success": False}
    with generation(server) as made, pytest.raises(WeightSyncError, match="prefix cache"):
        made.sync_weights()
