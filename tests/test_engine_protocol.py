"""The contract of engines: states and their transitions, cancellation, refusals, and the defaults of a source."""

from __future__ import annotations

import threading

import pytest

from vgen import EngineStateError, PromptError
from vgen.engine_protocol import (
    Cancellation,
    CannotProbe,
    EngineState,
    Request,
    Source,
    StateMachine,
    refusal,
    refused_by,
)
from vgen.errors import ServerError

S = EngineState


def machine(state: EngineState = S.AWAKE) -> StateMachine:
    states = StateMachine()
    if state is not S.STARTING:
        states.move("construction", S.AWAKE)
    if state not in (S.STARTING, S.AWAKE):
        states.move("test", state)
    return states


@pytest.mark.parametrize(
    ("state", "to", "hint"),
    [
        (S.ASLEEP, S.PAUSED, "wake_up"),
        (S.PAUSED, S.ASLEEP, "resume"),
        (S.FAILED, S.AWAKE, "sync_weights"),
        (S.CLOSED, S.AWAKE, "closed"),
    ],
)
def test_a_transition_that_does_not_fit_names_the_state_and_what_to_do(state, to, hint):
    states = machine(state)
    with pytest.raises(EngineStateError, match=hint) as caught:
        states.move("a call", to)
    assert (caught.value.call, caught.value.state, states.state) == ("a call", str(state), state)


def test_an_error_within_a_state_ends_in_failed_and_a_refusal_restores_what_was_found():
    states, moves = machine(), []
    states.on_transition = lambda was, now: moves.append((was, now))

    def sync() -> None:
        with states.during("sync_weights", S.SYNCING, S.AWAKE):
            assert states.state is S.SYNCING
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        sync()
    assert (states.state, states.describe()) == (S.FAILED, "failed (sync_weights raised OSError)")
    assert moves == [(S.AWAKE, S.SYNCING), (S.SYNCING, S.FAILED)]
    states.restore(S.AWAKE, "")
    assert states.describe() == "awake"


def test_failing_twice_or_after_closing_changes_nothing():
    states = machine(S.FAILED)
    states.fail("generate", "again")
    assert states.detail == ""
    states.move("close", S.CLOSED)
    states.fail("generate", "late")
    assert states.state is S.CLOSED


def test_waiting_ends_when_the_state_changes():
    states, waited = machine(S.SYNCING), threading.Event()
    thread = threading.Thread(target=lambda: (states.wait_while(S.SYNCING, 30), waited.set()))
    thread.start()
    assert not waited.wait(0.05)
    states.move("sync_weights", S.AWAKE)
    assert waited.wait(10)
    thread.join()


def test_a_cancelled_batch_calls_who_asked_before_and_after():
    cancellation, calls = Cancellation(), []
    cancellation.then(lambda: calls.append("before"))
    assert (cancellation.cancelled, calls) == (False, [])
    cancellation.cancel()
    cancellation.then(lambda: calls.append("after"))
    assert (cancellation.cancelled, calls) == (True, ["before", "after"])


def test_a_refused_request_keeps_its_number_and_a_server_is_quoted():
    request = Request(3, 1, [1, 2], None, rank=2)
    assert refusal(request, PromptError(3, "is too long")).key == request.key == (2, 3, 1)
    error = ServerError("no", url="http://a", status=400, server_message="17 tokens are too many")
    refused = refused_by(request, error, limit=16)
    assert (refused.finish_reason, refused.error.index, refused.error.limit) == ("error", 3, 16)
    assert "17 tokens are too many" in str(refused.error)
    assert refused.error.__cause__ is error


def test_a_source_needs_only_its_tensors():
    class Two(Source):
        def __iter__(self):
            yield from (("a", None), ("b", None))

    source = Two()
    assert [name for name, _ in source] == ["a", "b"]
    assert (source.model, source.collective, source.metadata(), source.address_snapshot()) == (None, False, None, None)
    source.drain()
    source.take_part()
    with pytest.raises(CannotProbe, match="no model"):
        source.probe_logprobs([1])
    with pytest.raises(TypeError, match="__iter__"):
        iter(Source())
