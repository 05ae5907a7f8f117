"""When engines are verified: in a sync, deferred, skipped with a reason, after a sleep, or asked for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.tiny_models import fill, tiny

from vgen import Completion, WeightSyncError
from vgen.profiling import semconv
from vgen.weights import source_of
from vgen.weights.source.probe_forward import probe_logprobs
from vgen.weights.verification.logprob_check import BOUND, DECODED
from vgen.weights.verification.verification_phase import Verifier


class Trace:
    """A `SyncTrace` that keeps the attributes of the sync and of its phase."""

    def __init__(self) -> None:
        self.attributes, self.phases = dict[str, Any](), list[tuple[str, dict[str, Any]]]()

    @contextmanager
    def phase(self, name):
        inner = Trace()
        self.phases.append((name, inner.attributes))
        yield inner

    def set(self, attributes):
        self.attributes |= attributes


class Engine:
    """Answers with the log-probabilities of a model, each too large by `off`."""

    device_type, quantization, dtype, max_model_length, vocabulary_size = "cpu", None, "bfloat16", 32, 1 << 31

    def __init__(self, model, kind="engine", off=0.0) -> None:
        self.model, self.kind, self.off, self.asked = model, kind, off, 0

    def stream(self, batch):
        self.asked += 1
        (request,) = batch.requests
        written = list(range(2, 2 + batch.sampling.max_tokens))
        logprobs = probe_logprobs(self.model, [*request.token_ids, *written]).logprobs + self.off
        prompt, decoded = logprobs[: len(request.token_ids) - 1], logprobs[-len(written) :]
        yield Completion(
            prompt_index=0,
            generation_index=0,
            token_ids=written,
            finish_reason="length",
            prompt_logprobs=[None, *prompt.tolist()],
            logprobs=decoded.tolist(),
        )


@pytest.fixture
def model():
    return fill(tiny("qwen2")).eval()


def change(model):
    """Training goes on."""
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.1)


def test_every_engine_is_compared_and_the_largest_figures_are_attributes(model):
    trace, engines = Trace(), [Engine(model), Engine(model, off=1e-4)]
    assert Verifier().verify_sync(engines, source_of(model), trace, awake=True, asked=False)
    assert [engine.asked for engine in engines] == [4, 4]
    assert trace.attributes[semconv.VERIFY] == "logprobs"
    assert trace.attributes[semconv.VERIFY_DIFFERENCE] == pytest.approx(1e-4, rel=0.2)
    assert 0 < trace.attributes[semconv.VERIFY_RATIO] < BOUND
    assert trace.phases == [("verify", trace.attributes)]


@pytest.mark.fault(
    point="verification of weights",
    did="One of several engines differs",
    happens="`WeightSyncError` names it",
    within=60,
)
def test_engines_that_differ_raise(model):
    with pytest.raises(WeightSyncError, match="times the rounding noise") as caught:
        Verifier().verify_sync(
            [Engine(model), Engine(model, "other", 0.5)], source_of(model), Trace(), awake=True, asked=False
        )
    assert (caught.value.phase, caught.value.receiver) == ("verify", "other")


def test_a_sleeping_engine_is_compared_later_with_the_weights_of_the_sync(model):
    trace, later, engine, verifier = Trace(), Trace(), Engine(fill(tiny("qwen2")).eval()), Verifier()
    for off in (0.0, 0.5):
        engine.off = off
        assert not verifier.verify_sync([engine], source_of(model), trace, awake=False, asked=False)
        assert trace.attributes == {semconv.VERIFY: "deferred"}
        assert verifier.deferred
        if off:
            with pytest.raises(WeightSyncError, match="times the rounding noise"):
                verifier.resume(Trace())
        else:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            change(model)
            assert list(verifier.resume(later)) == [engine]
            model.load_state_dict(weights)
        assert not verifier.deferred
    assert later.attributes[semconv.VERIFY] == "logprobs"
    assert not verifier.resume(Trace())


def test_what_cannot_be_compared_is_no_verification_and_logged_once_or_an_error_if_asked_for(model, caplog):
    elsewhere, verifier = Engine(model), Verifier()
    elsewhere.device_type = "cuda"
    no_model = source_of([("a", torch.ones(1))])
    for engine, source, why in ((elsewhere, source_of(model), "device"), (Engine(model), no_model, "no model")):
        for _ in range(2):
            trace = Trace()
            assert not verifier.verify_sync([engine], source, trace, awake=True, asked=False)
            assert not verifier.deferred
            assert trace.attributes[semconv.VERIFY] == "skipped"
            assert why in trace.attributes[semconv.VERIFY_REASON]
        assert sum(why in message for message in caplog.messages) == 1
        with pytest.raises(WeightSyncError, match=why) as caught:
            verifier.verify_sync([engine], source, Trace(), awake=True, asked=True)
        assert caught.value.phase == "verify"


def test_a_wake_up_is_compared_with_what_the_last_verification_expected(model):
    engine, verifier = Engine(fill(tiny("qwen2")).eval()), Verifier()
    verifier.before_sleep([engine], 1, keeps_weights=True)
    assert not verifier.deferred  # nothing is known about its weights yet
    verifier.verify_sync([engine], source_of(model), Trace(), awake=True, asked=False)
    change(model)
    verifier.before_sleep([engine], 2, keeps_weights=False)
    assert not verifier.deferred
    verifier.before_sleep([engine], 1, keeps_weights=True)
    assert engine.asked == 4  # for the first verification
    assert list(verifier.resume(Trace())) == [engine]
    verifier.before_sleep([engine], 1, keeps_weights=True)
    change(engine.model)
    with pytest.raises(WeightSyncError, match="after waking up from a sleep of level 1"):
        verifier.resume(Trace())


def test_a_wake_up_after_a_sync_that_was_not_verified_is_compared_with_the_engine_before_it(model):
    engine, verifier = Engine(fill(tiny("qwen2")).eval()), Verifier()
    verifier.verify_sync([engine], source_of(model), Trace(), awake=True, asked=False)
    change(engine.model)
    verifier.new_weights()
    verifier.before_sleep([engine], 1, keeps_weights=True)
    assert list(verifier.resume(Trace())) == [engine]
    verifier.before_sleep([engine], 1, keeps_weights=True)
    change(engine.model)
    with pytest.raises(WeightSyncError, match="after waking up"):
        verifier.resume(Trace())


def test_a_verification_that_failed_says_nothing_about_the_weights_of_the_engine(model):
    engine, verifier = Engine(fill(tiny("qwen2")).eval()), Verifier()
    verifier.verify_sync([engine], source_of(model), Trace(), awake=True, asked=False)
    change(model)
    with pytest.raises(WeightSyncError):
        verifier.verify_now([engine], source_of(model), Trace())
    verifier.before_sleep([engine], 1, keeps_weights=True)
    assert list(verifier.resume(Trace())) == [engine]


def test_a_sync_during_the_sleep_takes_the_place_of_the_comparison(model):
    engine, verifier = Engine(model), Verifier()
    verifier.verify_sync([engine], source_of(model), Trace(), awake=True, asked=False)
    verifier.before_sleep([engine], 1, keeps_weights=True)
    verifier.new_weights()
    assert not verifier.deferred


def test_new_forward_hooks_are_noticed_until_they_were_verified_with(model):
    verifier, source = Verifier(), source_of(model)
    assert not verifier.has_new_hooks(source)
    handle = model.model.norm.register_forward_hook(lambda module, args, output: None)
    assert verifier.has_new_hooks(source)
    verifier.verify_sync([Engine(model)], source, Trace(), awake=True, asked=False)
    assert not verifier.has_new_hooks(source)
    handle.remove()
    assert not verifier.has_new_hooks(source)
    assert not verifier.has_new_hooks(source_of([("a", torch.ones(1))]))


def test_verification_on_request_reports_its_figures(model):
    engines = [Engine(model, "a"), Engine(model, "b", off=1e-4)]
    report = Verifier().verify_now(engines, source_of(model), Trace(), reason="reloaded")
    assert (report.how, report.reason, report.bound, report.unit) == ("logprobs", "reloaded", BOUND, 2**-9)
    assert (report.tokens, report.decoded_tokens) == (32 - DECODED - 3, 2 * DECODED)
    assert [each.engine for each in report.engines] == ["a", "b"]
    assert report.ratio == report.engines[1].ratio > report.engines[0].ratio
    assert report.largest >= report.mean == pytest.approx(1e-4, rel=0.2)
    change(model)
    with pytest.raises(WeightSyncError):
        Verifier().verify_now([Engine(fill(tiny("qwen2")).eval())], source_of(model), Trace())
    with pytest.raises(WeightSyncError, match="no model"):
        Verifier().verify_now(engines, source_of([("a", torch.ones(1))]), Trace())
