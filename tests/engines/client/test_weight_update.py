"""A weight sync to servers, as calls in their order: what each kind of server is asked for, and what spans say."""

from __future__ import annotations

from typing import Any

import pytest

from vgen import ProfilingContext, ServerConnection, ServerGeneration, WeightSyncError
from vgen.engines.audit_report import audit_attributes
from vgen.errors import error_to_dict
from vgen.profiling import semconv
from vgen.testing import FaultyServer, MemorySink

torch = pytest.importorskip("torch")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")
pytest.importorskip("safetensors")

CACHES = {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"}
BUCKETS = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
FOLDER, HOST = "servers without vgen's plugin reload from a folder", "servers with vgen's plugin on this host"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"get_text_config": lambda self: type("Text", (), {"vocab_size": 100})()})()
        self.weight = torch.nn.Parameter(torch.ones(2))


def synced(*servers: FaultyServer, version: str = "1", **more: Any) -> MemorySink:
    """Sync once, and forget what the servers were asked before."""
    sink = MemorySink()
    keys: dict[str, Any] = {"connection": ServerConnection(timeout=20.0), "profiling": ProfilingContext([sink]), **more}
    with ServerGeneration(Model(), base_urls=[server.url for server in servers], **keys) as generation:
        for server in servers:
            server.seen.clear()
        generation.sync_weights(version=version, verify="none")
    return sink


def paths(server: FaultyServer) -> list[str]:
    """The calls that change the server, caches in any order."""
    called = [path.partition("?")[0] for path, _, _ in server.seen]
    others = ("/weight_info", "/is_sleeping", "/vgen/lease/renew", "/vgen/lease/release")
    return [path for path in called if path not in others]


def phases(sink: MemorySink) -> list[str]:
    named = [
        span.name.rpartition(".") for span in sink.spans if span.parent and span.parent.name == semconv.WEIGHT_SYNC
    ]
    return [phase for _, _, phase in named]


def test_a_stock_server_is_paused_after_the_folder_is_written_and_reloads_it():
    with FaultyServer() as server:
        sink = synced(server)
        called = paths(server)
    assert called[:3] == ["/pause", "/collective_rpc", "/update_weight_version"]
    assert (set(called[3:6]), called[6:]) == (CACHES, ["/resume"])
    assert phases(sink) == ["audit", "transfer", "pause", "load", "reset_cache", "resume"]
    (span,) = sink.named(semconv.WEIGHT_SYNC)
    assert (span.attributes[semconv.TRANSPORT], span.attributes[semconv.TRANSPORT_REASON]) == ("checkpoint", FOLDER)
    assert (span.attributes[semconv.PLAN_WAY], span.attributes[semconv.SYNC_RECEIVERS]) == ("reload", 1)
    assert span.attributes[semconv.PAUSED_SECONDS] > 0


def test_a_server_with_the_plugin_gets_buckets_between_pause_and_reset():
    with FaultyServer(features=["batch", "lease", "shared_memory", "pause"]) as server:
        sink = synced(server)
        called = paths(server)
    assert called[:5] == ["/vgen/pause", *BUCKETS]
    assert (set(called[5:8]), called[8:]) == (CACHES, ["/resume"])
    assert phases(sink) == ["pause", "transfer", "load", "reset_cache", "resume"]
    (span,) = sink.named(semconv.WEIGHT_SYNC)
    assert (span.attributes[semconv.TRANSPORT], span.attributes[semconv.TRANSPORT_REASON]) == ("shared_memory", HOST)
    transfer, load = sink.named(semconv.SYNC_TRANSFER)[0], sink.named(semconv.SYNC_LOAD)[0]
    for phase in (transfer, load):
        least, middle, most = [
            phase.attributes[name] for name in (semconv.RECEIVER_MIN, semconv.RECEIVER_MEDIAN, semconv.RECEIVER_MAX)
        ]
        assert 0 < least == middle == most
    assert transfer.attributes[semconv.BUCKETS] == 1


def test_different_servers_are_paused_together_and_each_gets_its_transport():
    with FaultyServer() as stock, FaultyServer(features=["batch", "lease", "shared_memory"]) as ours:
        sink = synced(stock, ours)
    (span,) = sink.named(semconv.WEIGHT_SYNC)
    assert span.attributes[semconv.TRANSPORT] == "checkpoint+shared_memory"
    assert span.attributes[semconv.TRANSPORT_REASON] == f"{FOLDER}; {HOST}"
    assert phases(sink) == ["audit", "transfer", "pause", "transfer", "load", "load", "reset_cache", "resume"]


def test_a_server_of_vgen_without_the_plugin_reloads_a_folder():
    with FaultyServer(features=["batch", "lease"]) as server:
        sink = synced(server)
    assert sink.named(semconv.WEIGHT_SYNC)[0].attributes[semconv.TRANSPORT] == "checkpoint"


