"""What all streaming transports share: what is kept between syncs, the phases, and errors."""

from __future__ import annotations

import pytest
import torch
from helpers.transfers import FakeEndpoint, FakeGroup, Trace

from vgen import WeightSyncError
from vgen.weights import source_of
from vgen.weights.transports.weight_transport import StreamTransport, TransportSettings, WeightUpdate, source_gpu

SOURCE = source_of([("a", torch.zeros(2))])


class Client:
    def __init__(self):
        self.finished = []

    def finish_weight_update(self, weight_version=None):
        self.finished.append(weight_version)


class Stream(StreamTransport):
    """A transport that only remembers what it was asked to stream."""

    name, serves = "shared_memory", "servers of a test"

    def __init__(self, fails=None):
        super().__init__(TransportSettings())
        self.streamed, self.closed, self.fails = [], 0, fails

    def supports(self, endpoint, source):
        return None

    def stream(self, source):
        with self._close_on_error():
            if self.fails is not None:
                raise self.fails
            self.streamed.append([name for name, _ in source])

    def measured(self):
        return {"test.streamed": len(self.streamed)}

    def close(self):
        self.closed += 1


def test_a_sync_streams_random_weights_first_and_gives_the_version_last():
    transport, client, trace = Stream(), Client(), Trace()
    transport.open(FakeGroup(client), SOURCE)
    transport.send(WeightUpdate(SOURCE, "v7", trace, random=[("random", torch.ones(1))]))
    assert transport.streamed == [["random"], ["a"]]
    assert client.finished == ["v7", "v7"]
    assert [name for name, _ in trace.phases] == ["transfer", "load"]
    assert trace.phases[0][1]["test.streamed"] == 2


@pytest.mark.parametrize(
    ("later", "made_anew"),
    [
        (FakeEndpoint(), False),
        (FakeEndpoint(workers=2), True),
        (FakeEndpoint(name="http://127.0.0.1:2"), True),
        (FakeEndpoint(restarts=1), True),
        (FakeEndpoint(restarts=1, features=frozenset({"group_with_secret"})), False),
    ],
    ids=["the same", "more workers", "another server", "a restarted stock server", "a restarted server of vgen's"],
)
def test_what_was_made_is_kept_while_the_servers_are_the_same(later, made_anew):
    transport = Stream()
    transport.open(FakeGroup(Client(), FakeEndpoint(features=later.features)), SOURCE)
    before = transport.closed
    transport.open(FakeGroup(Client(), later), SOURCE)
    assert transport.closed - before == made_anew


@pytest.mark.fault(
    point="the choice of a transport",
    did="An error or Ctrl-C in a transfer",
    happens="The transport is closed",
    within=20,
)
def test_an_error_closes_the_transport_and_is_a_weight_sync_error_but_an_interrupt_is_itself():
    for error, kind in ((OSError("disk full"), WeightSyncError), (KeyboardInterrupt(), KeyboardInterrupt)):
        transport = Stream(fails=error)
        transport.open(FakeGroup(Client()), SOURCE)
        before = transport.closed
        with pytest.raises(kind):
            transport.send(WeightUpdate(SOURCE, "v1", Trace()))
        assert transport.closed == before + 1


def test_a_source_without_a_model_or_on_the_host_is_on_no_gpu():
    assert source_gpu(SOURCE) is None
    assert source_gpu(source_of(torch.nn.Linear(1, 1))) is None
