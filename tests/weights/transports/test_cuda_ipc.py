"""Weights that are read where they lie: what can be, and how the servers hear of it. The reading itself needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.transfers import FakeGroup, Trace

from vgen import WeightSyncError
from vgen.profiling import semconv
from vgen.weights.source.module_source import source_of
from vgen.weights.transports import cuda_ipc
from vgen.weights.transports.cuda_ipc import CudaIpcTransport, HandleTable, NotResident
from vgen.weights.transports.sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, to_text
from vgen.weights.transports.weight_transport import WeightUpdate


class FakeTable:
    """Stands for the handles of a model on a GPU."""

    name = "one"

    def __init__(self, source: Any) -> None: ...

    def synchronize(self) -> None: ...

    def valid(self) -> bool:
        return True

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "handles": [], "tensors": []}


class Servers:
    """Answer with `errors`, one after the other, and then well."""

    def __init__(self, *errors: str) -> None:
        self.errors, self.calls = list(errors), list[tuple[Any, ...]]()

    def update_in_one_call(self, update_info: Any, version: str | None, init_info: Any = None) -> None:
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


def worker_error(reason: str | None, words: str, **more: Any) -> str:
    """What an HTTP answer says of a worker's error, in `words` that no program may depend on."""
    error = WeightSyncError(words, **{"phase": "transfer", "receiver": "server", **more}, reason=reason)
    return f"500: Worker failed with error '{to_text(error)}', please check the stack trace above"


@pytest.fixture
def source(monkeypatch) -> Any:
    monkeypatch.setattr(cuda_ipc, "HandleTable", FakeTable)
    return SimpleNamespace(seconds=1.0)


def send(transport: CudaIpcTransport, servers: Servers, source: Any, *, verify: bool = False) -> FakeGroup:
    group = FakeGroup(servers)
    transport.open(group, source)
    transport.send(WeightUpdate(source, "7", Trace(), verify=verify))
    return group


@pytest.mark.parametrize("words", ["as today", 'otherwise: \'quoted\', "twice" and {"in": braces}\nover two lines', ""])
@pytest.mark.parametrize(
    ("reasons", "calls"),
    [
        ([], [SHORT]),
        ([UNKNOWN_HANDLES], [SHORT, LONG]),
        ([UPDATE_OPEN], [SHORT, ("update", {"abort": True}), ("finish",), LONG]),
    ],
    ids=["known", "unknown", "left open"],
)
def test_servers_are_told_no_more_than_they_need_whatever_the_words_of_their_errors(source, reasons, calls, words):
    servers = Servers(*[worker_error(reason, words) for reason in reasons])
    assert send(CudaIpcTransport(), servers, source).recorded == ["update_in_one_call"]
    assert servers.calls == calls


@pytest.mark.parametrize(
    "words", ["it does not know these weights' handles", "update_open", "unknown_handles", "already active"]
)
def test_an_error_without_a_code_is_not_taken_for_one_with_a_code(source, words):
    servers = Servers(words, "never asked")
    with pytest.raises(WeightSyncError, match=words):
        send(CudaIpcTransport(), servers, source)
    assert servers.calls == [SHORT]


@pytest.mark.fault(
    point="the trainer's memory on the GPU",
    did="Reading the trainer's memory fails on the server",
    happens="`WeightSyncError`; nothing is sent twice",
    within=20,
)
def test_what_fails_is_not_sent_twice_and_named(source):
    servers = Servers(worker_error(None, "it differs", phase="verify", parameter="a.weight"), "never asked")
    with pytest.raises(WeightSyncError, match="it differs") as caught:
        send(CudaIpcTransport(), servers, source, verify=True)
    assert (caught.value.phase, caught.value.parameter) == ("verify", "a.weight")
    assert len(servers.calls) == 1


@pytest.mark.fault(
    point="the trainer's memory on the GPU",
    did="A sync fails",
    happens="The table of handles is made anew",
    within=20,
)
def test_a_table_is_made_once_and_anew_after_an_error(source, monkeypatch):
    made = list[Any]()
    monkeypatch.setattr(cuda_ipc, "HandleTable", lambda source: made.append(source) or FakeTable(source))
    transport = CudaIpcTransport()
    send(transport, Servers(), source)
    send(transport, Servers(), source)
    assert len(made) == 1
    assert source.seconds == 0.0  # the second sync made no pass over the source
    with pytest.raises(WeightSyncError):
        send(transport, Servers("it broke"), source)
    send(transport, Servers(), source)
    assert len(made) == 2


def test_the_phase_has_the_seconds_of_the_gather(source):
    trace, transport = Trace(), CudaIpcTransport()
    transport.open(FakeGroup(Servers()), source)
    transport.send(WeightUpdate(source, "7", trace))
    assert trace.phases == [("load", {semconv.GATHER_SECONDS: 1.0})]


@pytest.mark.fault(
    point="the trainer's memory on the GPU",
    did="The model is not on a GPU",
    happens="Another transport is chosen, with the reason",
    within=20,
)
def test_a_model_on_the_host_or_with_adapters_cannot_be_read_where_it_lies(tmp_path):
    from vgen.testing import tiny_model

    model = tiny_model(tmp_path)[0]
    with pytest.raises(NotResident, match="is on cpu"):
        HandleTable(source_of(model))
    model.model.layers[0].base_layer = torch.nn.Identity()
    with pytest.raises(NotResident, match="sharded, adapted or quantized"):
        HandleTable(source_of(model))


@pytest.mark.fault(
    point="the trainer's memory on the GPU",
    did="A description names memory beyond an allocation",
    happens="It is refused",
    within=20,
)
def test_views_are_those_of_the_trainer_and_stay_within_their_memory():
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    memory = whole.flatten().view(torch.uint8)
    column = whole[1:, 2::2]
    entry = ("w", "float32", list(column.shape), list(column.stride()), 0, column.storage_offset() * 4)
    assert torch.equal(cuda_ipc._view(memory, entry), column)
    assert cuda_ipc._view(memory, ("w", "float32", [0, 4], [4, 1], 0, 0)).shape == (0, 4)
    for wrong in (
        ("w", "float32", [25], [1], 0, 0),
        ("w", "float32", [4], [6], 0, 24),
        ("w", "float32", [4], [1], 0, 2),
        ("w", "float32", [-1], [1], 0, 0),
        ("w", "float32", [4], [1], 0, -4),
        ("w", "load", [4], [1], 0, 0),
    ):
        with pytest.raises(WeightSyncError) as caught:
            cuda_ipc._view(memory, wrong)
        assert caught.value.parameter == "w"


def test_weights_of_another_process_count_as_in_place_there():
    """Only the trainer can tell, and it does so before each sync."""
    entry = ("w", "float32", [0], [1], 0, 0)
    description = {"name": "one", "handles": [{"handle": "", "bytes": 0}], "tensors": [entry]}
    weights = cuda_ipc.ResidentWeights(description, torch.device("cpu"))
    assert weights.metadata() == [("w", (0,), torch.float32)]
    assert [name for name, _ in weights] == ["w"]
    assert weights.ties() == {}
    snapshot = weights.address_snapshot()
    assert snapshot.in_place()
    assert snapshot.unchanged()
    assert snapshot.holds(torch.ones(1))
    assert snapshot.same_as(weights)
    assert not snapshot.same_as(cuda_ipc.ResidentWeights(description, torch.device("cpu")))
