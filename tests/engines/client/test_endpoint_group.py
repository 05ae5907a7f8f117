"""Several servers as one: all are called at once, each gets its own rank, and an error names its server."""

from __future__ import annotations

import pytest

from vgen import WeightSyncError
from vgen.engines.client.endpoint import Endpoint
from vgen.engines.client.endpoint_group import ServerGroup
from vgen.engines.client.event_loop_thread import EventLoopThread
from vgen.engines.client.http import HttpClient
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import FaultyServer, MemorySink


@pytest.fixture
def loop():
    thread = EventLoopThread()
    yield thread
    thread.close()


def group_of(loop, *servers, workers=1, features=frozenset({"recorded"})):
    endpoints = [Endpoint(HttpClient(server.url), "m", 100, features=features) for server in servers]
    for endpoint in endpoints:
        endpoint.workers = workers
    return ServerGroup(loop, endpoints)


def bodies(server, path):
    return [body for seen, _, body in server.seen if seen == path]


def test_every_server_gets_the_rank_of_its_first_worker(loop):
    with FaultyServer() as first, FaultyServer() as second:
        group_of(loop, first, second, workers=2).init_weight_transfer_engine({"group": {"size": 5}})
        ranks = [
            bodies(server, "/init_weight_transfer_engine")[0]["init_info"]["rank_offset"] for server in (first, second)
        ]
    assert ranks == [1, 3]


def test_a_server_of_an_older_vgen_is_not_told_which_tensors_will_come(loop):
    info = {"forms": [["a", "float32", [2]]], "forms_name": "x", "path": "/dev/shm/a"}
    with FaultyServer() as older, FaultyServer() as newer:
        group_of(loop, older, features=frozenset()).init_weight_transfer_engine(info)
        group_of(loop, newer).init_weight_transfer_engine(info)
        assert bodies(older, "/init_weight_transfer_engine") == [{"init_info": {"path": "/dev/shm/a"}}]
        assert bodies(newer, "/init_weight_transfer_engine") == [{"init_info": info}]


def test_an_error_names_the_server_and_the_phase(loop):
    with FaultyServer() as well, FaultyServer() as broken:
        broken.faults["/update_weights"] = [500]
        with pytest.raises(WeightSyncError, match="the server says no") as caught:
            group_of(loop, well, broken).update_weights({"bytes": 0})
        assert (caught.value.receiver, caught.value.phase) == (broken.url, "transfer")
        assert len(bodies(well, "/update_weights")) == 1


def test_the_servers_seconds_are_attributes_of_the_span(loop):
    profiling = ProfilingContext([MemorySink()])
    with FaultyServer() as first, FaultyServer() as second, profiling.span("x") as span:
        group = group_of(loop, first, second)
        group.update_weights({})
        group.record_seconds(span, "update_weights")
        group.record_seconds(span, "finish_weight_update")  # was not called: nothing is set
    low, middle, high = (
        span.attributes[n] for n in (semconv.RECEIVER_MIN, semconv.RECEIVER_MEDIAN, semconv.RECEIVER_MAX)
    )
    assert 0 < low <= middle <= high


def test_an_update_in_one_call_says_what_the_server_does_not_know_yet(loop):
    with FaultyServer() as server:
        group = group_of(loop, server)
        group.update_in_one_call({"table": "one"}, "7", {"handles": [1]})
        group.update_in_one_call({"table": "one"}, "8")
        sent = [body for _, _, body in server.seen if isinstance(body, dict) and "update_info" in body]
    assert sent == [
        {"update_info": {"table": "one"}, "weight_version": "7", "init_info": {"handles": [1]}},
        {"update_info": {"table": "one"}, "weight_version": "8"},
    ]
