"""`ServerGeneration` beside servers that go wrong: each fault ends in a typed error or a recovery, in time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from vgen import (
    EngineError,
    EngineStateError,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerError,
    ServerGeneration,
    WeightSyncError,
)
from vgen.profiling import names
from vgen.testing import FaultyServer, MemorySink
from vgen.weights.source import source_of

torch = pytest.importorskip("torch")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")

PROMPTS = [[i, i + 1, i + 2] for i in range(20)]
COMPLETIONS = "/v1/completions"


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


def generation(*servers: FaultyServer, **more) -> ServerGeneration:
    return ServerGeneration(Model(), base_urls=[server.url for server in servers], **{"timeout": 20.0, **more})


@pytest.fixture
def server():
    with FaultyServer() as made:
        yield made


def rebuilt(span):
    return span.attributes.get(names.REBUILT, False)


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


@pytest.mark.parametrize("status", [302, 401, 403, 404])
def test_what_cannot_pass_is_a_typed_error_with_the_servers_own_words(server, status):
    with generation(server) as made:
        server.faults[COMPLETIONS] = [status]
        with pytest.raises(ServerError, match="the server says no") as caught:
            made.generate([[1]])
        assert caught.value.status == status
        assert len([1 for path, _, _ in server.seen if path == COMPLETIONS]) == 1
        assert len(made.generate([[1]])) == 1


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


def test_a_batch_that_is_refused_is_sent_one_by_one(server):
    with generation(server, request_timing=False) as made:
        server.faults[COMPLETIONS] = [400, *[None] * 7, 400]
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2), refused="mark")
    assert [completion.prompt_index for completion in rollouts if completion.error is not None] != []
    assert len([completion for completion in rollouts if completion.error is None]) == 19


@pytest.mark.parametrize("fault", ["reset", "silent", "truncated", "not json", "not vllm", 500])
def test_when_nobody_is_left_it_ends_within_the_deadline(server, fault):
    with generation(server, timeout=0.75) as made:
        server.faults[COMPLETIONS] = [fault] * 100
        start = time.monotonic()
        with pytest.raises(ServerError) as caught:
            made.generate(PROMPTS)
        assert time.monotonic() - start < 10.0
        assert caught.value.url == server.url
        server.faults.clear()
        made.engine._timeout = 20.0  # other tests' engines are at work beside this one
        assert len(made.generate(PROMPTS)) == 20  # it is back, with the weights that it should hold


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
    keys = dict(api_key="the-api-key", control_key="the-control-key", timeout=3.0)
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
    traced = {f"00-{span.trace_id}-{span.span_id}-01" for span in sink.named(names.REQUEST) if not rebuilt(span)}
    assert len(traced) == 2
    assert sent == {f"00-{engine_span.trace_id}-{engine_span.span_id}-00", *traced}


SYNC_PATHS = ("/pause", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/resume")


@pytest.mark.parametrize(
    ("fault", "path"),
    [
        *((fault, path) for fault in (500, "reset") for path in SYNC_PATHS),
        *(("silent", path) for path in ("/pause", "/collective_rpc")),
        *(pytest.param("silent", path, marks=pytest.mark.slow) for path in SYNC_PATHS[2:]),
    ],
)
def test_a_sync_that_fails_names_phase_and_server_and_is_never_sent_twice(server, path, fault):
    pytest.importorskip("safetensors")
    with generation(server, timeout=1.0 if fault == "silent" else 20.0) as made:
        server.faults[path] = [fault]
        start = time.monotonic()
        with pytest.raises(WeightSyncError) as caught:
            made.sync_weights()
        assert time.monotonic() - start < 10.0
        assert caught.value.receiver == server.url
        assert caught.value.phase == {
            "/collective_rpc": "load",
            "/reset_prefix_cache": "reset_cache",
            "/reset_mm_cache": "reset_cache",
        }.get(path, path[1:])
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


# One that `vgen serve` started

BATCH = "/inference/vgen/generate"


@pytest.fixture
def ours():
    with FaultyServer(features=["batch", "lease"]) as made:
        yield made


def calls(server, path):
    return [body for seen, _, body in server.seen if seen.partition("?")[0] == path]


def test_one_call_brings_every_completion_with_its_timing(ours):
    with generation(ours) as made:
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2, seed=3), 2)
    assert tokens(rollouts) == [prompt[:2] for prompt in PROMPTS for _ in range(2)]
    assert len(calls(ours, BATCH)) == 1
    for completion in rollouts:
        timing = completion.timing
        assert timing.e2e == pytest.approx(0.005)
        assert abs(time.monotonic_ns() - timing.finished_ns) < 60e9
        assert completion.weight_versions == [("default", 0, 2)]


def test_each_request_of_a_batch_has_its_own_seed_and_trace_context(ours):
    from vgen.engines import frames

    profiling = ProfilingContext([MemorySink()])
    with generation(ours, profiling=profiling, traced_requests=3) as made, profiling.step(1):
        made.generate(PROMPTS[:3], Sampling(seed=7), 2)
    batch = frames.decode_request(calls(ours, BATCH)[0]["batch"])
    assert [wanted.seed for wanted in batch.wanted] == list(range(7, 13))
    assert [wanted.prompt for wanted in batch.wanted] == [0, 0, 1, 1, 2, 2]
    assert len(batch.prompts) == 3
    assert sorted(wanted.traceparent[-2:] for wanted in batch.wanted) == ["00"] * 3 + ["01"] * 3


@pytest.mark.parametrize("fault", ["reset", "truncated", 429, 500, 503])
def test_what_a_batch_has_not_answered_is_sent_again_and_nothing_is_doubled(ours, fault):
    ours.faults[BATCH] = [fault]
    seen = []
    with generation(ours) as made:
        rollouts = made.generate(PROMPTS, Sampling(max_tokens=2), on_completion=seen.append)
    assert tokens(rollouts) == [prompt[:2] for prompt in PROMPTS]
    assert len(seen) == 20
    assert len(calls(ours, BATCH)) == 2


def test_a_request_that_the_engine_refuses_or_loses_is_its_own_matter(ours):
    from vgen.engines import frames

    def failing(status):
        return lambda f: frames.Failed(3, status, "no") if getattr(f, "index", None) == 3 else f

    with generation(ours) as made:
        ours.faults[BATCH] = [failing(400)]
        rollouts = made.generate(PROMPTS, refused="mark")
        assert [c.prompt_index for c in rollouts if c.error is not None] == [3]
        ours.faults[BATCH] = [failing(503)]
        assert tokens(made.generate(PROMPTS)) == PROMPTS
    assert len(calls(ours, BATCH)) == 3


@pytest.mark.parametrize("fault", ["silent", "reset", "truncated", "not json", 500])
def test_a_batch_that_nobody_answers_ends_within_the_deadline(ours, fault):
    ours.faults[BATCH] = [fault] * 100
    with generation(ours, timeout=0.75) as made:
        start = time.monotonic()
        with pytest.raises(ServerError):
            made.generate(PROMPTS)
        assert time.monotonic() - start < 10.0


def test_a_batch_is_spread_over_servers(ours):
    with FaultyServer(features=["batch"]) as other, generation(ours, other) as made:
        assert tokens(made.generate(PROMPTS, num_generations=2)) == [p for p in PROMPTS for _ in range(2)]
        assert calls(ours, BATCH)
        assert calls(other, BATCH)


def test_a_server_that_comes_back_with_other_weights_is_left_out_until_the_next_sync(server):
    pytest.importorskip("safetensors")
    with FaultyServer() as other:
        for each in (server, other):
            each.answers["/weight_info"] = {"weight_version": "0"}
        with generation(server, other) as made:
            other.answers["/weight_info"] = {"weight_version": "default"}  # it was started anew
            other.faults[COMPLETIONS] = ["reset"] * 40
            assert tokens(made.generate(PROMPTS)) == PROMPTS
            other.faults.clear()
            other.seen.clear()
            assert tokens(made.generate(PROMPTS)) == PROMPTS
            assert calls(other, COMPLETIONS) == []
            made.sync_weights(version="1")
            for each in (server, other):
                each.answers["/weight_info"] = {"weight_version": "1"}
            assert tokens(made.generate(PROMPTS)) == PROMPTS
            assert calls(other, COMPLETIONS) != []


def test_a_server_of_an_older_vgen_is_not_told_what_will_come():
    ours = ("batch", "lease", "shared_memory")
    with FaultyServer(features=ours) as older, FaultyServer(features=(*ours, "recorded")) as newer:
        with generation(older, newer) as made:
            made.sync_weights(verify="none")
            made.sync_weights(verify="none")
        (first, again), introduced = [
            [body["init_info"] for body in calls(each, "/init_weight_transfer_engine")] for each in (newer, older)
        ]
    assert [sorted(each) for each in introduced] == [["paths"]] * 2
    assert first["forms"] == [["weight", "float32", [2]]]
    assert sorted(again) == ["forms_name", "paths"]  # once is enough
    assert again["forms_name"] == first["forms_name"]


@pytest.mark.parametrize("verify", ["bits", "none"])
def test_whether_bits_are_compared_travels_with_the_weights(verify):
    with FaultyServer(features=["batch", "lease", "shared_memory", "recorded", "memory"]) as ours:
        ours.answers["/collective_rpc"] = {"results": [{"way": "foreach", "reason": ""}]}
        with generation(ours) as made:
            made.sync_weights(verify=verify)
    (update,) = calls(ours, "/update_weights")
    assert update["update_info"]["verify"] is (verify == "bits")


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
def test_a_server_that_was_started_anew_while_nobody_looked_is_left_out_until_the_next_sync(features, caplog):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as one, FaultyServer(features=features) as other:
        for each in (one, other):
            each.answers["/weight_info"] = {"weight_version": "0"}
        with generation(one, other) as made:
            made.generate(PROMPTS)
            assert calls(other, path) != []
            other.answers["/weight_info"] = {"weight_version": "default"}
            seen = []
            rollouts = made.generate(PROMPTS, on_completion=seen.append)
            assert tokens(rollouts) == PROMPTS
            assert len(seen) == 20
            assert {completion.server for completion in rollouts} == {one.url}
            assert "is back with weights 'default', not '0'" in caplog.text
            one.answers["/weight_info"] = {"weight_version": "default"}
            with pytest.raises(ServerError, match=r"started anew|sync_weights\(\) that reaches it helps"):
                made.generate(PROMPTS)


def test_weights_of_another_trainers_are_replaced_before_the_first_token(server):
    pytest.importorskip("safetensors")
    server.answers["/weight_info"] = {"weight_version": "step-7"}
    with generation(server) as made:
        made.generate([[1]])
    order = [path.partition("?")[0] for path, _, _ in server.seen]
    assert order.index("/collective_rpc") < order.index(COMPLETIONS)


def test_a_resumed_trainer_finds_its_own_weights(server):
    server.answers["/weight_info"] = {"weight_version": "step-7"}
    with generation(server, weight_version="step-7") as made:
        made.generate([[1]])
    assert calls(server, "/collective_rpc") == []


def test_a_takeover_of_a_stock_server_is_reported(server, caplog):
    pytest.importorskip("safetensors")
    server.answers["/weight_info"] = {"weight_version": "0"}
    sink = MemorySink()
    with generation(server, profiling=ProfilingContext([sink])) as made:
        server.answers["/weight_info"] = {"weight_version": "theirs"}
        made.sync_weights()
    (sync,) = sink.named(names.WEIGHT_SYNC)
    assert sync.attributes[names.FOREIGN_VERSION] == "theirs"
    assert "another trainer" in caplog.text


@pytest.mark.parametrize(("device", "level", "verified"), [("cuda", 2, False), ("cuda", 1, True), ("cpu", 2, True)])
def test_what_follows_the_first_sleep_that_discards_weights_is_verified(server, device, level, verified):
    server.answers["/server_info"]["vllm_config"]["device_config"]["device"] = device
    with generation(server) as made:
        (peer,) = made.engine.peers
        peer.verified = True
        made.sleep(level)
        assert peer.verified is verified
        peer.verified = True
        made.wake_up()
        made.sleep(level)
        assert peer.verified


def test_a_source_of_the_model_stands_for_it(server):
    pytest.importorskip("safetensors")
    model = Model()
    with ServerGeneration(source_of(model, rename=lambda name: f"policy.{name}"), base_urls=server.url) as made:
        reloaded = []
        made.engine._updater._written = lambda source: reloaded.append(dict(source)) or nullcontext("folder")
        made.sync_weights(verify="none")
    assert [list(weights) for weights in reloaded] == [[f"policy.{name}" for name, _ in model.named_parameters()]]


def test_the_lease_is_taken_carried_and_released(ours):
    with generation(ours, control_key="key") as made:
        made.generate([[1]])
        made.sleep()
    paths = {path.partition("?")[0]: headers for path, headers, _ in ours.seen}
    assert paths["/sleep"]["X-Vgen-Lease"] == "a-token"
    assert paths["/vgen/lease/release"]["X-Vgen-Lease"] == "a-token"
    assert "X-Vgen-Lease" not in paths[BATCH]  # inference needs none


def test_a_server_that_another_living_trainer_holds_is_not_taken(ours):
    ours.faults["/vgen/lease"] = [409] * 100
    with pytest.raises(EngineError, match="takeover=True"):
        generation(ours, timeout=0.75)
    ours.faults.clear()
    with generation(ours, takeover=True):
        assert calls(ours, "/vgen/lease")[-1]["takeover"] is True


def test_threads_generate_at_once_and_a_failed_sync_ends_what_is_in_flight(server):
    held, release = threading.Event(), threading.Event()

    def slow(body):
        held.set()
        release.wait(20)
        return {"id": "x", "choices": [{"index": 0, "token_ids": [5], "finish_reason": "stop"}]}

    with generation(server) as made, ThreadPoolExecutor() as pool:
        server.faults[COMPLETIONS] = [slow]
        first = pool.submit(made.generate, [[1]], Sampling(logprobs=None))
        assert held.wait(20)
        assert tokens(made.generate(PROMPTS)) == PROMPTS  # beside it
        server.faults["/pause"] = [500]
        with pytest.raises(WeightSyncError):
            made.sync_weights()
        with pytest.raises(EngineError, match="weight sync failed"):
            first.result(20)
        release.set()


def test_images_go_to_servers_that_take_them_and_to_no_other(ours, server):
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 4))
    with generation(server, ours) as made:
        assert len(made.generate(PROMPTS, images=[[image]] * 20)) == 20
    assert len(calls(ours, BATCH)) == 1
    assert calls(server, COMPLETIONS) == []
    with generation(server) as made, pytest.raises(ValueError, match=r"takes no images.*vgen serve"):
        made.generate([[1]], images=[[image]])
    with generation(server) as made, pytest.raises(PromptError, match="not a PIL"):
        made.generate([[1]], images=[["a path"]])


def test_a_server_named_twice_is_refused(server):
    with pytest.raises(ValueError, match="twice"):
        generation(server, server)


def test_another_model_than_the_trainers_and_too_old_a_server_are_said_so(ours):
    ours.answers["/vgen/info"]["shape"] = {"hidden_size": 128}
    model = Model()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100, hidden_size=256))
    with pytest.raises(EngineError, match=r"hidden_size of 128.*has 256"):
        ServerGeneration(model, base_urls=ours.url)
    with FaultyServer(vocabulary_size=272) as stock, pytest.raises(EngineError, match=r"vocab_size of 272.*has 100"):
        generation(stock)
    with FaultyServer(vocabulary_size=100) as stock:
        stock.answers["/collective_rpc"] = {"results": ["M()(\n (e): VocabParallelEmbedding(a=1, embedding_dim=128)\n"]}
        model = Model()
        model.get_input_embeddings = lambda: SimpleNamespace(embedding_dim=256)
        with pytest.raises(EngineError, match=r"embedding_dim of 128.*has 256.*start it with the trainer's model"):
            ServerGeneration(model, base_urls=stock.url)
    ours.answers["/version"] = {"version": "0.11.2+cpu"}
    with pytest.raises(EngineError, match=r"0\.11\.2.*0\.30 or newer"):
        generation(ours)
