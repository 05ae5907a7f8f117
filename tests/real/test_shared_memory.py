"""Weights through shared memory into a real server, and into an engine in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vgen import WeightSyncError
from vgen.testing import tiny_model
from vgen.weights.shared_memory import SharedMemoryTransfer, shared_directory
from vgen.weights.source import ModuleSource

WARM = list(range(100)) * 2
SMALL = 100_000
"""A bucket size that the tiny model needs a dozen of, and that cuts its fused layers in two."""


class Client:
    """vLLM's four methods over a server's routes."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version})

    def _post(self, path: str, body: dict) -> None:
        status, answer = self._server.call(path, body)
        if status != 200:
            raise RuntimeError(f"{status}: {answer}")


class Changed:
    """A model's weights, each put through `change`."""

    def __init__(self, model: torch.nn.Module, change: Callable[[str, torch.Tensor], list]) -> None:
        self._source, self._change = ModuleSource(model), change

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._source:
            yield from self._change(name, tensor)


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def synced(server: Any, transfer: SharedMemoryTransfer, source: Any = None, version: str = "next") -> None:
    server.done("/pause?mode=abort", {})
    transfer.send(source or ModuleSource(server.model), version)
    assert server.done("/reset_prefix_cache", {}) == {"success": True}
    server.done("/resume", {})


def sample(server: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    wants = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    answer = server.done("/v1/completions", {"model": server.folder, "prompt": prompt, **wants})
    (choice,) = answer["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def difference(model: torch.nn.Module, prompt: list[int], token_ids: list[int], logprobs: list[float]) -> float:
    """The largest |Δ| to a teacher-forced forward of `model`."""
    ids = torch.tensor([prompt + token_ids])
    with torch.no_grad():
        own = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = own.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return (own - torch.tensor(logprobs)).abs().max().item()


def agrees(server: Any, prompt: list[int] = WARM) -> bool:
    return difference(server.model, prompt, *sample(server, prompt)) <= 1e-4


@pytest.fixture(scope="module", autouse=True)
def as_before(server) -> Iterator[None]:
    """Whatever happened here, the server has the model's weights afterwards."""
    yield
    synced(server, SharedMemoryTransfer(Client(server)))
    assert agrees(server)


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
def test_fresh_random_weights_twice_are_the_servers_own(server, bucket_bytes):
    transfer = SharedMemoryTransfer(Client(server), bucket_bytes=bucket_bytes)
    for version in ("first", "second"):
        sample(server, WARM)  # into the prefix cache, from the old weights
        randomize(server.model)
        assert not agrees(server)
        synced(server, transfer, version=version)
        assert agrees(server)
        assert agrees(server)  # warm
        assert agrees(server, [7])
        assert server.done("/weight_info") == {"weight_version": version}
    assert (transfer.buckets_sent > 10) is (bucket_bytes == SMALL)
    assert transfer.copy_seconds > 0
    assert transfer.load_seconds > 0
    transfer.close()
    assert list(shared_directory().iterdir()) == []


K_PROJ, LAST, NORM = "model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"


def wrong_shape(of: str) -> Callable:
    return lambda name, tensor: [(name, tensor[1:] if name == of else tensor)]


def missing(of: str) -> Callable:
    return lambda name, tensor: [] if name == of else [(name, tensor)]


def unknown(name: str, tensor: torch.Tensor) -> list:
    return [("model.layers.0.unheard_of.weight" if name == NORM else name, tensor)]


def interrupted(name: str, tensor: torch.Tensor) -> list:
    if name == K_PROJ:
        raise ConnectionResetError("the gather broke off")
    return [(name, tensor)]


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
@pytest.mark.parametrize(
    ("change", "parameter", "says"),
    [
        (wrong_shape(K_PROJ), K_PROJ, "size"),
        (wrong_shape(LAST), LAST, "does not fit"),
        (missing(K_PROJ), K_PROJ, "does not provide it"),  # the engine's fused layer got its other two thirds
        (missing(NORM), NORM, "does not provide it"),
        (unknown, "model.layers.0.unheard_of.weight", "no module or parameter"),
        (interrupted, None, "the gather broke off"),
    ],
    ids=["shape", "last-shape", "missing-part", "missing", "unknown", "interrupted"],
)
def test_a_failed_sync_names_its_parameter_and_the_next_one_brings_the_server_back(
    server, change, parameter, says, bucket_bytes
):
    transfer = SharedMemoryTransfer(Client(server), bucket_bytes=bucket_bytes)
    with pytest.raises(WeightSyncError, match=says) as caught:
        synced(server, transfer, Changed(server.model, change))
    assert caught.value.parameter == parameter
    assert server.done("/vgen/info")["weights"] == "failed"
    status, answer = server.call("/v1/completions", {"model": server.folder, "prompt": [1]})
    assert (status, answer["error"]["type"]) == (503, "vgen_weights")
    assert list(shared_directory().iterdir()) == []
    randomize(server.model)
    synced(server, transfer)
    assert agrees(server)
    transfer.close()


def test_an_update_that_a_dead_trainer_left_open_is_ended_by_the_next(server):
    client = Client(server)
    server.done("/pause", {})
    client.start_weight_update()
    with pytest.raises(RuntimeError, match="already active"):
        client.start_weight_update()
    assert server.call("/resume", {})[0] == 409  # one scheduler step now would be the engine's last
    synced(server, SharedMemoryTransfer(client))
    assert agrees(server)


def test_an_update_needs_a_paused_server(server):
    with pytest.raises(WeightSyncError, match="pause the server first"):
        SharedMemoryTransfer(Client(server)).send(ModuleSource(server.model))
    assert agrees(server)


def test_the_server_opens_nothing_but_plain_files_in_its_directory(server, tmp_path):
    client, place = Client(server), shared_directory()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1000))
    place.mkdir(mode=0o700, exist_ok=True)
    link = place / "link"
    link.symlink_to(secret)
    try:
        for path in (secret, f"{place}/../../{secret}", place / ".." / "other", link, place, "/etc/passwd", ""):
            with pytest.raises(RuntimeError, match=r"files in|cannot open|plain file"):
                client.init_weight_transfer_engine({"paths": [str(path)]})
    finally:
        link.unlink()
    with pytest.raises(WeightSyncError, match="opens files in"):
        SharedMemoryTransfer(client, directory=tmp_path).send(ModuleSource(server.model))