def test_weights_that_another_trainer_has_sent_are_reported_and_replaced(caplog):
    with FaultyServer() as server:
        server.answers["/weight_info"] = {"weight_version": "0"}
        sink = MemorySink()
        with ServerGeneration(Model(), base_urls=server.url, profiling=ProfilingContext([sink])) as generation:
            server.answers["/weight_info"] = {"weight_version": "another's"}
            generation.sync_weights(verify="none")
    (span,) = sink.named(semconv.WEIGHT_SYNC)
    assert span.attributes[semconv.FOREIGN_VERSION] == "another's"
    assert "sent by another trainer" in caplog.text


@pytest.mark.fault(
    point="an API server that is silent",
    did="A server cannot be reached before a weight sync",
    happens="`WeightSyncError` names it; no server is paused",
    within=60,
)
def test_servers_that_cannot_be_reached_are_an_error_and_are_asked_for_nothing_else():
    with FaultyServer() as server:
        with ServerGeneration(Model(), base_urls=server.url, connection=ServerConnection(timeout=5.0)) as generation:
            server.seen.clear()
            server.faults["/weight_info"] = ["reset"] * 9
            with pytest.raises(WeightSyncError) as caught:
                generation.sync_weights(verify="none")
        assert (caught.value.phase, caught.value.receiver) == ("pause", server.url)
        assert paths(server) == []


PLUGIN = ["batch", "lease", "recorded", "memory"]
PASSED = {"unaudited": "", "narrowed": ["weight"]}


def audits_of(server: FaultyServer) -> list[dict[str, Any]]:
    bodies = [body for path, _, body in server.seen if path == "/collective_rpc"]
    return [body["kwargs"] for body in bodies if body["method"] == "vgen_audit"]


def audit_attributes_of(sink: MemorySink) -> tuple[Any, ...]:
    attributes = sink.named(semconv.WEIGHT_SYNC)[-1].attributes
    return tuple(attributes.get(name) for name in (semconv.AUDIT, semconv.AUDIT_REASON, semconv.AUDIT_NARROWED))


def test_workers_audit_what_vllm_will_load_before_they_are_paused_and_only_once():
    sink, model = MemorySink(), Model()
    with FaultyServer(features=PLUGIN) as server:
        server.answers["/collective_rpc"] = {"results": [{"unaudited": "", "narrowed": []}, PASSED]}
        with ServerGeneration(
            model, base_urls=server.url, weight_transport="checkpoint", profiling=ProfilingContext([sink])
        ) as generation:
            generation.sync_weights(verify="none")
            assert audits_of(server) == [{"forms": [["weight", "float32", [2]]], "ties": {}}]
            called = paths(server)
            assert called.index("/collective_rpc") < called.index(
                "/vgen/pause" if "/vgen/pause" in called else "/pause"
            )
            generation.sync_weights(verify="none")
            assert len(audits_of(server)) == 1
            assert audit_attributes_of(sink) == ("passed", None, ["weight"])
            model.head = torch.nn.Parameter(torch.ones(2))
            model.other = model.head
            generation.sync_weights(verify="none")
            assert audits_of(server)[1]["ties"] == {"other": "head"}
            model.other = torch.nn.Parameter(torch.ones(2))
            generation.sync_weights(verify="none")  # the same names and shapes, but untied
            assert audits_of(server)[2]["ties"] == {}


@pytest.mark.fault(
    point="a weight sync to servers",
    did="A worker refuses the tensors in the audit",
    happens="`WeightSyncError` names the tensor; nothing is paused",
    within=60,
)
def test_what_one_of_the_workers_refuses_is_raised_with_its_name_and_nothing_is_paused():
    refusal = WeightSyncError("no place for it", phase="load", parameter="weight", receiver="server")
    with FaultyServer(features=PLUGIN) as server:
        server.answers["/collective_rpc"] = {"results": [PASSED, {"error": error_to_dict(refusal)}]}
        with ServerGeneration(Model(), base_urls=server.url, weight_transport="checkpoint") as generation:
            for _ in range(2):
                with pytest.raises(WeightSyncError, match="no place for it") as caught:
                    generation.sync_weights(verify="none")
                assert (caught.value.phase, caught.value.parameter) == ("load", "weight")
            assert len(audits_of(server)) == 2  # a refusal is not remembered
            assert not {"/pause", "/vgen/pause"} & set(paths(server))


STOCK = {"device_config": {"device": "cpu"}, "model_config": {"logprobs_mode": "processed_logprobs", "model": "/m"}}


def test_what_stock_servers_will_load_is_audited_by_their_definition_once_for_all_replicas(monkeypatch):
    asked: list[Any] = []

    def audit(definition: Any, metadata: Any, ties: Any, receiver: str) -> dict[str, Any]:
        asked.append((definition["model"], definition["vllm_version"], metadata, ties))
        return PASSED

    monkeypatch.setattr("vgen.engines.client.weight_update.audit_definition", audit)
    with FaultyServer() as first, FaultyServer() as second:
        for server in (first, second):
            server.answers |= {"/server_info": {"vllm_config": STOCK}, "/version": {"version": "0.32.0"}}
        sink, model = MemorySink(), Model()
        with ServerGeneration(
            model, base_urls=[first.url, second.url], profiling=ProfilingContext([sink])
        ) as generation:
            assert generation.sync_weights(verify="none").audited
            assert generation.sync_weights(verify="none").audited
            expected = ("/m", "0.32.0", [("weight", (2,), torch.float32)], {})
            assert asked == [expected]
            assert audit_attributes_of(sink) == ("passed", None, ["weight"])
            model.more = torch.nn.Parameter(torch.ones(2))
            generation.sync_weights(verify="none")
            assert len(asked) == 2


