"""The trainer's half of vLLM's own engines, before one that goes their way: `tests/gpu` has the real ones."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.transfers import FakeEndpoint, FakeGroup

from vgen import EngineError, ProfilingContext, ServerConnection, ServerGeneration, WeightSyncError
from vgen.profiling import semconv
from vgen.testing import FaultyServer, MemorySink
from vgen.weights.source.module_source import ModuleSource
from vgen.weights.transports import vllm_engines
from vgen.weights.transports.selection import choose, refusal, transports_of
from vgen.weights.transports.vllm_engines import AnnouncedSource, VllmTransport
from vgen.weights.transports.weight_transport import TransportSettings, TransportUnavailable

SOURCE = [("a", torch.arange(6.0)), ("b", torch.ones(2, 3)), ("c", torch.full((4,), 7.0))]


class Servers:
    """Receives what is broadcast in `Engine`, and calls as vLLM's servers do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails: dict[str, Exception] = {}
        self.came: dict[str, torch.Tensor] = {}

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._called("init")
        self.met = init_info

    def start_weight_update(self) -> None:
        self._called("start")

    def update_weights(self, update_info: dict) -> None:
        self._called("update")
        self.announced = update_info

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._called(f"finish {weight_version}")

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if error := self.fails.pop(call, None):
            raise error


class Engine:
    """As vLLM's `NCCLTrainerWeightTransferEngine`: it waits for servers that never come, until it is shut down."""

    made: list[Engine]

    def __init__(self, client: Any, servers: Servers) -> None:
        self.client, self.servers, self.source = client, servers, None
        self.gone = threading.Event()
        Engine.made.append(self)

    def send_weights(self) -> None:
        forms = self.source.metadata()
        told = {"names": [name for name, *_ in forms], "empty": None}
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as rpc:
            update = rpc.submit(self.client.update_weights, told)
            wait([update], 10)
            for name, tensor in self.source:
                if update.done() and update.exception():
                    assert self.gone.wait(10)  # a broadcast that nobody receives
                self.servers.came[name] = tensor.clone()
            update.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.gone.set()


@pytest.fixture
def servers(monkeypatch) -> Servers:
    Engine.made = []
    servers = Servers()

    def made(backend: str, client: Any, arguments: dict[str, Any]) -> Engine:
        client.init_weight_transfer_engine({"rank_offset": 1, **arguments})
        return Engine(client, servers)

    monkeypatch.setattr(vllm_engines, "_trainer_engine", made)
    monkeypatch.setattr(vllm_engines, "find_nccl", lambda: None)
    monkeypatch.setattr(vllm_engines, "available", lambda: True)
    monkeypatch.setattr(vllm_engines, "source_gpu", lambda source: torch.device("cpu"))
    monkeypatch.setattr(AnnouncedSource, "metadata", lambda announced: announced._metadata)
    return servers


def transport_to(
    servers: Servers, backend: vllm_engines.Backend, workers: int = 3, timeout: float = 5.0, bucket_bytes: int = 100
) -> VllmTransport:
    transport = VllmTransport(TransportSettings(bucket_bytes, timeout=timeout), backend)
    source: Any = SOURCE
    transport.open(FakeGroup(servers, FakeEndpoint(workers=workers)), source)
    return transport


@pytest.fixture
def transport(servers) -> VllmTransport:
    return transport_to(servers, "nccl")


def test_everything_comes_under_its_version_and_servers_are_met_once(servers, transport):
    for version in ("1", "2"):
        transport.replace_weights(SOURCE, version)
        for name, tensor in SOURCE:
            assert torch.equal(servers.came[name], tensor)
    calls = ["start", "update", "finish 1", "start", "update", "finish 2"]
    assert servers.calls == ["init", *calls]
    assert servers.announced == {"names": ["a", "b", "c"]}  # what is None is not sent
    assert (servers.met["world_size"], servers.met["packed"]) == (4, False)


class BreaksOff(list):
    """A source whose second tensor cannot be gathered."""

    def metadata(self):
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in SOURCE]

    def __iter__(self):
        yield SOURCE[0]
        raise self[0]


@pytest.mark.parametrize("error", [ConnectionResetError("the gather broke off"), KeyboardInterrupt()])
def test_a_source_that_breaks_off_lets_the_servers_get_to_the_end_and_is_raised_then(servers, transport, error):
    raised = WeightSyncError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(raised, match="the gather broke off" if isinstance(error, Exception) else None):
        transport.replace_weights(BreaksOff([error]))
    assert [tensor.sum().item() for tensor in servers.came.values()] == [15.0, 0.0, 0.0]
    assert servers.calls == ["init", "start", "update", "finish None"]
    transport.replace_weights(SOURCE, "next")
    assert torch.equal(servers.came["c"], SOURCE[2][1])