@pytest.mark.parametrize(
    "described",
    [
        (LAST, "float32", [10**9, 10**9], 0),
        (LAST, "float32", [4], 1 << 30),
        (LAST, "float32", [-1], 0),
        (LAST, "float32", [4], -64),
        (LAST, "load", [4], 0),
    ],
)
def test_a_tensor_that_is_not_where_it_is_said_to_be_is_refused(server, described):
    client = Client(server)
    place = shared_directory() / "bucket"
    place.write_bytes(bytes(64))
    try:
        server.done("/pause", {})
        client.start_weight_update()
        with pytest.raises(RuntimeError, match=LAST):
            client.update_weights({"path": str(place), "tensors": [described], "last": True})
    finally:
        os.unlink(place)
    synced(server, SharedMemoryTransfer(client))
    assert agrees(server)


class InProcess:
    """vLLM's four methods of an engine in this process."""

    def __init__(self, engine: Any) -> None:
        self._llm = engine.llm

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_of_either_dtype_in_this_process(tmp_path, dtype):
    from vgen import ColocateGeneration, Sampling
    from vgen.demo import max_logprob_difference

    model, _ = tiny_model(tmp_path, tie_word_embeddings=True)
    model = model.to(dtype)
    settings = {"weight_transfer_config": {"backend": "vgen_shm"}, "kv_cache_memory_bytes": 16 << 20}
    settings["dtype"] = str(dtype).removeprefix("torch.")
    with ColocateGeneration(model, max_model_length=256, engine_kwargs=settings) as generation:

        def off() -> float:
            return max_logprob_difference(model, generation.generate([[5, 6, 7]], Sampling(max_tokens=16), 4))

        transfer = SharedMemoryTransfer(InProcess(generation.engine), bucket_bytes=SMALL)
        for _ in range(2):
            randomize(model)
            before = off()
            transfer.send(ModuleSource(model))
            generation.engine.llm.reset_prefix_cache()
            assert off() <= (1e-4 if dtype is torch.float32 else 0.05) < before


def test_it_is_registered_with_both_of_vllms_factories():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from vgen.weights.vllm_plugin import SenderInit, register

    register()
    register()
    assert {"vgen_shm", "nccl"} <= WeightTransferEngineFactory._registry.keys()

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, call: str) -> Callable:
            return lambda *_: self.calls.append(call)

    client = Recorder()
    sender = WeightTransferTrainerFactory.trainer_init(
        SenderInit(rank=0), client=client, source=[("weight", torch.ones(3))]
    )
    sender.send_weights()
    sender.shutdown()
    assert client.calls == [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ]
    assert not any(Path(shared_directory()).iterdir())
