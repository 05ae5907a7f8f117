"""One base URL that is a router: it generates, and what would reach one server of several is refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from helpers import routers
from helpers.server_generation import BATCH, COMPLETIONS, Model

from vgen import EngineStateError, Sampling, ServerConnection, ServerGeneration, WeightSyncError
from vgen.testing import FaultyServer

CHANGES = ("/pause", "/sleep", "/collective_rpc", "/vgen/lease", "/start_weight_update", "/update_weights")


def pair(stack: ExitStack, kind: str) -> list[FaultyServer]:
    """Two servers, in development mode: stock ones, or as `vgen serve` starts them."""
    features = ["batch", "lease", "shared_memory"] if kind == "vgen" else []
    servers = [stack.enter_context(FaultyServer(features=features, vocabulary_size=100)) for _ in range(2)]
    for name, server in zip("ab", servers, strict=True):
        server.answers["/vgen/instance"] = {"instance": name}
        server.answers["/server_info"]["vllm_config"]["instance_id"] = name
    return servers


def paths(server: FaultyServer) -> list[str]:
    return [path.partition("?")[0] for path, _, _ in server.seen]


def generates_and_changes_nothing(url: str, servers: list[FaultyServer], caplog) -> None:
    prompts = [[1 + i, 2, 3] for i in range(20)]
    connection = ServerConnection(timeout=30.0)
    with ServerGeneration(None, base_urls=url, connection=connection) as made:
        assert "is a router" in caplog.text
        rollouts = made.generate(prompts, Sampling(max_tokens=2), 2)
        assert [completion.token_ids for completion in rollouts] == [ids[:2] for ids in prompts for _ in range(2)]
        assert all(completion.timing is not None for completion in rollouts)
    with ServerGeneration(Model(), base_urls=url, connection=connection) as made:
        for call in (made.pause, made.sleep):
            with pytest.raises(EngineStateError, match="name the servers behind it in base_urls"):
                call()
        for call in (lambda: made.generate([[1]]), made.sync_weights):
            with pytest.raises(WeightSyncError, match="name the servers behind it in base_urls"):
                call()
    for server in servers:
        assert [path for path in paths(server) if path in CHANGES or path == BATCH] == []


@pytest.mark.parametrize("kind", ["stock", "vgen"])
def test_a_router_generates_and_takes_no_weights(caplog, kind):
    with ExitStack() as stack:
        servers = pair(stack, kind)
        url = stack.enter_context(routers.round_robin([server.url for server in servers]))
        generates_and_changes_nothing(url, servers, caplog)
        assert all(COMPLETIONS in paths(server) for server in servers)


def test_a_proxy_in_front_of_one_server_changes_nothing(caplog):
    pytest.importorskip("safetensors")
    with ExitStack() as stack:
        server, _ = pair(stack, "vgen")
        url = stack.enter_context(routers.round_robin([server.url]))
        with ServerGeneration(Model(), base_urls=url, connection=ServerConnection(timeout=30.0)) as made:
            assert len(made.generate([[1, 2], [3]])) == 2
            made.pause()
            made.resume()
        assert BATCH in paths(server)
        assert "is a router" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["round_robin", "cache_aware", "consistent_hash"])
@pytest.mark.parametrize("kind", ["stock", "vgen"])
def test_vllms_own_router_is_known_however_it_chooses(caplog, kind, policy):
    pytest.importorskip("vllm_router", reason="vllm-router is not installed: pip install 'vgen[router]'")
    with ExitStack() as stack:
        servers = pair(stack, kind)
        for server in servers:
            server.answers["/v1/models"]["data"][0]["object"] = "model"  # it asks for more than vgen does
        url = stack.enter_context(routers.vllm_router([server.url for server in servers], policy))
        generates_and_changes_nothing(url, servers, caplog)


def test_a_router_in_front_of_one_server_is_known_by_its_list_of_servers(caplog):
    with ExitStack() as stack:
        server, _ = pair(stack, "stock")
        server.answers["/workers"] = {"workers": [server.url]}
        generates_and_changes_nothing(server.url, [server], caplog)
