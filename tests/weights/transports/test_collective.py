"""Buckets that are broadcast, in a gloo group of the trainer and workers in threads of this process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import pytest
import torch
from helpers.transfers import FakeEndpoint, FakeGroup

from vgen import WeightSyncError, _addresses
from vgen.weights.source.module_source import ModuleSource
from vgen.weights.transports import collective
from vgen.weights.transports.collective import CollectiveTransport, GroupReceiver
from vgen.weights.transports.sync_errors import UPDATE_OPEN, to_text
from vgen.weights.transports.weight_transport import TransportSettings

CPU = torch.device("cpu")
SOURCE = [(f"w{i}", torch.randn(50)) for i in range(6)]


class Workers:
    """Several workers that receive each bucket, as servers do."""

    def __init__(self, count: int) -> None:
        self.receivers: list[GroupReceiver] = []
        self.weights: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        self.calls: list[str] = []
        self.joined: list[Any] = []
        self.error: Exception | None = None
        self._pool = ThreadPoolExecutor(count)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        group = init_info.get("group")
        if group is not None and not group.get("joined"):
            self.joined.append((group["secret"], group["size"]))
            ranks = range(1, 1 + len(self.weights))
            self.receivers = list(self._pool.map(lambda rank: GroupReceiver(group, rank, CPU), ranks))

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("abort" if update_info.get("abort") else "update")
        if not update_info.get("abort"):
            list(self._pool.map(lambda i: self._load(i, update_info), range(len(self.receivers))))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(f"finish {weight_version}")

    def _load(self, worker: int, update_info: dict[str, Any]) -> None:
        memory = self.receivers[worker].receive(update_info["bytes"])
        for name, _, shape, offset in update_info["tensors"]:
            tensor = memory[offset : offset + 4 * prod(shape)].view(torch.float32)
            self.weights[worker][name] = tensor.view(shape).clone()


def transport_to(workers: Workers, **settings: Any) -> CollectiveTransport:
    transport = CollectiveTransport(TransportSettings(**{"bucket_bytes": 512, "timeout": 10.0, **settings}), "gloo")
    endpoints = [FakeEndpoint(workers=1), FakeEndpoint(workers=len(workers.weights) - 1)]
    transport.open(FakeGroup(workers, *endpoints), ModuleSource(torch.nn.Linear(1, 1)))
    return transport


def test_every_worker_gets_every_tensor_and_the_group_is_kept():
    workers = Workers(2)
    transport = transport_to(workers)
    for version in ("1", "2"):
        transport.replace_weights(SOURCE, version)
        for weights in workers.weights:
            assert all(torch.equal(weights[name], tensor) for name, tensor in SOURCE)
        assert transport.buckets_sent == 3
    assert [size for _, size in workers.joined] == [3]
    transport.close()


def test_a_tensor_larger_than_a_bucket_is_broadcast_whole():
    workers, large = Workers(2), torch.randn(1000)
    transport = transport_to(workers)
    transport.replace_weights([("small", torch.ones(3)), ("large", large)])
    assert torch.equal(workers.weights[1]["large"], large)
    transport.close()


@pytest.mark.fault(
    point="a group that weights travel through",
    did="A broadcast fails",
    happens="The group is left; the next sync makes another",
    within=60,
)
def test_after_an_error_the_group_is_left_and_the_next_update_makes_another():
    workers = Workers(2)
    transport = transport_to(workers)
    workers.error = RuntimeError("refused")
    with pytest.raises(WeightSyncError, match="refused"):
        transport.replace_weights(SOURCE)
    transport.replace_weights(SOURCE)
    workers.error = RuntimeError("a worker was restarted")  # said to the one that checks the group
    transport.replace_weights(SOURCE)
    assert len({secret for secret, _ in workers.joined}) == 2
    transport.close()


def test_an_update_left_open_is_ended_before_a_group_is_made():
    workers = Workers(2)
    workers.error = RuntimeError(to_text(WeightSyncError("any words", phase="transfer", reason=UPDATE_OPEN)))
    transport = transport_to(workers)
    transport.replace_weights(SOURCE)
    assert workers.calls[:5] == ["init", "abort", "finish None", "init", "init"]
    transport.close()


@pytest.mark.parametrize(
    ("own", "address"),
    [
        (["127.0.0.1", "127.0.0.1"], "127.0.0.1"),
        (["127.0.0.1", "10.0.0.7"], "10.0.0.7"),
        (["::1", "fe80::7%eth0"], "fe80::7%eth0"),
        (["10.0.0.7", "::1"], "10.0.0.7"),
    ],
)
def test_the_trainer_listens_on_an_address_that_all_servers_can_connect_to(monkeypatch, own, address):
    addresses = dict(zip("ab", own, strict=True))
    monkeypatch.setattr(_addresses, "own_address", addresses.__getitem__)
    assert _addresses.address_for_all(iter("ab")) == address


@pytest.mark.fault(
    point="a group that weights travel through",
    did="The trainer stops sending",
    happens="The worker gives up at its timeout",
    within=60,
)
def test_a_worker_that_receives_nothing_gives_up_in_time():
    workers = Workers(2)
    transport = transport_to(workers, timeout=1.0)
    transport.replace_weights(SOURCE)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="bucket did not arrive"):
        workers.receivers[0].receive(64)
    assert time.monotonic() - start < 8.0
    transport.close()


@pytest.mark.parametrize(("address", "url"), [("::1", "tcp://[::1]:5555"), ("10.0.0.7", "tcp://10.0.0.7:5555")])
def test_a_worker_asks_for_its_way_to_the_trainer_by_either_internet_protocol(monkeypatch, address, url):
    asked: list[str] = []

    def own_address(to: str) -> str:
        asked.append(to)
        raise OSError("no way")

    monkeypatch.setattr(collective, "own_address", own_address)
    with pytest.raises(Exception, match="no way"):
        GroupReceiver({"address": address, "port": 5555, "secret": "00"}, 1, CPU)
    assert asked == [url]
