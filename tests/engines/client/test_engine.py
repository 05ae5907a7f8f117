"""`ServerEngine` beside servers that go wrong: weight syncs, sleep, images, threads."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.server_generation import BATCH, COMPLETIONS, PROMPTS, Model, calls, generation, tokens
from helpers.waiting import wait_until

from vgen import (
    EngineError,
    EngineStateError,
    ProfilingContext,
    PromptError,
    Sampling,
    ServerGeneration,
    WeightSyncError,
)
from vgen.engines.client.shutdown import disconnect
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
@pytest.mark.fault(
    point="a weight sync to servers",
    did="A call of the sync fails, in each phase",
    happens="`WeightSyncError` with phase and server; nothing is sent twice",
    within=60,
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


@pytest.mark.fault(
    point="a weight sync to servers",
    did="A cache cannot be reset",
    happens="`WeightSyncError` names the cache",
    within=60,
)
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


@pytest.mark.fault(
    point="a server that another client changed",
    did="Another trainer has synced its weights",
    happens="They are replaced before the first token",
    within=60,
)
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


@pytest.mark.fault(
    point="a weight sync to servers",
    did="A sync fails while threads generate",
    happens="Their calls end with an error",
    within=60,
)
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


@pytest.mark.parametrize("profiled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.fault(
    point="what holds a server's connections",
    did="A generation is dropped without `close`",
    happens="No thread, descriptor or lease stays",
    within=60,
)
def test_a_generation_that_is_dropped_leaves_no_thread_no_descriptor_and_no_lease(ours, profiled, frozen):
    profiling = ProfilingContext([MemorySink()]) if profiled else ProfilingContext.disabled()

    def loops():
        return [thread for thread in threading.enumerate() if thread.name == "vgen-http"]

    def sockets():
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        return sorted(link.readlink().name.partition(":")[0] for link in links if link.is_symlink())

    before = len(loops()), sockets()
    for _ in range(5):
        made = generation(ours, frozen=frozen, profiling=profiling)
        if not frozen:
            made.sync_weights(verify="none")  # a warning would keep frames in the log that pytest captures
        made.generate([[1]], Sampling(max_tokens=1))
        assert len(loops()) > before[0]
        del made
        gc.collect()
    wait_until(lambda: (len(loops()), sockets()) == before)
    assert len(calls(ours, "/vgen/lease/release")) == len(calls(ours, "/vgen/lease")) == (0 if frozen else 5)


@pytest.mark.fault(
    point="what holds a server's connections",
    did="The constructor fails after it has connected",
    happens="The lease is given back",
    within=60,
)
def test_an_engine_whose_generation_could_not_be_made_is_let_go(ours):
    with pytest.raises(ValueError, match="drift_every"):
        generation(ours, drift_every=0)
    gc.collect()
    wait_until(lambda: calls(ours, "/vgen/lease/release"))


@pytest.mark.fault(
    point="what holds a server's connections",
    did="The process ends without `close`",
    happens="The lease is given back",
    within=60,
)
def test_a_process_that_ends_without_close_gives_its_lease_back(ours):
    code = (
        "from helpers.server_generation import Model\nfrom vgen import ServerGeneration\n"
        f"made = ServerGeneration(Model(), base_urls=[{ours.url!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert len(calls(ours, "/vgen/lease/release")) == len(calls(ours, "/vgen/lease")) == 1


def stop(server, *, asleep):
    """Have the server say that it is paused or asleep, as vLLM says it."""
    awake = 0 if asleep else 1
    gauge = f'vllm:engine_sleep_state{{engine="0",model_name="tiny",sleep_state="awake"}} {awake}.0\n'
    server.answers.update({f"/is_{state}": {f"is_{state}": True} for state in ("paused", "sleeping")})
    server.answers["/metrics"] = b"# TYPE vllm:engine_sleep_state gauge\n" + gauge.encode()


@pytest.mark.fault(
    point="a server that another client changed",
    did="A client left the server paused",
    happens="The next trainer's first sync resumes it",
    within=60,
)
def test_a_server_that_another_client_left_paused_is_resumed_and_not_woken(server):
    stop(server, asleep=False)
    with generation(server) as made:
        assert len(made.generate(PROMPTS)) == 20
    paths = [path.partition("?")[0] for path, _, _ in server.seen]
    assert "/wake_up" not in paths  # during a weight update that was broken off, it would end the engine
    assert "/resume" in paths


@pytest.mark.fault(
    point="a server that another client changed",
    did="A client left the server asleep",
    happens="The next trainer's first sync wakes it",
    within=60,
)
def test_a_server_that_another_client_left_asleep_is_woken_before_the_first_sync(server, ours):
    for each in (server, ours):
        stop(each, asleep=True)
    with generation(server, ours) as made:
        assert len(made.generate(PROMPTS)) == 20
        made.sync_weights()
        for each in (server, ours):
            paths = [path.partition("?")[0] for path, _, _ in each.seen]
            assert paths.count("/wake_up") == 1
            assert paths.index("/wake_up") < paths.index("/pause")


def test_a_server_that_this_trainer_put_to_sleep_is_not_woken_by_a_sync(server):
    with generation(server) as made:
        made.sleep()
        stop(server, asleep=True)
        made.wake_up(["weights"])
        made.sync_weights()
    assert [path for path, _, _ in server.seen if path.startswith("/wake_up")] == ["/wake_up?tags=weights"]


@pytest.mark.parametrize("state", ["paused", "asleep"])
def test_a_frozen_engine_refuses_a_server_that_nobody_would_start_again(ours, state, caplog):
    stop(ours, asleep=state == "asleep")
    ours.answers["/vgen/info"]["lease"] = None
    with pytest.raises(EngineError, match=rf"is {state}: its trainer must call wake_up\(\) or resume\(\)"):
        generation(ours, frozen=True)
    ours.answers["/vgen/info"]["lease"] = {"holder": "a trainer"}
    with generation(ours, frozen=True):  # its trainer may have paused it for a weight sync
        assert "its trainer must call" in caplog.text


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
@pytest.mark.fault(
    point="a server that another client changed",
    did="A client pauses the server or puts it to sleep during a call",
    happens="The error says which state keeps the call waiting",
    within=60,
)
def test_a_server_that_another_client_stops_explains_why_nothing_was_answered(features):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as server, generation(server, timeout=1.0) as made:
        made.sync_weights(verify="none")
        stop(server, asleep=False)
        server.faults[path] = ["silent"]
        with pytest.raises(EngineError, match=r"the server is paused: another client.*sync_weights\(\) starts it"):
            made.generate([[1]])


@pytest.mark.fault(
    point="a server that restarts or fails an update",
    did="The server says that its last update failed",
    happens="It gets no requests until a sync",
    within=60,
)
def test_a_server_whose_weight_update_has_failed_gets_no_requests_until_a_sync():
    features = ("batch", "lease", "weights_state")
    one, other = FaultyServer(features=features), FaultyServer(features=features)
    with one, other, generation(one, other) as made:
        made.sync_weights(version="1")
        other.answers["/vgen/info"]["weights"] = "failed"
        other.faults[BATCH] = [503] * 40
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        asked = len(calls(other, BATCH))
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        assert len(calls(other, BATCH)) == asked
        other.faults.clear()
        other.answers["/vgen/info"]["weights"] = "ready"
        made.sync_weights(version="2")
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        assert len(calls(other, BATCH)) > asked


@pytest.mark.parametrize(("device", "level", "kept"), [("cuda", 2, False), ("cuda", 1, True), ("cpu", 2, True)])
def test_the_verifier_hears_of_the_first_sleep_of_each_level(server, monkeypatch, device, level, kept):
    server.answers["/server_info"]["vllm_config"]["device_config"]["device"] = device
    heard = list[tuple[list, int, bool]]()
    with generation(server) as made:
        monkeypatch.setattr(
            made.engine._verifier,
            "before_sleep",
            lambda due, level, *, keeps_weights: heard.append((list(due), level, keeps_weights)),
        )
        made.sleep(level)
        made.wake_up()
        made.sleep(level)
        endpoints = list(made.engine.endpoints)
    assert heard == [(endpoints, level, kept), ([], level, kept)]


def test_a_pause_is_known_of_every_server_and_a_pause_that_failed_of_none(server):
    with FaultyServer() as other, generation(server, other) as made:
        made.sync_weights(verify="none")
        made.pause()
        assert [endpoint.stopped for endpoint in made.engine.endpoints] == [True, True]
        made.resume()
        assert [endpoint.stopped for endpoint in made.engine.endpoints] == [False, False]
        other.faults["/pause"] = [500]
        with pytest.raises(EngineError):
            made.pause()
        assert [endpoint.stopped for endpoint in made.engine.endpoints] == [False, False]


def test_only_servers_that_were_compared_after_a_pause_count_as_verified(server, monkeypatch):
    with FaultyServer() as other, FaultyServer() as third, generation(server, other, third) as made:
        made.sync_weights(verify="none")
        one, two, three = made.engine.endpoints
        monkeypatch.setattr(made.engine._verifier, "resume", lambda trace: [two])
        one.verified, two.verified, three.verified = False, False, True
        made.pause()
        made.resume()
        assert (one.verified, two.verified, three.verified) == (False, True, True)


async def test_what_fails_while_connections_are_closed_does_not_keep_the_others_open():
    closed = list[str]()

    def end(name: str, fails: bool = False):
        async def run() -> None:
            closed.append(name)
            if fails:
                raise OSError(name)

        return run

    endpoints = [
        SimpleNamespace(lease=SimpleNamespace(release=end("first lease", fails=True))),
        SimpleNamespace(lease=None),
        SimpleNamespace(lease=SimpleNamespace(release=end("second lease"))),
    ]
    clients = [SimpleNamespace(close=end("first client", fails=True)), SimpleNamespace(close=end("second client"))]
    await disconnect(endpoints, clients)
    assert closed == ["first lease", "second lease", "first client", "second client"]
