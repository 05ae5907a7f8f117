"""Weights that are read where they lie: what can be, and how the servers hear of it. The reading itself needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vgen import WeightSyncError
from vgen.engines.control import this_host
from vgen.engines.peer import Peer
from vgen.engines.update import _kind
from vgen.weights import resident
from vgen.weights.resident import UNKNOWN, NotResident, ResidentTransfer, Table
from vgen.weights.source import source_of


class Lying:
    """Stands for a model on a GPU."""

    name = "one"

    def settle(self) -> None: ...

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "handles": [], "tensors": []}


class Servers:
    """Answer with `errors`, one after the other, and then well."""

    def __init__(self, *errors: str) -> None:
        self.errors, self.calls = list(errors), list[tuple[Any, ...]]()

    def whole_update(self, update_info: Any, version: str | None, init_info: Any = None) -> None:
        self.calls.append((update_info, version, init_info))
        if self.errors:
            raise RuntimeError(self.errors.pop(0))

    def update_weights(self, update_info: Any) -> None:
        self.calls.append(("update", update_info))
        raise RuntimeError("its trainer gave it up")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish",))


UPDATE = {"table": "one", "verify": False, "last": True}
SHORT, LONG = (UPDATE, "7", None), (UPDATE, "7", {"table": {"name": "one", "handles": [], "tensors": []}})


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ([], [SHORT]),
        ([f"500: Worker failed with error {UNKNOWN!r}"], [SHORT, LONG]),
        (["start_weight_update called while a weight update is already active"],
         [SHORT, ("update", {"abort": True}), ("finish",), LONG]),
    ],
    ids=["known", "unknown", "left open"],
)  # fmt: skip
def test_servers_are_told_no_more_than_they_need(errors, calls):
    servers = Servers(*errors)
    ResidentTransfer().send(servers, Lying(), "7")  # pyright: ignore[reportArgumentType]
    assert servers.calls == calls


def test_what_fails_is_not_sent_twice_and_named():
    servers = Servers(
        "weight sync failed in phase 'verify' of server at parameter 'a.weight': it differs", "never asked"
    )
    with pytest.raises(WeightSyncError, match="it differs") as caught:
        ResidentTransfer().send(servers, Lying(), "7", verify=True)  # pyright: ignore[reportArgumentType]
    assert (caught.value.phase, caught.value.parameter) == ("verify", "a.weight")
    assert len(servers.calls) == 1


def test_a_model_on_the_host_or_with_adapters_cannot_be_read_where_it_lies(tmp_path):
    from vgen.testing import tiny_model

    model = tiny_model(tmp_path)[0]
    with pytest.raises(NotResident, match="is on cpu"):
        Table(source_of(model))
    model.model.layers[0].base_layer = torch.nn.Identity()
    with pytest.raises(NotResident, match="sharded, adapted or quantized"):
        Table(source_of(model))


def test_views_are_those_of_the_trainer_and_stay_within_their_memory():
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    memory = whole.flatten().view(torch.uint8)
    column = whole[1:, 2::2]
    entry = ("w", "float32", list(column.shape), list(column.stride()), 0, column.storage_offset() * 4)
    assert torch.equal(resident._view(memory, entry), column)
    assert resident._view(memory, ("w", "float32", [0, 4], [4, 1], 0, 0)).shape == (0, 4)
    for wrong in (
        ("w", "float32", [25], [1], 0, 0),
        ("w", "float32", [4], [6], 0, 24),
        ("w", "float32", [4], [1], 0, 2),
        ("w", "float32", [-1], [1], 0, 0),
        ("w", "float32", [4], [1], 0, -4),
        ("w", "load", [4], [1], 0, 0),
    ):
        with pytest.raises(WeightSyncError) as caught:
            resident._view(memory, wrong)
        assert caught.value.parameter == "w"


PLUGIN = frozenset({"shared_memory", "group", "resident"})
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("features", "device_type", "host", "trainer", "beside", "kind"),
    [
        (frozenset(), "cuda", "", GPU, False, "checkpoint"),
        (frozenset({"shared_memory"}), "cpu", "", None, False, "shared_memory"),  # of an older vgen
        (PLUGIN, "cuda", this_host(), GPU, True, "resident"),
        (PLUGIN, "cuda", this_host(), GPU, False, "nccl"),
        (PLUGIN, "cuda", "another", GPU, False, "nccl"),
        (PLUGIN, "cuda", this_host(), None, False, "shared_memory"),
        (PLUGIN, "cpu", this_host(), None, False, "shared_memory"),
        (PLUGIN, "cpu", this_host(), GPU, False, "shared_memory"),
        (PLUGIN, "cpu", "another", None, False, "gloo"),
        (PLUGIN, "cuda", "another", None, False, "gloo"),
    ],
)
def test_the_first_way_that_both_sides_can_take(monkeypatch, features, device_type, host, trainer, beside, kind):
    monkeypatch.setattr("vgen.engines.update.uuid_of", lambda device: "the trainer's")
    server: Any = SimpleNamespace(name="server")
    peer = Peer(server, "m", 100, device_type=device_type, features=features, host=host, devices=frozenset({"its own"}))
    assert _kind(peer, trainer, beside, True) == kind


def test_the_trainers_own_gpu_is_no_place_for_nccl(monkeypatch):
    """As where its model is sharded, and so cannot be read where it lies."""
    monkeypatch.setattr("vgen.engines.update.uuid_of", lambda device: "the trainer's")
    server: Any = SimpleNamespace(name="server")
    peer = Peer(server, "m", 100, device_type="cuda", features=PLUGIN, host=this_host())
    peer.devices = frozenset({"the trainer's"})
    assert _kind(peer, GPU, False, True) == "shared_memory"
