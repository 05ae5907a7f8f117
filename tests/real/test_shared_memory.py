"""Weights through shared memory into a real server, and into an engine in this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.transfers import (
    FAILURE_NAMES,
    FAILURES,
    LAST,
    SMALL,
    WARM,
    Changed,
    Client,
    agrees,
    randomize,
    sample,
    shared_memory,
    synced,
)

from vgen import WeightSyncError
from vgen.testing import tiny_model
from vgen.weights.source.module_source import ModuleSource
from vgen.weights.transports.shared_memory import SharedMemoryBucket, shared_directory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def as_before(server) -> Iterator[None]:
    """After these tests the server has the model's weights again."""
    yield
    synced(server, shared_memory(Client(server)))
    assert agrees(server)


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
def test_fresh_random_weights_twice_are_the_servers_own(server, bucket_bytes):
    transport = shared_memory(Client(server), bucket_bytes=bucket_bytes)
    for version in ("first", "second"):
        sample(server, WARM)  # fills the prefix cache from the old weights
        randomize(server.model)
        assert not agrees(server)
        synced(server, transport, version=version)
        assert agrees(server)
        assert agrees(server)  # warm
        assert agrees(server, [7])
        assert server.done("/weight_info") == {"weight_version": version}
    assert (transport.buckets_sent > 10) is (bucket_bytes == SMALL)
    assert transport.copy_seconds > 0
    transport.close()
    assert list(shared_directory().iterdir()) == []


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
@pytest.mark.parametrize(("change", "parameter", "says"), FAILURES, ids=FAILURE_NAMES)
def test_a_failed_sync_names_its_parameter_and_the_next_one_brings_the_server_back(
    server, change, parameter, says, bucket_bytes
):
    transport = shared_memory(Client(server), bucket_bytes=bucket_bytes)
    with pytest.raises(WeightSyncError, match=says) as caught:
        synced(server, transport, Changed(server.model, change))
    assert caught.value.parameter == parameter
    assert server.done("/vgen/info")["weights"] == "failed"
    status, answer = server.call("/v1/completions", {"model": server.folder, "prompt": [1]})
    assert (status, answer["error"]["type"]) == (503, "vgen_weights")
    assert list(shared_directory().iterdir()) == []
    randomize(server.model)
    synced(server, transport)
    assert agrees(server)
    transport.close()


def test_the_next_trainer_ends_the_update_that_a_dead_one_left_open(server):
    client = Client(server)
    server.done("/pause", {})
    client.start_weight_update()
    with pytest.raises(RuntimeError, match="already active"):
        client.start_weight_update()
    assert server.call("/resume", {})[0] == 409  # one scheduler step now would be the engine's last
    synced(server, shared_memory(client))
    assert agrees(server)


def test_an_update_in_one_call_and_one_that_the_worker_does_not_know(server):
    """The routes of the `resident` transport, with buckets in shared memory instead of a GPU's memory."""
    assert server.done("/vgen/pause?mode=abort", {}) == {"status": "paused"}
    assert server.done("/is_paused") == {"is_paused": True}
    status, answer = server.call("/vgen/weights", {"update_info": {"table": "unheard of", "last": True}})
    assert status == 409, answer
    assert answer["error"]["reason"] == "unknown_handles"
    assert server.done("/vgen/info")["weights"] == "ready"
    randomize(server.model)
    bucket = SharedMemoryBucket(shared_directory(), 256 << 20)
    for name, tensor in ModuleSource(server.model):
        bucket.add(name, tensor)
    update = {"path": bucket.path, "tensors": bucket.tensors, "last": True}
    body = {"init_info": {"paths": [bucket.path]}, "update_info": update, "weight_version": "at once"}
    assert server.done("/vgen/weights", body) == {"weight_version": "at once"}
    assert server.done("/weight_info") == {"weight_version": "at once"}
    assert server.done("/reset_prefix_cache", {}) == {"success": True}
    server.done("/resume", {})
    assert agrees(server)
    server.done("/vgen/pause", {})
    status, answer = server.call("/vgen/weights", {**body, "update_info": {**update, "tensors": bucket.tensors[1:]}})
    assert status == 500
    assert bucket.tensors[0][0] in answer["error"]["message"]
    assert server.done("/vgen/info")["weights"] == "failed"
    assert server.call("/vgen/weights", {"nothing": 1})[0] == 400
    assert server.call("/vgen/pause?mode=never", {})[0] == 400
    bucket.close()
    Client(server).start_weight_update()  # by a trainer that dies then
    status, answer = server.call("/vgen/weights", {"update_info": {"table": "unheard of", "last": True}})
    assert (status, answer["error"]["reason"]) == (500, "update_open")
    synced(server, shared_memory(Client(server)))
    assert agrees(server)