@pytest.mark.parametrize(
    ("came", "says"),
    [
        (SOURCE[:2], "at parameter 'c': the source announced it, but did not yield it"),
        ([*SOURCE, ("d", torch.ones(1))], "at parameter 'd': the source yielded it, but did not announce it"),
        (
            [SOURCE[0], ("b", torch.ones(3, 2)), SOURCE[2]],
            r"'b': the source yielded 'b' with a size of \[3, 2\]",
        ),
    ],
)
def test_a_source_that_is_not_as_it_was_announced_is_refused(servers, transport, came, says):
    class Source(list):
        metadata = BreaksOff.metadata

    with pytest.raises(WeightSyncError, match=says) as caught:
        transport.replace_weights(Source(came))
    assert (caught.value.phase, caught.value.receiver) == ("gather", "trainer")
    assert [servers.came[name].shape for name, _ in SOURCE] == [tensor.shape for _, tensor in SOURCE]


def test_a_server_that_fails_ends_the_wait_for_it_and_the_next_transfer_meets_anew(servers, transport):
    servers.fails["update"] = RuntimeError("out of memory")
    with pytest.raises(WeightSyncError, match="out of memory"):
        transport.replace_weights(SOURCE, "1")
    assert Engine.made[0].gone.is_set()
    assert servers.calls[-1] == "finish None"  # no update is left open there
    transport.replace_weights(SOURCE, "2")
    assert servers.calls.count("init") == len(Engine.made) == 2


@pytest.fixture
def never():
    """An event that does not come while the test lasts."""
    event = threading.Event()
    yield event
    event.set()


