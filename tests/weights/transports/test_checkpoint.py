"""Weights as a folder that servers reload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.transfers import FakeEndpoint, FakeGroup, Trace

from vgen.profiling import semconv
from vgen.weights.transports import checkpoint
from vgen.weights.transports.checkpoint import CheckpointTransport, write_checkpoint
from vgen.weights.transports.weight_transport import TransportSettings, WeightUpdate

load_file = pytest.importorskip("safetensors.torch").load_file


class Servers:
    """Loads what is in the folder, as vLLM does."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def reload_checkpoint(self, folder: str) -> None:
        files = sorted(Path(folder).iterdir())
        self.calls.append({name: tensor for file in files for name, tensor in load_file(file).items()})

    def set_version(self, weight_version: str) -> None:
        self.calls.append(weight_version)


class Source:
    """Says when it is read."""

    seconds = 0.5

    def __init__(self, value: float, events: list[str]) -> None:
        self.value, self.events = value, events

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.events.append(f"read {self.value}")
        yield "weight", torch.full((3,), self.value)


def test_folders_are_written_before_the_pause_and_removed_after_the_load(tmp_path):
    events, servers, trace = list[str](), Servers(), Trace()
    transport = CheckpointTransport(TransportSettings(folder=str(tmp_path)))
    random, source = Source(1.0, events), Source(2.0, events)
    update: Any = WeightUpdate(source, "7", trace, random)  # pyright: ignore[reportArgumentType]
    transport.open(FakeGroup(servers), source)  # pyright: ignore[reportArgumentType]
    with transport.prepared(update):
        events.append("pause")
        assert len(list(tmp_path.iterdir())) == 2
        transport.send(update)
    assert events == ["read 1.0", "read 2.0", "pause"]
    assert list(tmp_path.iterdir()) == []
    first, second, version = servers.calls
    assert (first["weight"].tolist(), second["weight"].tolist(), version) == ([1.0] * 3, [2.0] * 3, "7")
    assert trace.phases == [("transfer", {semconv.GATHER_SECONDS: 0.5}), ("load", {})]


@pytest.mark.fault(
    point="shared memory and folders for weights",
    did="The pause fails after a checkpoint was written",
    happens="The folder is removed",
    within=20,
)
def test_folders_are_removed_if_the_pause_fails(tmp_path):
    transport = CheckpointTransport(TransportSettings(folder=str(tmp_path)))
    update: Any = WeightUpdate(Source(1.0, []), "7", Trace())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConnectionError), transport.prepared(update):
        raise ConnectionError
    assert list(tmp_path.iterdir()) == []


def test_tied_tensors_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20)
    tied = torch.arange(4.0)
    write_checkpoint([("a", tied), ("b", tied), ("c", torch.ones(1, dtype=torch.bfloat16))], tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [sorted(load_file(file)) for file in files] == [["a", "b"], ["c"]]
    assert torch.equal(load_file(files[0])["b"], tied)


def test_every_server_is_supported():
    for endpoint in (FakeEndpoint(), FakeEndpoint(features=frozenset({"batch"}), host="another")):
        assert CheckpointTransport(TransportSettings()).supports(endpoint, None) is None
