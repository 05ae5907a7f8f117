"""Weight syncs of others, on real vLLM, through the public adapter alone: vLLM's own passes, broken ones are caught."""

from __future__ import annotations

import pytest
from helpers.reload_weights import ReloadWeights, broken

from vgen.checks import SYNC_CASES, Session, tiny_model

pytestmark = [pytest.mark.real, pytest.mark.slow]
CASES = {case.name: case for case in SYNC_CASES}
WRONG_IN_VLLM = {
    "a tensor too many": "a bias that the engine does not have",
    "a tensor of another shape": "a wider matrix was synced without an error",
}
"""vLLM's loader drops a bias that it does not know, and cuts a matrix that is too large, without a word."""


@pytest.fixture(scope="module")
def engines():
    """What the session below makes: its first engine is that of the broken syncs too."""
    return []


@pytest.fixture(scope="module")
def session(engines):
    def make(*arguments):
        engines.append(ReloadWeights(*arguments))
        return engines[-1]

    with Session(tiny_model("llama", seed=1), make) as session:
        yield session


@pytest.mark.parametrize("case", SYNC_CASES, ids=str)
def test_vllms_own_reload_is_right_or_named(session, case):
    outcome = session.run(case)
    if case.name in WRONG_IN_VLLM:
        assert outcome.status == "wrong"
        assert WRONG_IN_VLLM[case.name] in outcome.detail
    else:
        assert outcome.status in ("right", "skipped"), outcome


@pytest.mark.parametrize(("subject", "name"), broken())
def test_each_broken_sync_is_caught(session, engines, subject, name):
    assert session.run(CASES["fresh sync"]).status == "right"
    with Session(tiny_model("llama", seed=1), lambda *arguments: subject(*arguments, engines[0])) as other:
        outcome = other.run(CASES[name])
    assert outcome.status in ("wrong", "refused"), outcome
    assert outcome.cause
    assert outcome.fix
