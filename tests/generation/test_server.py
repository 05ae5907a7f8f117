"""How `ServerGeneration` is constructed. What it does with servers is in tests/engines/client and tests/real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vgen import ServerConnection, ServerError, ServerGeneration, WeightSyncError, WeightSyncOptions
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import FaultyServer, MemorySink

torch = pytest.importorskip("torch", reason="torch is not installed: it comes with the engine")
CONNECTION = ServerConnection(timeout=20.0)


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))


@pytest.fixture
def server():
    with FaultyServer() as started:
        yield started


def test_one_address_may_be_given_as_text_and_its_span_names_the_model(server):
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    with ServerGeneration(None, base_urls=server.url, connection=CONNECTION, profiling=profiling) as generation:
        assert len(generation.generate([[1, 2]])) == 1
    (span,) = sink.named(semconv.ENGINE_INIT)
    assert span.attributes[semconv.ENGINE] == "server"
    assert span.attributes[semconv.MODEL] == generation.engine.model


def test_no_address_at_all_is_an_error_that_names_the_argument():
    with pytest.raises(ValueError, match="base_urls must hold the address of a server"):
        ServerGeneration(Model(), base_urls=[])


@pytest.mark.fault(
    point="an API server that is silent",
    did="No server listens at the address",
    happens="`ServerError` names the address within the timeout",
    within=60,
)
def test_a_server_that_is_not_there_is_an_error_within_the_timeout():
    with FaultyServer() as gone:
        url = gone.url
    with pytest.raises(ServerError):
        ServerGeneration(Model(), base_urls=url, connection=ServerConnection(timeout=5.0, connect_timeout=1.0))


@pytest.mark.parametrize("held", ["default", "7"])
def test_the_trainers_weights_go_before_the_first_generation_whatever_the_server_holds(server, held):
    server.answers["/weight_info"] = {"weight_version": held}
    sink = MemorySink()
    options = dict(weight_version="7", profiling=ProfilingContext([sink]), connection=CONNECTION)
    with ServerGeneration(Model(), base_urls=server.url, **options) as generation:
        generation.generate([[1, 2]])
        generation.generate([[1, 2]])
    (sync,) = sink.named(semconv.WEIGHT_SYNC)
    assert sync.attributes[semconv.WEIGHT_VERSION] == "7"
    assert sync.parent_id == sink.named(semconv.GENERATE)[0].span_id


def test_a_server_that_takes_no_weights_generates_only_without_a_model(server):
    del server.answers["/server_info"]  # it is not in development mode
    with (
        ServerGeneration(Model(), base_urls=server.url, connection=CONNECTION) as generation,
        pytest.raises(WeightSyncError, match=r"it takes no weights: .* pass None in place of the model"),
    ):
        generation.generate([[1, 2]])
    assert not [body for path, _, body in server.seen if path == "/v1/completions"]
    with ServerGeneration(None, base_urls=server.url, connection=CONNECTION) as generation:
        assert len(generation.generate([[1, 2]])) == 1


def test_a_model_without_a_config_is_no_obstacle(server):
    with ServerGeneration(torch.nn.Linear(2, 2), base_urls=server.url, connection=CONNECTION) as generation:
        assert generation.engine.model == "tiny"


def test_the_options_of_a_weight_sync_reach_the_engine(server):
    options = WeightSyncOptions(pause_mode="wait")
    with ServerGeneration(Model(), base_urls=server.url, connection=CONNECTION, weight_sync=options) as generation:
        assert generation.engine.pause_mode == "wait"


@pytest.mark.parametrize("keyword", ["timeout", "request_spans", "bucket_bytes", "host"])
def test_a_keyword_of_old_is_pythons_own_error(keyword):
    with pytest.raises(TypeError, match=keyword):
        ServerGeneration(Model(), **{keyword: 1})


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (29500, 29501)])
def test_weights_travel_beside_the_ranks_port(monkeypatch, given, expected):
    """At a port of their own, or at any free one."""
    from vgen.engines.client import engine

    made = []

    def construct(*_, **settings):
        made.append(settings["weights_port"])
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.ServerEngine, "__init__", construct)
    with FaultyServer() as server, pytest.raises(KeyboardInterrupt):
        ServerGeneration(Model(), base_urls=server.url, connection=ServerConnection(group_port=given))
    assert made == [expected]
