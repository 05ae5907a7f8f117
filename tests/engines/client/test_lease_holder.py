"""The client's side of the lease."""

from __future__ import annotations

import itertools
import logging
import time

import pytest
from helpers.server_generation import BATCH, PROMPTS, calls, generation, tokens
from helpers.waiting import wait_until

from vgen import (
    EngineError,
    EngineState,
    EngineStateError,
    LoRARequest,
    ServerError,
    WeightSyncError,
)
from vgen.engines.client import lease_holder

TAKE, RENEW, RELEASE = "/vgen/lease", "/vgen/lease/renew", "/vgen/lease/release"


def gives(server, epoch, instance="a process"):
    """Have the server give its next lease with this number."""
    server.answers[TAKE] = {"token": f"token-{epoch}", "epoch": epoch}
    server.answers["/vgen/instance"] = {"instance": instance}


def lose(server):
    """Have the server refuse the lease that it has given, once."""
    server.faults[RENEW] = [409]


def last_token(server, path):
    return [headers for seen, headers, _ in server.seen if seen.partition("?")[0] == path][-1].get("X-Vgen-Lease")


def test_the_lease_is_taken_carried_and_released(ours):
    with generation(ours, control_key="key") as made:
        made.generate([[1]])
        made.sleep()
    paths = {path.partition("?")[0]: headers for path, headers, _ in ours.seen}
    assert paths["/sleep"]["X-Vgen-Lease"] == "a-token"
    assert paths["/vgen/lease/release"]["X-Vgen-Lease"] == "a-token"
    assert "X-Vgen-Lease" not in paths[BATCH]  # inference needs none


@pytest.mark.fault(
    point="the trainer's lease",
    did="Another trainer holds the server",
    happens="`EngineError` says how to take it over; nothing changes",
    within=60,
)
def test_a_server_that_another_living_trainer_holds_is_not_taken(ours):
    ours.faults["/vgen/lease"] = [409] * 100
    with pytest.raises(EngineError, match="takeover=True"):
        generation(ours, timeout=0.75)
    ours.faults.clear()
    with generation(ours, takeover=True):
        assert calls(ours, "/vgen/lease")[-1]["takeover"] is True


@pytest.mark.parametrize(
    ("leases", "alive"),
    [
        ([{"epoch": 1, "expires_in_seconds": 50.0}], False),
        ([{"epoch": 1, "expires_in_seconds": 50.0}, {"epoch": 1, "expires_in_seconds": 60.0}], True),
        ([{"epoch": 1, "expires_in_seconds": 50.0}, {"epoch": 2, "expires_in_seconds": 50.0}], True),
        ([{"epoch": 1, "expires_in_seconds": 0.0}], True),  # a call is under way, longer than the lease lasts
        ([None], False),
    ],
)
def test_another_trainer_is_called_alive_only_where_its_lease_shows_it(ours, leases, alive):
    ours.faults[TAKE] = [409] * 100
    said = itertools.chain(leases, itertools.repeat(leases[-1]))
    info = ours.answers["/vgen/info"]
    ours.faults["/vgen/info"] = [None, *[lambda _: {**info, "lease": next(said)}] * 100]
    with pytest.raises(EngineError, match=r"another trainer.* holds the lease") as caught:
        generation(ours, timeout=0.75)
    assert ("is alive" in str(caught.value)) is alive


@pytest.mark.parametrize("synced_before", [True, False])
@pytest.mark.fault(
    point="the trainer's lease",
    did="The lease has ended while the trainer was suspended",
    happens="The next sync takes it again",
    within=60,
)
def test_a_lease_that_has_ended_is_taken_again_for_the_next_sync(ours, synced_before):
    gives(ours, 1)
    with generation(ours) as made:
        if synced_before:
            made.sync_weights()
        lose(ours)
        gives(ours, 2)
        made.sync_weights()
        assert last_token(ours, "/pause") == last_token(ours, "/resume") == "token-2"
        assert tokens(made.generate(PROMPTS)) == PROMPTS
    assert last_token(ours, RELEASE) == "token-2"


def test_a_lease_that_has_ended_is_taken_again_in_the_background(ours, monkeypatch, caplog):
    monkeypatch.setattr(lease_holder, "LEASE_SECONDS", 0.3)
    caplog.set_level(logging.INFO)
    gives(ours, 1)
    with generation(ours):
        lose(ours)
        gives(ours, 2)
        wait_until(lambda: len(calls(ours, TAKE)) == 2)
        wait_until(lambda: last_token(ours, RENEW) == "token-2")
    assert "was taken again" in caplog.text
    assert "taken over" not in caplog.text


