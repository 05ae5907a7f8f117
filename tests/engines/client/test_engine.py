"""`ServerEngine` beside servers that go wrong: weight syncs, sleep, images, threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.server_generation import BATCH, COMPLETIONS, PROMPTS, Model, calls, generation, tokens

from vgen import (
    EngineError,
    EngineStateError,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerGeneration,
    WeightSyncError,
)
from vgen.profiling import semconv
from vgen.testing import FaultyServer, MemorySink
from vgen.weights.source.module_source import source_of

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


def test_a_sync_also_empties_the_stores_of_connectors(server):
    pytest.importorskip("safetensors")
    with generation(server) as made:
        made.sync_weights()
    resets = [path for path, _, _ in server.seen if path.startswith("/reset_prefix_cache")]
    assert resets == ["/reset_prefix_cache?reset_external=true"]


def test_a_cache_that_could_not_be_reset_is_an_error(server):
    pytest.importorskip("safetensors")
    server.answers["/reset_prefix_cache"] = {"success": False}
    with generation(server) as made, pytest.raises(WeightSyncError, match="the prefix cache could not be reset"):
        made.sync_weights()


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
    assert first["ties"] == {}
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


def test_weights_of_another_trainers_are_replaced_before_the_first_token(server):
    pytest.importorskip("safetensors")
    server.answers["/weight_info"] = {"weight_version": "step-7"}
    with generation(server) as made:
        made.generate([[1]])
    order = [path.partition("?")[0] for path, _, _ in server.seen]
    assert order.index("/collective_rpc") < order.index(COMPLETIONS)


def test_a_resumed_trainer_brings_its_weights_again_although_the_server_holds_their_version(server):
    pytest.importorskip("safetensors")
    server.answers["/weight_info"] = {"weight_version": "step-7"}
    with generation(server, weight_version="step-7") as made:
        made.generate([[1]])
    assert [call["method"] for call in calls(server, "/collective_rpc")][:1] == ["reload_weights"]


def test_a_takeover_of_a_stock_server_is_reported(server, caplog):
    pytest.importorskip("safetensors")
    server.answers["/weight_info"] = {"weight_version": "0"}
    sink = MemorySink()
    with generation(server, profiling=ProfilingContext([sink])) as made:
        server.answers["/weight_info"] = {"weight_version": "theirs"}
        made.sync_weights()
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert sync.attributes[semconv.FOREIGN_VERSION] == "theirs"
    assert "another trainer" in caplog.text


@pytest.mark.parametrize(("device", "level"), [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_what_follows_the_first_sleep_of_each_level_is_verified(server, device, level):
    server.answers["/server_info"]["vllm_config"]["device_config"]["device"] = device
    with generation(server) as made:
        (endpoint,) = made.engine.endpoints
        endpoint.verified = True
        made.sleep(level)
        assert not endpoint.verified
        endpoint.verified = True
        made.wake_up()
        made.sleep(level)
        assert endpoint.verified


def test_a_source_of_the_model_stands_for_it(server):
    safe_open = pytest.importorskip("safetensors").safe_open
    reloaded = list[list[str]]()

    def reload(call):
        with safe_open(next(Path(call["kwargs"]["weights_path"]).glob("*.safetensors")), "pt") as file:
            reloaded.append(list(file.keys()))
        return {"results": [None]}

    model = Model()
    with ServerGeneration(source_of(model, rename=lambda name: f"policy.{name}"), base_urls=server.url) as made:
        server.faults["/collective_rpc"] = [reload]
        made.sync_weights(verify="none")
    assert reloaded == [[f"policy.{name}" for name, _ in model.named_parameters()]]


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
    with generation(server, ours, frozen=True) as made:
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