def test_a_server_that_refuses_to_meet_is_not_waited_for(servers, transport, monkeypatch, never):
    servers.fails["init"] = RuntimeError("there is another trainer")
    met = vllm_engines._trainer_engine

    def waits(*args: Any) -> Any:
        try:
            return met(*args)
        except RuntimeError:
            return never.wait(120)  # in the store, for members that do not come

    monkeypatch.setattr(vllm_engines, "_trainer_engine", waits)
    start = time.monotonic()
    with pytest.raises(
        WeightSyncError, match=r'there is another trainer.* weight_transport="checkpoint", which needs no NCCL'
    ):
        transport.replace_weights(SOURCE)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("error", "says"),
    [(RuntimeError("NCCL error: invalid usage"), "NCCL error: invalid usage"), (EOFError(), "EOFError")],
)
def test_what_the_trainers_own_side_refuses_says_what_to_do(servers, transport, monkeypatch, error, says):
    def refuses(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(vllm_engines, "_trainer_engine", refuses)
    with pytest.raises(WeightSyncError, match=f"did not connect: {says}: .* on other GPUs .* needs no NCCL") as caught:
        transport.replace_weights(SOURCE)
    assert caught.value.__cause__ is error


@pytest.mark.fault(
    point="a group that weights travel through",
    did="Servers never answer while weights travel",
    happens="`WeightSyncError` at the timeout",
    within=60,
)
def test_servers_that_never_answer_are_waited_for_no_longer_than_the_timeout(servers, monkeypatch, never):
    monkeypatch.setattr(vllm_engines, "_trainer_engine", lambda *_: never.wait(60))
    transport = transport_to(servers, "nccl", timeout=0.2)
    with pytest.raises(WeightSyncError, match=r"did not connect: not within 0\.2 s"):
        transport.replace_weights(SOURCE)


def test_vllms_store_listens_only_while_the_servers_connect(servers, transport, monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # pyright: ignore
    port, met, groups = store.port, vllm_engines._trainer_engine, [SimpleNamespace(store=store)]
    del store

    def connected(*arguments: Any) -> Any:
        socket.create_connection(("127.0.0.1", port), 5.0).close()
        engine = met(*arguments)
        engine.model_update_group = SimpleNamespace(group=groups.pop())
        return engine

    monkeypatch.setattr(vllm_engines, "_trainer_engine", connected)
    transport.replace_weights(SOURCE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5.0)


@pytest.mark.real
@pytest.mark.fault(
    point="the choice of a transport",
    did="vLLM finds no NCCL in the trainer",
    happens="An error before anything is sent",
    within=20,
)
def test_a_trainer_whose_vllm_finds_no_nccl_is_told_so_before_anything_is_sent(monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/nowhere/libnccl.so.2")
    servers = Servers()
    with pytest.raises(TransportUnavailable, match=r"no NCCL that it can use .*VLLM_NCCL_SO_PATH"):
        transport_to(servers, "nccl")
    assert servers.calls == []


def test_buckets_of_vllms_ipc_hold_the_largest_tensor(servers):
    for bucket_bytes, size in ((100, 100), (10, 24)):
        transport_to(servers, "ipc", workers=1, bucket_bytes=bucket_bytes).replace_weights(SOURCE)
        assert Engine.made[-1].packed_buffer_size_bytes == size


class Model(torch.nn.Module):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def stock(stack: ExitStack, workers: int, backend: str = "nccl") -> FaultyServer:
    """A stock server, as far as it describes itself."""
    server = stack.enter_context(FaultyServer())
    server.answers["/server_info"]["vllm_config"]["weight_transfer_config"] = {"backend": backend}
    server.answers["/get_world_size"] = {"world_size": workers}
    server.answers["/weight_info"] = {"weight_version": "default"}
    return server


def bodies(server: FaultyServer, path: str) -> list[Any]:
    return [body for seen, _, body in server.seen if seen == path]


def test_several_stock_servers_are_one_group_and_one_that_was_started_anew_is_met_again(servers):
    sink = MemorySink()
    with ExitStack() as stack:
        first, second = stock(stack, 2), stock(stack, 3)
        keys: dict[str, Any] = dict(
            base_urls=[first.url, second.url], connection=ServerConnection(timeout=20.0), weight_transport="nccl"
        )
        keys["profiling"] = ProfilingContext([sink])
        generation = stack.enter_context(ServerGeneration(Model(), **keys))

        def sync(version: str) -> None:
            generation.sync_weights(version=version, verify="none")
            for server in (first, second):
                server.answers["/weight_info"] = {"weight_version": version}

        sync("1")
        sync("2")
        told = [bodies(server, "/init_weight_transfer_engine") for server in (first, second)]
        assert [
            [(each["init_info"]["rank_offset"], each["init_info"]["world_size"]) for each in own] for own in told
        ] == [
            [(1, 6)],
            [(3, 6)],
        ]
        assert bodies(second, "/finish_weight_update") == [{"weight_version": "1"}, {"weight_version": "2"}]
        second.answers["/weight_info"] = {"weight_version": "default"}
        sync("3")
        assert len(bodies(first, "/init_weight_transfer_engine")) == 2
    span = sink.named(semconv.WEIGHT_SYNC)[-1].attributes
    assert (span[semconv.TRANSPORT], span[semconv.PLAN_WAY]) == ("nccl", "reload")
    assert span[semconv.TRANSPORT_REASON] == "asked for"
    assert all(engine.gone.is_set() for engine in Engine.made)  # closed on the way out


OLD = "vLLM finds no NCCL that it can use"
FOLDER = "servers without vgen's plugin reload from a folder"


def too_old() -> None:
    raise TransportUnavailable(OLD)


@pytest.mark.parametrize(
    ("backend", "trainer", "installed", "find_nccl", "name", "reason"),
    [
        ("nccl", "cuda", True, lambda: None, "nccl", "servers with vLLM's own NCCL engine"),
        ("nccl", "cuda", True, too_old, "checkpoint", f"{FOLDER}; not nccl: {OLD}"),
        ("nccl", "cuda", False, lambda: None, "checkpoint",
         f"{FOLDER}; not nccl: vLLM is not installed beside the trainer"),
        ("nccl", None, True, lambda: None, "checkpoint", FOLDER),
        ("ipc", "cuda", True, lambda: None, "checkpoint", FOLDER),
    ],
)  # fmt: skip
def test_nccl_is_taken_where_both_sides_can_and_ipc_on_request_alone(
    monkeypatch, backend, trainer, installed, find_nccl, name, reason
):
    monkeypatch.setattr(vllm_engines, "source_gpu", lambda source: trainer and torch.device(trainer))
    monkeypatch.setattr(vllm_engines, "find_nccl", find_nccl)
    monkeypatch.setattr(vllm_engines, "available", lambda: installed)
    endpoint, source = FakeEndpoint(backend=backend), ModuleSource(Model())
    groups = list[Any]()

    def group_of(served: Any) -> Any:
        groups.append(FakeGroup(Servers(), *served))
        return groups[-1]

    choice = choose(transports_of(TransportSettings()), [endpoint], source, name=None, group_of=group_of)
    assert (choice.names, choice.reasons) == (name, reason)
    assert list(choice.served.values()) == [[endpoint]]
    assert refusal(endpoint, backend) == (
        ""
        if installed
        else "start it with `vgen serve`, or install vLLM beside the trainer, because the trainer uses vLLM's engine"
    )


def test_vllms_own_engines_are_refused_where_they_cannot_be(monkeypatch):
    with ExitStack() as stack:
        server = stock(stack, 1, "ipc")
        with pytest.raises(EngineError, match=r"takes no weights by nccl: start it .*, or .*weight-transfer-config"):
            ServerGeneration(
                Model(), base_urls=server.url, connection=ServerConnection(timeout=20.0), weight_transport="nccl"
            )
        ours = stack.enter_context(FaultyServer(features=["batch", "lease", "shared_memory"]))
        with pytest.raises(EngineError, match="`resident` takes its place"):
            ServerGeneration(
                Model(), base_urls=ours.url, connection=ServerConnection(timeout=20.0), weight_transport="ipc"
            )
        monkeypatch.setattr(vllm_engines, "available", lambda: False)
        with pytest.raises(EngineError, match="install vLLM beside the trainer"):
            ServerGeneration(
                Model(), base_urls=server.url, connection=ServerConnection(timeout=20.0), weight_transport="ipc"
            )
