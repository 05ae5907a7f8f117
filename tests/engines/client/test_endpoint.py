"""A server that comes back with other weights gets no requests until the next sync."""

from __future__ import annotations

import pytest
from helpers.server_generation import BATCH, COMPLETIONS, PROMPTS, calls, generation, tokens

from vgen import (
    Sampling,
    ServerError,
)
from vgen.engine_protocol import Batch
from vgen.engines.client.endpoint import Endpoint, was_restarted
from vgen.engines.client.http import HttpClient
from vgen.testing import FaultyServer


@pytest.mark.fault(
    point="a server that restarts or fails an update",
    did="A server restarts with its initial weights",
    happens="It is left out until the next sync",
    within=60,
)
def test_a_server_that_comes_back_with_other_weights_is_left_out_until_the_next_sync(server):
    pytest.importorskip("safetensors")
    with FaultyServer() as other, generation(server, other) as made:
        made.sync_weights(version="0")
        other.answers["/weight_info"] = {"weight_version": "default"}  # it was started anew
        other.faults[COMPLETIONS] = ["reset"] * 40
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        other.faults.clear()
        other.seen.clear()
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        assert calls(other, COMPLETIONS) == []
        made.sync_weights(version="1")
        for each in (server, other):
            each.answers["/weight_info"] = {"weight_version": "1"}
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        assert calls(other, COMPLETIONS) != []


@pytest.mark.parametrize("features", [(), ("batch", "lease")])
def test_a_server_that_was_started_anew_while_nobody_looked_is_left_out_until_the_next_sync(features, caplog):
    path = BATCH if features else COMPLETIONS
    with FaultyServer(features=features) as one, FaultyServer(features=features) as other:
        for each in (one, other):
            each.answers["/weight_info"] = {"weight_version": "0"}
        with generation(one, other) as made:
            made.generate(PROMPTS)
            assert calls(other, path) != []
            other.answers["/weight_info"] = {"weight_version": "default"}
            seen = []
            rollouts = made.generate(PROMPTS, on_completion=seen.append)
            assert tokens(rollouts) == PROMPTS
            assert len(seen) == 20
            assert {completion.server for completion in rollouts} == {one.url}
            assert "is back with weights 'default', not '0'" in caplog.text
            one.answers["/weight_info"] = {"weight_version": "default"}
            with pytest.raises(ServerError, match=r"was restarted|sync_weights\(\) that reaches one brings it back"):
                made.generate(PROMPTS)


def test_speed_is_smoothed_over_calls_and_nothing_is_learned_of_an_empty_one():
    endpoint = Endpoint(HttpClient("http://server"), "tiny", 64)
    endpoint.record_speed(0, 1.0)
    assert endpoint.speed is None
    endpoint.record_speed(100, 1.0)
    endpoint.record_speed(200, 1.0)
    assert endpoint.speed == pytest.approx(130.0)


def test_a_restart_shows_by_the_initial_weights_alone():
    assert was_restarted("default", "step-1")
    assert not was_restarted("step-1", "step-1")
    assert not was_restarted("default", "default")
    assert not was_restarted("default", None)
    assert not was_restarted(None, "step-1")


def test_an_endpoint_of_no_engine_says_so_when_it_is_to_sample():
    endpoint = Endpoint(HttpClient("http://server"), "tiny", 64)
    with pytest.raises(RuntimeError, match="no engine has been constructed"):
        endpoint.stream(Batch((), Sampling()))


def test_nothing_that_was_known_of_a_server_is_known_after_its_restart():
    endpoint = Endpoint(HttpClient("http://server"), "tiny", 64)
    endpoint.verified, endpoint.unchecked, endpoint.devices = True, False, frozenset({"cuda:0"})
    endpoint.audited = ("forms", {"audited": True})
    endpoint.slept.add(2)
    before = endpoint.restarts
    endpoint.rejoin()
    assert (endpoint.verified, endpoint.unchecked, endpoint.devices, endpoint.audited) == (False, True, None, ("", {}))
    assert not endpoint.slept
    assert endpoint.restarts == before + 1


def test_a_new_endpoint_is_usable_and_nothing_is_known_of_its_weights():
    endpoint = Endpoint(HttpClient("http://server"), "tiny", 64)
    assert not any((endpoint.lost, endpoint.unknown, endpoint.stopped, endpoint.updating, endpoint.frozen))
    assert not any((endpoint.verified, endpoint.moves_experts, endpoint.slept, endpoint.load_report, endpoint.audit))
    assert endpoint.unchecked
    assert (endpoint.restarts, endpoint.aborts, endpoint.workers, endpoint.max_num_seqs) == (0, 0, 1, 256)
    assert endpoint.vocabulary_size > 1_000_000