def test_an_update_needs_a_paused_server(server):
    with pytest.raises(WeightSyncError, match="pause the server first"):
        shared_memory(Client(server)).replace_weights(ModuleSource(server.model))
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
            with pytest.raises(RuntimeError, match=r"files only in|cannot open|plain file"):
                client.init_weight_transfer_engine({"paths": [str(path)]})
    finally:
        link.unlink()
    with pytest.raises(WeightSyncError, match="opens files only in"):
        shared_memory(client, directory=tmp_path).replace_weights(ModuleSource(server.model))


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
def test_a_tensor_outside_its_bucket_is_refused(server, described):
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
    synced(server, shared_memory(client))
    assert agrees(server)


class InProcess:
    """vLLM's four weight-transfer methods, of an engine in this process."""

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

        off()  # the first generation syncs
        transport = shared_memory(InProcess(generation.engine), bucket_bytes=SMALL)
        for _ in range(2):
            randomize(model)
            before = off()
            transport.replace_weights(ModuleSource(model))
            generation.engine.llm.reset_prefix_cache()
            assert off() <= (1e-4 if dtype is torch.float32 else 0.05) < before


def test_an_engine_that_keeps_the_loaded_layout_uses_the_recorded_copy(tmp_path, monkeypatch):
    import vllm._custom_ops as ops

    from vgen import ColocateGeneration, Sampling
    from vgen.demo import max_logprob_difference
    from vgen.weights.load import record_replay
    from vgen.weights.load.batched_copy import copy_pairs

    monkeypatch.setattr(ops, "_supports_onednn", False)  # as on a GPU
    model, _ = tiny_model(tmp_path)
    settings = {"weight_transfer_config": {"backend": "vgen_shm"}, "kv_cache_memory_bytes": 16 << 20}
    with ColocateGeneration(model, max_model_length=256, engine_kwargs=settings) as generation:

        def off() -> float:
            generation.engine.llm.reset_prefix_cache()
            return max_logprob_difference(model, generation.generate([[5, 6, 7]], Sampling(max_tokens=16), 4))

        def way() -> str:
            (found,) = generation.engine.llm.collective_rpc(lambda worker: worker.weight_transfer_engine.loaded())
            return found["way"]

        off()  # the first generation syncs
        for size in (SMALL, 256 << 20):
            transport = shared_memory(InProcess(generation.engine), bucket_bytes=size)
            for verify in (False, True):
                randomize(model)
                before, transport.verify = off(), verify
                transport.replace_weights(ModuleSource(model))
                assert off() <= 1e-4 < before
                assert way() == "foreach"
            for change, parameter, says in FAILURES:
                with pytest.raises(WeightSyncError) as caught:
                    transport.replace_weights(Changed(model, change))
                assert caught.value.parameter == parameter
                assert re.search(OF_THE_RECORD.get(says, says), str(caught.value))
                randomize(model)
                transport.replace_weights(ModuleSource(model))
                assert off() <= 1e-4
                assert way() == "foreach"
            transport.close()

        transport = shared_memory(InProcess(generation.engine))
        with monkeypatch.context() as patched:
            patched.setattr(record_replay, "copy_pairs", lambda pairs: copy_pairs(pairs[:-1]))
            randomize(model)
            transport.replace_weights(ModuleSource(model))  # nobody has asked
            transport.verify = True
            with pytest.raises(WeightSyncError, match="differs from its source"):
                transport.replace_weights(ModuleSource(model))
        transport.close()


OF_THE_RECORD = {"does not fit": r"a size of \[271, 128\]", "no module or parameter": "no such tensor"}
"""The recorded copy's messages instead: it compares with the metadata before anything is loaded."""