def test_a_lease_is_renewed_well_before_it_ends_also_after_a_renewal_that_failed(ours, monkeypatch):
    monkeypatch.setattr(lease_holder, "LEASE_SECONDS", 3.0)
    renewed: list[float] = []

    def note(_):
        renewed.append(time.monotonic())
        return {}

    with generation(ours):
        begun = time.monotonic()
        ours.faults[RENEW] = [note, 503, note]
        wait_until(lambda: len(renewed) == 2)
    assert renewed[0] - begun < 2.0
    assert renewed[1] - renewed[0] < 3.0  # the second renewal of three failed


def test_weights_stay_known_if_nobody_held_the_lease_meanwhile(ours):
    gives(ours, 1)
    with generation(ours) as made:
        made.sync_weights()
        lose(ours)
        gives(ours, 2)
        made.pause()
        made.resume()
        syncs = len(calls(ours, "/collective_rpc"))
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        assert len(calls(ours, "/collective_rpc")) == syncs


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(lambda server: gives(server, 3), id="another-trainer-had-it"),
        pytest.param(lambda server: gives(server, 2, "another process"), id="the-server-was-restarted"),
        pytest.param(lambda server: server.answers.update({TAKE: {"token": "token-2"}}), id="nobody-knows"),
    ],
)
@pytest.mark.fault(
    point="the trainer's lease",
    did="Another trainer held the lease meanwhile",
    happens="Nothing is generated until a full sync",
    within=60,
)
def test_weights_are_unknown_until_a_sync_if_another_trainer_may_have_held_the_lease(ours, again, caplog):
    gives(ours, 1)
    with generation(ours) as made:
        made.sync_weights(version="1")
        lose(ours)
        again(ours)
        made.pause()
        made.resume()
        assert "another trainer may have held" in caplog.text
        with pytest.raises(ServerError, match=r"sync_weights\(\) that reaches one brings it back"):
            made.generate(PROMPTS)  # although the server names the version that this trainer sent
        made.sync_weights(version="2")
        assert tokens(made.generate(PROMPTS)) == PROMPTS


@pytest.mark.fault(
    point="the trainer's lease",
    did="Another client has the lease",
    happens="It is reported, and taken once it is free",
    within=60,
)
def test_a_lease_that_another_client_has_is_reported_and_taken_once_it_is_free(ours, caplog):
    gives(ours, 1)
    with generation(ours) as made:
        made.sync_weights()
        ours.faults.update({RENEW: [409], TAKE: [409]})
        with pytest.raises(EngineStateError, match=r"under the lease of another client.*the server says no"):
            made.pause()
        assert made.state is EngineState.AWAKE
        assert tokens(made.generate(PROMPTS)) == PROMPTS
        ours.seen.clear()
        ours.faults.update({RENEW: [409], TAKE: [409]})
        with pytest.raises(WeightSyncError, match="has lost its lease: the server says no"):
            made.sync_weights()
        assert calls(ours, "/pause") == []
        ours.faults[RENEW] = [409]
        gives(ours, 3)
        made.sync_weights()
        assert last_token(ours, "/pause") == "token-3"
        assert tokens(made.generate(PROMPTS)) == PROMPTS
    assert "alive" not in caplog.text


@pytest.mark.fault(
    point="the trainer's lease",
    did="The lease ends during a sync",
    happens="`WeightSyncError`; the weights count as unknown",
    within=60,
)
def test_a_sync_fails_if_another_trainer_may_have_held_the_lease_during_it(ours, monkeypatch):
    monkeypatch.setattr(lease_holder, "LEASE_SECONDS", 0.3)
    gives(ours, 1)
    with generation(ours) as made:

        def suspended(_):  # the trainer's renewal in the background finds another lease, as after a suspension
            gives(ours, 3)
            lose(ours)
            wait_until(lambda: last_token(ours, RENEW) == "token-3")
            return {"results": [None]}

        ours.faults["/collective_rpc"] = [suspended]
        with pytest.raises(WeightSyncError, match="the lease ended during the sync"):
            made.sync_weights(verify="none")
        made.sync_weights(verify="none")
        assert tokens(made.generate(PROMPTS)) == PROMPTS


def test_an_adapter_is_loaded_under_a_lease_that_was_taken_again(ours, tmp_path):
    gives(ours, 1)
    with generation(ours) as made:
        made.sync_weights(verify="none")
        lose(ours)
        gives(ours, 2)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        made.generate([[1]], lora_request=LoRARequest(lora_name="an adapter", lora_path=str(tmp_path)))
        assert last_token(ours, "/v1/load_lora_adapter") == "token-2"
