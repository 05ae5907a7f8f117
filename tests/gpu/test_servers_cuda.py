"""Weights to servers on GPUs: read where they lie on the trainer's own, by NCCL from another."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from vgen import ProfilingContext, Sampling, ServerConnection, ServerGeneration, WeightSyncError, WeightSyncOptions
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import Source
from vgen.engines.server.launcher import start_server
from vgen.profiling import semconv
from vgen.testing import MemorySink, stock_server, tiny_model
from vgen.weights.transports import vllm_engines
from vgen.weights.transports.weight_transport import TransportUnavailable

PROMPTS = [[1, 2, 3], list(range(100)), [7] * 30]
TOLERANCE = 5e-3
"""In float32 vLLM's attention kernels multiply in TF32, which keeps ten bits of the mantissa."""
ARGUMENTS = ["--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 30)]
ARGUMENTS += ["--gpu-memory-utilization", "0.2", "--enforce-eager", "--enable-sleep-mode"]


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def right(generation: ServerGeneration, model: Any) -> bool:
    return max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE


class Changed(Source):
    """A source that goes wrong at one of its tensors."""

    def __init__(self, source: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.source, self.change = source, change

    @property
    def model(self) -> Any:
        return self.source.model

    def metadata(self) -> Any:
        return self.source.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.source:
            yield name, self.change(tensor) if name == "model.layers.1.self_attn.k_proj.weight" else tensor


def breaks_off(tensor: torch.Tensor) -> torch.Tensor:
    raise ConnectionResetError("the gather broke off")


def by(sink: MemorySink) -> list[Any]:
    return [span.attributes[semconv.TRANSPORT] for span in sink.named(semconv.WEIGHT_SYNC)]


def test_weights_are_read_where_they_lie_on_the_trainers_own_gpu():
    sink = MemorySink()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder)[0].to("cuda")
        with start_server(folder, arguments=ARGUMENTS) as server:
            keys: dict[str, Any] = dict(base_urls=[server.url], control_key=server.control_key)
            keys["connection"] = ServerConnection(timeout=60.0)
            with ServerGeneration(model, profiling=ProfilingContext([sink]), **keys) as generation:
                for _ in range(4):
                    randomize(model)
                    generation.sync_weights()
                    assert right(generation, model)
                assert by(sink) == ["resident"] * 4
                assert sink.named(semconv.WEIGHT_SYNC)[0].attributes[semconv.VERIFY] == "logprobs"
                randomize(model)
                generation.sync_weights(verify="bits")
                assert right(generation, model)

                generation.sleep(2)
                randomize(model)
                generation.wake_up()  # brings the weights
                assert right(generation, model)

                model.to("cpu"), torch.cuda.empty_cache()  # as a trainer that makes room does
                model.to("cuda")
                randomize(model)
                generation.sync_weights()
                assert right(generation, model)

                model.to("cpu")
                randomize(model)
                generation.sync_weights()
                assert by(sink)[-1] == "shared_memory"
                model.to("cuda")
                assert right(generation, model)
            with ServerGeneration(model, **keys) as generation:  # the next trainer
                randomize(model)
                generation.sync_weights()
                assert right(generation, model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
def test_nccl_from_another_gpu():
    sink = MemorySink()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder)[0].to("cuda:1")
        torch.cuda.set_device(1)
        with start_server(folder, arguments=ARGUMENTS) as server:
            keys: dict[str, Any] = dict(base_urls=[server.url], control_key=server.control_key)
            keys["connection"] = ServerConnection(timeout=20.0)
            with ServerGeneration(
                model, weight_sync=WeightSyncOptions(bucket_bytes=300_000), profiling=ProfilingContext([sink]), **keys
            ) as generation:
                for _ in range(3):
                    randomize(model)
                    generation.sync_weights()
                    assert right(generation, model)
                assert by(sink) == ["nccl"] * 3
                source = generation.source
                for change, says in ((breaks_off, "broke off"), (lambda tensor: tensor[1:], "size")):
                    generation.source = Changed(source, change)
                    start = time.monotonic()
                    with pytest.raises(WeightSyncError, match=says):
                        generation.sync_weights()
                    assert time.monotonic() - start < 30
                    generation.source = source
                    randomize(model)
                    generation.sync_weights()
                    assert right(generation, model)
                # A server that dies in the middle.
                generation.source = Changed(
                    source, lambda tensor: (os.killpg(server.process.pid, signal.SIGKILL), tensor)[1]
                )
                start = time.monotonic()
                with pytest.raises(WeightSyncError, match="transfer"):
                    generation.sync_weights()
                assert time.monotonic() - start < 60
                assert torch.ones(3, device="cuda:1").sum().item() == 3  # the trainer's GPU goes on


def on_its_own_gpu(model: Any, keys: dict[str, Any]) -> None:
    """A trainer on the server's GPU, where NCCL cannot be: that is said at once, and the server lives on."""
    with ServerGeneration(model, **keys) as generation:
        start = time.monotonic()
        with pytest.raises(WeightSyncError, match=r'on other GPUs.* weight_transport="checkpoint"'):
            generation.sync_weights()
        assert time.monotonic() - start < 20
    with ServerGeneration(model, **keys, weight_transport="checkpoint") as generation:
        randomize(model)
        generation.sync_weights()
        assert right(generation, model)


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda:1"), ("ipc", "cuda:0")])
def test_stock_servers_by_vllms_own_engines(backend, device):
    if backend == "nccl":
        if torch.cuda.device_count() < 2:
            pytest.skip("NCCL needs two GPUs")
        try:
            vllm_engines.find_nccl()
        except TransportUnavailable as error:
            pytest.skip(str(error))
    sink = MemorySink()
    own = ["--weight-transfer-config", f'{{"backend": "{backend}"}}', "--logprobs-mode", "processed_logprobs"]
    may = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = tiny_model(folder, tie_word_embeddings=True)[0].to(device)
        server = ExitStack()
        stack.callback(server.close)
        url = server.enter_context(stock_server(folder, arguments=[*ARGUMENTS, *own], environment=may))
        keys: dict[str, Any] = dict(base_urls=[url], connection=ServerConnection(timeout=30.0))
        keys["weight_sync"] = WeightSyncOptions(bucket_bytes=300_000)
        keys["profiling"] = ProfilingContext([sink])
        if backend == "nccl":
            on_its_own_gpu(model.to("cuda:0"), keys)
            model.to(device), sink.clear()
        else:
            keys["weight_transport"] = "ipc"
        generation = stack.enter_context(ServerGeneration(model, **keys))
        for _ in range(3):
            randomize(model)
            generation.sync_weights()
            assert right(generation, model)
        assert by(sink) == [backend] * 3
        assert sink.named(semconv.WEIGHT_SYNC)[0].attributes[semconv.VERIFY] == "logprobs"
        source = generation.source
        for change, says in ((breaks_off, "broke off"), (lambda tensor: tensor[1:], "size")):
            generation.source = Changed(source, change)
            start = time.monotonic()
            with pytest.raises(WeightSyncError, match=says):
                generation.sync_weights()
            assert time.monotonic() - start < 30
            generation.source = source
            randomize(model)
            generation.sync_weights()
            assert right(generation, model)
        server.close()
        with pytest.raises(WeightSyncError):  # it has died
            generation.sync_weights()
        assert torch.ones(3, device=device).sum().item() == 3  # the trainer's GPU goes on
