"""Calls that ranks make together, where rank 0 has the engine."""

from __future__ import annotations

import threading

import pytest

from vgen import Completion, PromptError
from vgen.distributed.ranks import RankPrompt
from vgen.errors import EngineStateError, RankError

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from helpers.socket_ranks import on_leader_ranks
from helpers.waiting import wait_until

from vgen.distributed.rank_messages import Message
from vgen.distributed.rank_sockets import ready


def test_what_the_leader_returns_all_ranks_return(monkeypatch):
    assert on_leader_ranks(monkeypatch, 3, lambda ranks: ranks.lead("verify", lambda: {"x": [1]})) == [{"x": [1]}] * 3


def test_what_the_leader_raises_all_ranks_raise(monkeypatch):
    def work(ranks):
        def function():
            raise EngineStateError("sleep", "paused", "call resume() first")

        ranks.lead("sleep", function)

    errors = on_leader_ranks(monkeypatch, 3, work)
    assert {type(error) for error in errors} == {EngineStateError}
    assert [getattr(error, "__notes__", None) for error in errors] == [None, ["raised on rank 0"], ["raised on rank 0"]]
    assert {error.state for error in errors} == {"paused"}


def test_what_another_rank_raises_before_the_call_begins_all_ranks_raise(monkeypatch):
    def work(ranks):
        with ranks.call("generate") as call:
            if ranks.index == 2:
                raise PromptError(4, "is empty")
            call.gather([], {})
            call.lead(list)

    errors = on_leader_ranks(monkeypatch, 3, work)
    assert [(type(error), error.index) for error in errors] == [(PromptError, 4)] * 3
    assert [getattr(error, "__notes__", None) for error in errors] == [["raised on rank 2"], ["raised on rank 2"], None]


@pytest.mark.fault(
    point="a call of all ranks",
    did="Two ranks call with different arguments",
    happens="`ValueError` names the argument on all ranks",
    within=20,
)
def test_terms_that_differ_are_named_on_all_ranks(monkeypatch):
    errors = on_leader_ranks(monkeypatch, 2, lambda ranks: ranks.lead("sleep", dict, level=ranks.index))
    assert [str(error) for error in errors] == ["rank 1 called sleep with another level than rank 0"] * 2


def test_each_rank_gets_the_completions_of_its_own_prompts_under_its_own_numbers(monkeypatch):
    def work(ranks):
        with ranks.call("generate") as call:
            prompts = call.gather([RankPrompt(3, [ranks.index], rank=ranks.index)], {})
            sampled = call.lead(
                lambda: [
                    Completion(rank=p.rank, prompt_index=p.prompt_index, generation_index=0, token_ids=p.token_ids)
                    for p in reversed(prompts)
                ]
            )
            own = call.scatter(sampled)
            return [p.rank for p in prompts], [(c.key, c.token_ids) for c in own], call.refused

    assert on_leader_ranks(monkeypatch, 3, work) == [
        ([0, 1, 2], [((0, 3, 0), [0])], None),
        ([], [((1, 3, 0), [1])], None),
        ([], [((2, 3, 0), [2])], None),
    ]


def test_a_refused_prompt_is_known_to_all_ranks(monkeypatch):
    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            error = PromptError(1, "is not to its taste", 7)
            refused = Completion(rank=1, prompt_index=1, generation_index=0, token_ids=[], error=error)
            call.scatter(call.lead(lambda: [refused]))
            return call.refused

    for error in on_leader_ranks(monkeypatch, 3, work):
        assert (error.index, error.limit, error.__notes__) == (1, 7, ["raised on rank 1"])


@pytest.mark.fault(
    point="a call of all ranks",
    did="A rank does not come to a call",
    happens="`RankError` names it on the others",
    within=20,
)
def test_a_rank_that_does_not_come_is_named(monkeypatch):
    def work(ranks):
        if ranks.index != 2:
            ranks.lead("pause", dict)

    zero, one, two = on_leader_ranks(monkeypatch, 3, work, timeout=0.5)
    assert [str(zero), str(one)] == ["rank 2 is gone: its connection ended in pause"] * 2
    assert type(zero) is type(one) is RankError
    assert two is None


def test_a_call_within_a_call_of_the_same_thread_is_refused(monkeypatch):
    def work(ranks):
        if ranks.leading:
            with ranks.call("generate"):
                ranks.call("generate").__enter__()

    zero, _ = on_leader_ranks(monkeypatch, 2, work)
    assert isinstance(zero, EngineStateError)
    assert zero.state == "at work in this thread"


def test_calls_of_different_channels_do_not_wait_for_each_other(monkeypatch):
    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            between = ranks.lead("pause", lambda: "paused")
            return between, call.share(lambda: "generated")

    assert on_leader_ranks(monkeypatch, 2, work) == [("paused", "generated")] * 2


def test_of_several_ranks_errors_the_one_that_came_first_is_raised_whatever_the_order_of_ranks(monkeypatch):
    two_has_failed = threading.Event()

    def work(ranks):
        try:
            with ranks.call("sync_weights") as call:
                if ranks.leading:
                    wait_until(lambda: len(ready(call._connections, 0)) == 2)
                    call.raise_reported()
                assert ranks.index == 2 or two_has_failed.wait(10)
                raise ValueError(f"of rank {ranks.index}")
        finally:
            if ranks.index == 2:
                two_has_failed.set()

    leader, *_ = on_leader_ranks(monkeypatch, 3, work)
    assert (str(leader), leader.raised_on, leader.__notes__) == ("of rank 2", 2, ["raised on rank 2"])


def test_a_rank_that_gave_up_after_it_asked_is_heard_before_the_call_begins(monkeypatch):
    two_has_failed = threading.Event()

    def work(ranks):
        try:
            with ranks.call("generate") as call:
                if ranks.index == 2:
                    call._send(0, Message("ask", 0, 0, {"terms": {}}, []))
                    raise ValueError("gave up")
                assert two_has_failed.wait(10)
                call.gather([], {})
                return "went on"
        finally:
            if ranks.index == 2:
                two_has_failed.set()

    leader, one, _ = on_leader_ranks(monkeypatch, 3, work)
    assert str(leader) == str(one) == "gave up"
    assert leader.raised_on == one.raised_on == 2


@pytest.mark.parametrize("when", ["reports", "scatter"])
def test_of_several_ranks_that_are_gone_the_first_is_named(monkeypatch, when):
    both_are_gone = threading.Barrier(3)

    def work(ranks):
        with ranks.call("generate") as call:
            call.gather([], {})
            if not ranks.leading:
                ranks.close()
                both_are_gone.wait(10)
                return None
            both_are_gone.wait(10)
            call.raise_reported() if when == "reports" else call.scatter([])

    leader, *_ = on_leader_ranks(monkeypatch, 3, work)
    assert (type(leader), leader.rank) == (RankError, 1)


def test_of_several_ranks_that_do_not_come_the_error_names_all_and_bears_the_first(monkeypatch):
    leader_gave_up = threading.Event()

    def work(ranks):
        if not ranks.leading:
            assert leader_gave_up.wait(10)
            return
        try:
            ranks.lead("pause", dict)
        finally:
            leader_gave_up.set()

    leader, *_ = on_leader_ranks(monkeypatch, 3, work, timeout=0.3)
    assert (str(leader), leader.rank) == ("ranks 1, 2 did not come to pause within 0.3 s", 1)
