"""Weights broadcast from a trainer to a real server: with gloo here, with NCCL in tests/gpu."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.transfers import (
    FAILURE_NAMES,
    FAILURES,
    SMALL,
    WARM,
    Changed,
    Client,
    agrees,
    gloo,
    randomize,
    sample,
    synced,
)

from vgen import ProfilingContext, Sampling, ServerConnection, ServerGeneration, WeightSyncError, WeightSyncOptions
from vgen._addresses import own_address
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import Source
from vgen.profiling import semconv
from vgen.testing import MemorySink
from vgen.weights.transports.collective import CollectiveTransport

pytestmark = pytest.mark.slow  # a server of its own


def transport_to(server: Any, **settings: Any) -> CollectiveTransport:
    return gloo(Placed(server), server.base_url, **{"timeout": 20.0, **settings})


class Placed(Client):
    """The only server of its group."""

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        super().init_weight_transfer_engine({**init_info, "rank_offset": 1})


@pytest.fixture(scope="module", autouse=True)
def as_before(server) -> Iterator[None]:
    """After these tests the server has the model's weights again."""
    yield
    transport = transport_to(server)
    synced(server, transport)
    transport.close()
    assert agrees(server)


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
def test_fresh_random_weights_three_times(server, bucket_bytes):
    sink = MemorySink()
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with ServerGeneration(
        server.model,
        base_urls=[server.base_url],
        weight_transport="gloo",
        connection=ServerConnection(timeout=60.0),
        weight_sync=WeightSyncOptions(bucket_bytes=bucket_bytes),
        profiling=ProfilingContext([sink]),
        **keys,
    ) as generation:
        for _ in range(3):
            randomize(server.model)
            generation.sync_weights()
            rollouts = generation.generate([WARM, [7]], Sampling(max_tokens=8))
            assert max_logprob_difference(server.model, rollouts) <= 1e-4
    syncs = [span.attributes for span in sink.named(semconv.WEIGHT_SYNC)]
    assert [attributes[semconv.TRANSPORT] for attributes in syncs] == ["gloo"] * 3
    assert syncs[0][semconv.VERIFY] == "logprobs"
    buckets = [span.attributes[semconv.BUCKETS] for span in sink.named(semconv.SYNC_TRANSFER)]
    assert all((count > 10) is (bucket_bytes == SMALL) for count in buckets)


@pytest.mark.parametrize("bucket_bytes", [SMALL, 256 << 20])
@pytest.mark.parametrize(("change", "parameter", "says"), FAILURES, ids=FAILURE_NAMES)
def test_a_failed_sync_names_its_parameter_and_the_next_one_brings_the_server_back(
    server, change, parameter, says, bucket_bytes
):
    transport = transport_to(server, bucket_bytes=bucket_bytes)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=says) as caught:
        synced(server, transport, Changed(server.model, change))
    assert time.monotonic() - start < 15
    assert caught.value.parameter == parameter
    assert server.done("/vgen/info")["weights"] == "failed"
    randomize(server.model)
    synced(server, transport)  # in a group of its own, through the same port
    assert agrees(server)
    transport.close()


def test_a_server_serves_the_next_trainer_after_one_died_during_a_sync(server):
    command = [sys.executable, __file__, server.base_url, server.api_key, server.control_key]
    server.done("/pause?mode=abort", {})
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "under way\n"
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    randomize(server.model)
    transport = transport_to(server)
    start = time.monotonic()
    synced(server, transport)
    assert time.monotonic() - start < 10  # and not the 20 s in which one who waits for the dead gives up
    assert agrees(server)
    transport.close()


def test_a_worker_that_hears_nothing_gives_up_in_time(server):
    transport = transport_to(server, timeout=2.0)
    synced(server, transport)
    server.done("/pause?mode=abort", {})
    client = Client(server)
    client.start_weight_update()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="bucket did not arrive"):
        client.update_weights({"bytes": 64, "tensors": [], "last": True})
    assert 1 < time.monotonic() - start < 15
    synced(server, transport_to(server))
    sample(server, WARM)
    assert agrees(server)


def test_an_address_that_a_server_can_reach():
    assert own_address("http://127.0.0.1:8000") == "127.0.0.1"
    assert own_address("http://[::1]:8000") == "::1"


def _die_in_the_middle(url: str, api_key: str, control_key: str) -> None:
    from types import SimpleNamespace

    from conftest import Served

    server = SimpleNamespace(base_url=url, api_key=api_key, control_key=control_key)
    server.call = lambda *args, **kwargs: Served.call(server, *args, **kwargs)  # pyright: ignore

    class Endless(Source):
        def __iter__(self):
            for index in range(1000):
                yield f"model.layers.{index}.unheard_of", torch.zeros(100)
                if index == 3:
                    print("under way", flush=True)
                    signal.pause()  # until the test kills this process

    transport_to(server, bucket_bytes=1 << 20).replace_weights(Endless())


if __name__ == "__main__":
    _die_in_the_middle(*sys.argv[1:])
