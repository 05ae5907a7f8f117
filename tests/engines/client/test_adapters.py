"""Adapters of servers: each state of a folder is loaded once, and what is in flight keeps its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.server_generation import BATCH, COMPLETIONS, calls, generation
from helpers.waiting import wait_until

from vgen import LoRARequest, Sampling, completion_codec
from vgen.testing import FaultyServer

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
GREEDY = Sampling(max_tokens=2, logprobs=None)


@pytest.fixture(params=[(), ("batch", "lease")], ids=["stock", "vgen serve"])
def server(request):
    with FaultyServer(features=request.param) as made:
        made.path = BATCH if request.param else COMPLETIONS
        yield made


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_model.safetensors").write_bytes(b"1")
    return made


@pytest.fixture
def policy(folder):
    return LoRARequest(lora_name="policy", lora_path=str(folder))


def asked_of(server) -> list[str]:
    """The adapters that the requests for completions have named."""
    bodies = calls(server, server.path)
    if server.path == COMPLETIONS:
        return [body["model"] for body in bodies]
    return [completion_codec.decode_request(body["batch"]).lora_name or "tiny" for body in bodies]


def rewrite(folder, content=b"another"):
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_a_hundred_requests_load_an_adapter_once_and_none_orders_it_again(server, policy):
    with generation(server) as made:
        for _ in range(100):
            made.generate([[1, 2, 3]], GREEDY, lora_request=policy)
    (load,) = calls(server, LOAD)
    assert load.keys() == {"lora_name", "lora_path"}
    assert set(asked_of(server)[-100:]) == {load["lora_name"]}
    assert load["lora_name"].startswith("policy@")


@pytest.mark.fault(
    point="an adapter behind a server",
    did="The adapter's folder is removed after the first request",
    happens="Later requests are sampled with the same adapter",
    within=60,
)
def test_the_server_reads_a_copy_that_nobody_rewrites_or_removes(server, policy, folder):
    with generation(server) as made:
        made.generate([[1]], GREEDY, lora_request=policy)
        (load,) = calls(server, LOAD)
        copy = Path(load["lora_path"])
        assert copy.parent == folder.parent
        shutil.rmtree(folder)
        made.generate([[1]], GREEDY, lora_request=policy)
        made.generate([[1]], GREEDY, lora_request=LoRARequest(lora_name="policy"))
        assert (copy / "adapter_model.safetensors").read_bytes() == b"1"
    assert asked_of(server)[-2:] == [load["lora_name"]] * 2
    assert len(calls(server, LOAD)) == 1


def test_a_rewritten_folder_is_another_version_and_what_is_in_flight_keeps_its_own(server, policy, folder):
    with generation(server) as made:
        stream = made.stream([[1], [2]], GREEDY, lora_request=policy)
        next(stream)
        rewrite(folder)
        made.generate([[1]], GREEDY, lora_request=policy)
        old, new = calls(server, LOAD)
        assert asked_of(server)[-1] == new["lora_name"] != old["lora_name"]
        assert (Path(old["lora_path"]) / "adapter_model.safetensors").read_bytes() == b"1"
        assert (Path(new["lora_path"]) / "adapter_model.safetensors").read_bytes() == b"another"
        assert not calls(server, UNLOAD)
        list(stream)
        (unload,) = wait_until(lambda: calls(server, UNLOAD))
        assert unload == {"lora_name": old["lora_name"]}
        assert not Path(old["lora_path"]).exists()
        assert len(calls(server, "/reset_prefix_cache")) <= 1  # of the first sync: nothing is taken from the others


def test_a_version_that_nobody_uses_goes_at_once(server, policy, folder):
    with generation(server) as made:
        for step in range(3):
            rewrite(folder, b"%d" % step * (step + 1))
            made.generate([[1]], GREEDY, lora_request=policy)
        names = [load["lora_name"] for load in calls(server, LOAD)]
        wait_until(lambda: [body["lora_name"] for body in calls(server, UNLOAD)] == names[:2])
        assert len(list(folder.parent.iterdir())) == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_a_server_that_cannot_see_the_copy_gets_the_folder(server, policy, folder):
    """It runs on another machine, which has the folder too."""
    with generation(server) as made:
        server.faults[LOAD] = [404]
        made.generate([[1]], GREEDY, lora_request=policy)
    assert [load["lora_path"] == str(folder) for load in calls(server, LOAD)] == [False, True]


@pytest.mark.fault(
    point="an adapter behind a server",
    did="The server cannot load the adapter",
    happens="`ValueError` names the folder; the next call tries again",
    within=60,
)
def test_an_adapter_that_a_server_refuses_is_an_error_that_names_the_folder(server, policy, folder):
    with generation(server) as made:
        server.faults[LOAD] = [400, 400]
        with pytest.raises(ValueError, match=rf"'policy' was not loaded from '{folder}': .*the server says no"):
            made.generate([[1]], GREEDY, lora_request=policy)
        made.generate([[1]], GREEDY, lora_request=policy)  # it is tried again


@pytest.mark.fault(
    point="an adapter behind a server",
    did="One of two servers is gone",
    happens="The other loads the adapter and answers",
    within=60,
)
def test_a_server_that_is_gone_does_not_keep_an_adapter_from_the_others(server, policy):
    with FaultyServer(features=["batch", "lease"]) as other, generation(server, other) as made:
        made.sync_weights(verify="none")
        server.close()
        assert made.generate([[1]], GREEDY, lora_request=policy)[0].server == other.url


def test_a_server_that_was_started_with_an_adapter_is_asked_for_it_by_name(server):
    with generation(server) as made:
        made.generate([[1]], GREEDY, lora_request=LoRARequest(lora_name="built in"))
    assert asked_of(server)[-1] == "built in"
    assert not calls(server, LOAD)


def test_a_server_that_has_an_adapter_already_is_not_asked_to_load_it_and_does_not_fail_the_call(server, policy):
    refuse_again = [None, 400]
    server.faults[LOAD] = refuse_again
    with generation(server) as made:
        made.generate([[1]], GREEDY, lora_request=policy)
        (load,) = calls(server, LOAD)
        server.answers["/v1/models"]["data"].append({"id": load["lora_name"]})
        for endpoint in made.engine.endpoints:
            endpoint.adapters.clear()  # as after a connection that was lost for a moment
        made.generate([[1]], GREEDY, lora_request=policy)
    assert [call["lora_name"] for call in calls(server, LOAD)] == [load["lora_name"]] * 2
    assert asked_of(server)[-1] == load["lora_name"]


def test_only_a_server_that_refuses_a_copy_is_asked_to_load_the_folder(policy):
    features = ("batch", "lease")
    with FaultyServer(features=features) as here, FaultyServer(features=features) as elsewhere:
        elsewhere.faults[LOAD] = [404]
        with generation(here, elsewhere) as made:
            made.generate([[1]] * 4, GREEDY, lora_request=policy)
        assert len(calls(here, LOAD)) == 1
        first, second = calls(elsewhere, LOAD)
    assert first["lora_path"] == calls(here, LOAD)[0]["lora_path"] != policy.lora_path
    assert second["lora_path"] == policy.lora_path
