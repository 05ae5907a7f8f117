"""How a session runs cases, what it makes of what a subject does, and that nothing waits for ever."""

from __future__ import annotations

import threading
import unittest

import pytest
import torch
from helpers.copied_model import CopiedModel

from vgen.checks.architectures import tiny_model
from vgen.checks.session import Case, Session, WrongWeights, describe
from vgen.checks.sync_cases import SYNC_CASES
from vgen.errors import CheckError

FRESH = next(case for case in SYNC_CASES if case.name == "fresh sync")


@pytest.fixture
def model():
    model = tiny_model("llama", seed=1)
    return model


def case(run, *needs):
    return Case("a case", "does something", run, "a cause", "a fix", frozenset(needs))


class Stale(CopiedModel):
    def sync(self, model):
        pass


def test_a_right_case_has_its_figures(model):
    with Session(model, CopiedModel) as session:
        outcome = session.run(FRESH)
    assert (outcome.case, outcome.status, outcome.cause) == ("fresh sync", "right", "")
    assert outcome.measurement is not None
    assert outcome.measurement.ratio < 1
    assert outcome.seconds > 0


def test_a_wrong_engine_is_said_with_its_cause(model):
    with Session(model, Stale) as session:
        outcome = session.run(FRESH)
        assert outcome.status == "wrong"
        assert outcome.measurement is not None
        assert outcome.measurement.ratio > 1000
        assert "times the rounding noise" in outcome.detail
        assert FRESH.cause in describe(outcome)
        assert FRESH.fix in describe(outcome)
        with pytest.raises(WrongWeights, match="usual cause"):
            session.check(FRESH)


def test_a_sync_that_raises_is_a_refusal_and_other_errors_are_not(model):
    class Refuses(CopiedModel):
        def sync(self, model):
            raise ValueError("the tied head is not known")

    class Breaks(CopiedModel):
        def generate(self, prompts, **options):
            raise RuntimeError("the engine is gone")

    with Session(model, Refuses) as session:
        outcome = session.run(FRESH)
    assert (outcome.status, outcome.detail) == ("refused", "ValueError: the tied head is not known")
    with Session(model, Breaks) as session:
        outcome = session.run(FRESH)
    assert (outcome.status, outcome.detail) == ("error", "RuntimeError: the engine is gone")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda prompts, tokens: [([1] * tokens, [0.0] * tokens)] * (len(prompts) - 1), "7 completions: return one"),
        (lambda prompts, tokens: [([1] * (tokens - 1), [0.0] * tokens)] * len(prompts), "15 token ids and 16 log"),
        (lambda prompts, tokens: [([1] * tokens, [])] * len(prompts), "0 log-probabilities for prompt 0"),
        (lambda prompts, tokens: ["text"] * len(prompts), "not a list of (token ids, log-probabilities)"),
        (lambda prompts, tokens: None, "returned NoneType"),
    ],
)
def test_an_answer_of_another_form_is_an_error_that_says_what_to_return(model, answer, says):
    class Odd(CopiedModel):
        def generate(self, prompts, *, max_tokens, temperature):
            return answer(prompts, max_tokens)

    with Session(model, Odd) as session:
        outcome = session.run(FRESH)
    assert outcome.status == "error"
    assert says in outcome.detail


def test_a_call_that_never_returns_ends_the_session_with_its_name(model):
    release = threading.Event()

    class Hangs(CopiedModel):
        def sync(self, model):
            release.wait()

    session = Session(model, Hangs, timeout=0.5)
    with pytest.raises(CheckError, match=r"the case fresh sync did not end within 0.5 s.*hangs"):
        session.run(FRESH)
    assert session.stuck
    session.close()  # does not wait either
    release.set()


def test_no_thread_is_left(model):
    before = threading.active_count()
    with Session(model, CopiedModel) as session:
        session.run(FRESH)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_a_factory_that_raises_says_that_the_engine_did_not_start(model):
    def factory(model, folder):
        raise RuntimeError("no GPU here")

    with Session(model, factory) as session, pytest.raises(CheckError, match=r"could not be started.*no GPU here"):
        session.run(FRESH)


def test_a_subject_without_its_methods_is_refused(model):
    with (
        Session(model, lambda model, folder: object()) as session,
        pytest.raises(CheckError, match="needs the methods"),
    ):
        session.run(FRESH)


def test_what_a_case_needs_decides_whether_it_is_run(model):
    class Sleeps(CopiedModel):
        concurrent = True

        def sleep(self, level):
            pass

        def wake_up(self):
            pass

    ran = []
    sleeping, in_flight = case(ran.append, "sleep mode"), case(ran.append, "updates in flight")
    with Session(model, CopiedModel) as session:
        assert session.run(sleeping).detail == "needs sleep mode"
        with pytest.raises(unittest.SkipTest):
            session.check(in_flight)
    assert not ran
    with Session(model, Sleeps) as session:
        assert [session.run(each).status for each in (sleeping, in_flight)] == ["right", "right"]
    assert len(ran) == 2


def test_weights_are_put_back_and_the_subject_is_closed(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    subjects = []

    def factory(model, folder):
        subjects.append(CopiedModel(model, folder))
        return subjects[-1]

    with Session(model, factory) as session:
        session.run(FRESH)
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        session.restore()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(subjects[0].engine.lm_head.weight, before["lm_head.weight"])
        assert not subjects[0].closed
    assert subjects[0].closed


def test_a_subject_that_does_not_take_the_weights_back_is_an_error(model):
    class Once(CopiedModel):
        syncs = 0

        def sync(self, model):
            self.syncs += 1
            if self.syncs == 1:
                super().sync(model)

    with Session(model, Once) as session:
        session.run(FRESH)
        with pytest.raises(CheckError, match="could not be put back"):
            session.restore()
