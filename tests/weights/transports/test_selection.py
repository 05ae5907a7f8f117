"""Which transport serves which server: what each one says of itself, and the first that both sides can use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.transfers import PLUGIN, FakeEndpoint, FakeGroup

from vgen import WeightSyncError
from vgen.engines.server_api import Feature
from vgen.weights.source.module_source import ModuleSource
from vgen.weights.transports import collective, cuda_ipc, vllm_engines
from vgen.weights.transports.selection import choose, refusal, transports_of
from vgen.weights.transports.weight_transport import TransportSettings, TransportUnavailable

GPU, HERS, ITS = torch.device("cuda", 0), frozenset({"the trainer's"}), frozenset({"the server's"})
ENDPOINTS = {
    "stock": FakeEndpoint(),
    "stock with nccl": FakeEndpoint(device_type="cuda", backend="nccl"),
    "stock with ipc": FakeEndpoint(device_type="cuda", backend="ipc"),
    "older vgen": FakeEndpoint(features=frozenset({"shared_memory"}), host=""),
    "vgen without plugin": FakeEndpoint(features=frozenset({"batch", "lease"})),
    "trainer's GPU": FakeEndpoint(features=PLUGIN, device_type="cuda", devices=HERS),
    "another GPU": FakeEndpoint(features=PLUGIN, device_type="cuda", devices=ITS),
    "another host's GPU": FakeEndpoint(features=PLUGIN, device_type="cuda", devices=ITS, host="another"),
    "this CPU": FakeEndpoint(features=PLUGIN),
    "another CPU": FakeEndpoint(features=PLUGIN, host="another"),
}
SERVE, NO_GPU = "start it with `vgen serve`", "the trainer's model is not on a GPU"
HOST, OTHER = "it is on another host than the trainer", "not on the trainer's own GPU"
INSTEAD = "`resident` takes its place on a server that `vgen serve` has started"
NCCL = """start it with --weight-transfer-config '{"backend": "nccl"}'"""
IPC = """start it with --weight-transfer-config '{"backend": "ipc"}'"""
CPU, HER_GPU = "it is not on a GPU, as nccl needs it", "it is on the trainer's own GPU"
NCCL_GPU, IPC_GPU = f"{NO_GPU}, as nccl needs it", f"{NO_GPU}, as ipc needs it"

# Of each server, with a trainer on a GPU: resident, nccl, shared_memory, gloo, vLLM's nccl, vLLM's ipc, checkpoint.
ON_GPU = {
    "stock": [SERVE, SERVE, SERVE, SERVE, NCCL, IPC, None],
    "stock with nccl": [SERVE, SERVE, SERVE, SERVE, None, IPC, None],
    "stock with ipc": [SERVE, SERVE, SERVE, SERVE, NCCL, None, None],
    "older vgen": [SERVE, SERVE, None, SERVE, NCCL, INSTEAD, None],
    "vgen without plugin": [SERVE, SERVE, SERVE, SERVE, NCCL, INSTEAD, None],
    "trainer's GPU": [None, HER_GPU, None, None, NCCL, INSTEAD, None],
    "another GPU": [OTHER, None, None, None, NCCL, INSTEAD, None],
    "another host's GPU": [OTHER, None, HOST, None, NCCL, INSTEAD, None],
    "this CPU": [OTHER, CPU, None, None, NCCL, INSTEAD, None],
    "another CPU": [OTHER, CPU, HOST, None, NCCL, INSTEAD, None],
}
# With a trainer on the CPU.
ON_CPU = {
    **ON_GPU,
    "stock with nccl": [SERVE, SERVE, SERVE, SERVE, NCCL_GPU, IPC, None],
    "stock with ipc": [SERVE, SERVE, SERVE, SERVE, NCCL, IPC_GPU, None],
    "trainer's GPU": [NO_GPU, NCCL_GPU, None, None, NCCL, INSTEAD, None],
    "another GPU": [NO_GPU, NCCL_GPU, None, None, NCCL, INSTEAD, None],
    "another host's GPU": [NO_GPU, NCCL_GPU, HOST, None, NCCL, INSTEAD, None],
    "this CPU": [NO_GPU, NCCL_GPU, None, None, NCCL, INSTEAD, None],
    "another CPU": [NO_GPU, NCCL_GPU, HOST, None, NCCL, INSTEAD, None],
}
CHOSEN = {
    "stock": ("checkpoint", "checkpoint"),
    "stock with nccl": ("nccl", "checkpoint"),
    "stock with ipc": ("checkpoint", "checkpoint"),
    "older vgen": ("shared_memory", "shared_memory"),
    "vgen without plugin": ("checkpoint", "checkpoint"),
    "trainer's GPU": ("resident", "shared_memory"),
    "another GPU": ("nccl", "shared_memory"),
    "another host's GPU": ("nccl", "gloo"),
    "this CPU": ("shared_memory", "shared_memory"),
    "another CPU": ("gloo", "gloo"),
}
"""With a trainer on a GPU, and on the CPU."""


class Table:
    """Stands for the handles of a model on a GPU."""

    def __init__(self, source: Any) -> None: ...


@pytest.fixture
def trainer(monkeypatch, request) -> Any:
    """A source of a model on the device that the test asks for."""
    for module in (cuda_ipc, collective, vllm_engines):
        monkeypatch.setattr(module, "source_gpu", lambda source: request.param)
    for module in (cuda_ipc, collective):
        monkeypatch.setattr(module, "uuid_of", lambda device: "the trainer's")
    monkeypatch.setattr(cuda_ipc, "HandleTable", Table)
    monkeypatch.setattr(vllm_engines, "available", lambda: True)
    monkeypatch.setattr(vllm_engines, "find_nccl", lambda: None)
    return ModuleSource(torch.nn.Linear(1, 1))


def chosen(endpoints: Any, source: Any, name: Any = None) -> Any:
    transports = transports_of(TransportSettings())
    return choose(transports, endpoints, source, name=name, group_of=lambda served: FakeGroup(None, *served))


@pytest.mark.parametrize(
    ("trainer", "endpoint", "reasons"),
    [(GPU, name, reasons) for name, reasons in ON_GPU.items()] + [(None, *item) for item in ON_CPU.items()],
    indirect=["trainer"],
)
def test_each_transport_says_why_it_cannot_serve_a_server(trainer, endpoint, reasons):
    transports = transports_of(TransportSettings())
    assert [each.supports(ENDPOINTS[endpoint], trainer) for each in transports] == reasons


@pytest.mark.parametrize(
    ("trainer", "endpoint", "name"),
    [(device, name, both[device is None]) for device in (GPU, None) for name, both in CHOSEN.items()],
    indirect=["trainer"],
)
def test_the_first_transport_that_supports_a_server_is_chosen(trainer, endpoint, name):
    assert chosen([ENDPOINTS[endpoint]], trainer).names == name


@pytest.mark.parametrize("trainer", [GPU], indirect=True)
def test_several_servers_are_grouped_and_named_in_their_own_order_and_reload_last(trainer):
    endpoints = [ENDPOINTS[name] for name in ("stock", "another GPU", "trainer's GPU", "stock with nccl")]
    choice = chosen(endpoints, trainer)
    assert choice.names == "checkpoint+nccl+resident"
    assert choice.reasons == (
        "servers without vgen's plugin reload from a folder; servers with vgen's plugin on other GPUs; "
        "servers on the trainer's own GPU; servers with vLLM's own NCCL engine"
    )
    assert [served for served in choice.served.values()] == [[endpoints[i]] for i in (2, 1, 3, 0)]


@pytest.mark.parametrize("trainer", [GPU], indirect=True)
@pytest.mark.fault(
    point="the choice of a transport",
    did="A transport cannot be opened",
    happens="The next one is used, and the span says why",
    within=20,
)
def test_a_transport_that_cannot_be_opened_makes_room_for_the_next_and_says_why(trainer, monkeypatch):
    def sharded(source: Any) -> None:
        raise TransportUnavailable("the model is sharded")

    monkeypatch.setattr(cuda_ipc, "HandleTable", sharded)
    choice = chosen([ENDPOINTS["trainer's GPU"]], trainer)
    assert choice.names == "shared_memory"
    assert choice.reasons == "servers with vgen's plugin on this host; not resident: the model is sharded"
    with pytest.raises(WeightSyncError, match="the model is sharded") as caught:
        chosen([ENDPOINTS["trainer's GPU"]], trainer, "resident")
    assert (caught.value.phase, caught.value.receiver) == ("gather", "trainer")


@pytest.mark.parametrize("trainer", [GPU], indirect=True)
@pytest.mark.fault(
    point="the choice of a transport",
    did="A server cannot take the transport that was asked for",
    happens="`WeightSyncError` names the server",
    within=20,
)
def test_a_transport_that_was_asked_for_is_used_or_the_error_names_the_servers(trainer):
    assert chosen([ENDPOINTS["another GPU"]], trainer, "gloo").reasons == "asked for"
    assert chosen([ENDPOINTS["stock with ipc"]], trainer, "ipc").names == "ipc"
    both = chosen([ENDPOINTS["another GPU"], ENDPOINTS["stock with nccl"]], trainer, "nccl")
    assert (both.names, len(both.served)) == ("nccl", 2)  # vgen's and vLLM's own
    others = [FakeEndpoint(name, PLUGIN, "cuda", ITS) for name in ("one", "two")]
    with pytest.raises(WeightSyncError, match=OTHER) as caught:
        chosen([ENDPOINTS["trainer's GPU"], *others], trainer, "resident")
    assert (caught.value.phase, caught.value.receiver) == ("transfer", "one, two")


@pytest.mark.parametrize(
    ("endpoint", "name", "says"),
    [
        ("stock", None, ""),
        ("stock", "checkpoint", ""),
        ("stock", "resident", SERVE),
        ("stock", "nccl", f"{SERVE}, or {NCCL}"),
        ("stock", "gloo", SERVE),
        ("stock with ipc", "ipc", ""),
        ("trainer's GPU", "ipc", INSTEAD),
        ("trainer's GPU", "resident", ""),
        ("older vgen", "nccl", f"{SERVE}, or {NCCL}"),
        ("another CPU", "shared_memory", HOST),
    ],
)
@pytest.mark.parametrize("trainer", [None], indirect=True)
def test_a_server_that_cannot_take_what_was_asked_for_is_known_before_there_is_a_source(trainer, endpoint, name, says):
    assert refusal(ENDPOINTS[endpoint], name) == says


def test_features_that_transports_ask_for_are_those_that_servers_announce():
    announced = {Feature.SHARED_MEMORY, Feature.GROUP, Feature.RESIDENT}
    assert announced == PLUGIN