@pytest.mark.fault(
    point="a weight sync to servers",
    did="A stock server would drop a tensor",
    happens="`WeightSyncError` before anything is written",
    within=60,
)
def test_what_a_stock_server_would_drop_is_refused_before_anything_is_written_or_paused(monkeypatch):
    def refuse(*_: Any) -> Any:
        raise WeightSyncError("no place for it", phase="load", parameter="weight", receiver="server")

    monkeypatch.setattr("vgen.engines.client.weight_update.audit_definition", refuse)
    with FaultyServer() as server, ServerGeneration(Model(), base_urls=server.url) as generation:
        for _ in range(2):
            with pytest.raises(WeightSyncError, match="no place for it"):
                generation.sync_weights(verify="none")
        assert not {"/pause", "/collective_rpc"} & set(paths(server))


def test_a_sync_to_a_stock_server_whose_model_is_unknown_here_is_unaudited_and_says_so_once(caplog):
    reason = "the server does not run vgen's plugin, and the configuration of its model, '', is not on this host"
    pytest.importorskip("vllm")
    with FaultyServer() as stock:
        assert audit_attributes_of(synced(stock)) == ("unaudited", reason, None)
    assert caplog.text.count(reason) == 1


def test_several_audits_are_one():
    assert audit_attributes([PASSED, {"unaudited": "", "narrowed": ["a", "weight"]}]) == {
        semconv.AUDIT: "passed",
        semconv.AUDIT_REASON: None,
        semconv.AUDIT_NARROWED: ["a", "weight"],
    }
    reasons = audit_attributes([PASSED, {"unaudited": "why"}, {"unaudited": "why"}, {}])
    assert reasons[semconv.AUDIT] == "unaudited"
    assert reasons[semconv.AUDIT_REASON] == "why; the server does not report it"


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
def test_the_version_that_a_server_holds_is_its_own_answer_with_and_without_a_lease(features, caplog):
    sink = MemorySink()
    with FaultyServer(features=features) as server:
        connection = ServerConnection(timeout=20.0)
        with ServerGeneration(
            Model(), base_urls=server.url, connection=connection, profiling=ProfilingContext([sink])
        ) as generation:
            generation.sync_weights(version="1", verify="none")
            server.answers["/weight_info"] = {"weight_version": "theirs"}
            generation.sync_weights(version="2", verify="none")
    assert [sync.attributes.get(semconv.FOREIGN_VERSION) for sync in sink.named(semconv.WEIGHT_SYNC)] == [
        None,
        "theirs",
    ]
    assert "another trainer" in caplog.text


@pytest.mark.parametrize(
    ("workers", "way", "reason"),
    [
        ([[("recorded", "")], [("recorded", "")]], "recorded", None),
        ([[("recorded", "")], [("reload", "it repacks")]], "recorded+reload", "it repacks"),
        ([[("reload", "it repacks")], [("reload", "it repacks")]], "reload", "it repacks"),
        ([[("recorded", ""), ("reload", "one worker repacks")], [("reload", "it fuses")]], "reload", None),
    ],
)
def test_how_servers_have_loaded_their_weights_is_on_the_span(workers, way, reason):
    reason = reason or ("one worker repacks; it fuses" if way == "reload" else None)
    features = ["batch", "lease", "shared_memory", "pause", "recorded", "memory"]
    with FaultyServer(features=features) as first, FaultyServer(features=features) as second:
        for server, ways in zip((first, second), workers, strict=True):
            results = [{"way": each, "reason": why} for each, why in ways]
            server.answers["/collective_rpc"] = {"results": results}
        sink = synced(first, second)
    (span,) = sink.named(semconv.WEIGHT_SYNC)
    assert span.attributes[semconv.PLAN_WAY] == way
    assert span.attributes.get(semconv.PLAN_REASON) == reason


def test_a_sync_when_every_server_is_lost_says_that_none_can_be_reached():
    with FaultyServer() as first, FaultyServer() as second:
        urls = [first.url, second.url]
        with ServerGeneration(Model(), base_urls=urls, connection=ServerConnection(timeout=2.0)) as generation:
            generation.sync_weights(verify="none")
            for endpoint in generation.engine.endpoints:
                endpoint.lost = True
            first.close()
            second.close()
            with pytest.raises(WeightSyncError, match="no server can be reached") as caught:
                generation.sync_weights(verify="none")
    assert (caught.value.phase, caught.value.receiver) == ("pause", f"{first.url}, {second.url}")
