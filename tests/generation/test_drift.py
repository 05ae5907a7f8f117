"""The drift monitor: when it compares, what it records, and when it says that it cannot."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch

from vgen import Generation, LoRARequest, Sampling
from vgen.engine_protocol import CannotProbe, Source
from vgen.generation.drift import MAX_TOKENS, renormalized_by
from vgen.profiling import semconv
from vgen.profiling.semconv_docs import unknown
from vgen.testing import FakeEngine

LOGPROBS = Sampling(max_tokens=3, logprobs=0)


class Trainer(Source):
    """A trainer whose model gives each token -0.25 nats at temperature 1."""

    def __init__(self):
        self.asked = []

    model = torch.nn.Linear(1, 1)

    def __iter__(self):
        return iter(())

    def logprobs(self, token_ids, temperature=1.0):
        self.asked.append((list(token_ids), temperature))
        return [-0.25 / temperature] * (len(token_ids) - 1)


class Engine(FakeEngine):
    """An engine that gives the first token 0.1 nats more than the trainer, and the others 0.3 less."""

    def _completion(self, request, sampling):
        completion = super()._completion(request, sampling)
        count = len(completion.token_ids)
        return replace(completion, logprobs=[-0.15, *[-0.55] * (count - 1)], weight_version=self.version)


@pytest.fixture
def trainer():
    return Trainer()


def generation_of(trainer, profiling, every=2):
    return Generation(Engine(), trainer, drift_every=every, profiling=profiling)


def recorded(sink):
    return [value for m in sink.measurements if m.instrument is semconv.DRIFT for value in m.values]


def test_the_first_generation_after_every_second_sync_is_compared(trainer, profiling, sink):
    generation = generation_of(trainer, profiling)
    generation.generate([[1, 2, 3]], LOGPROBS)
    for _ in range(5):
        generation.sync_weights()
        generation.generate([[1, 2, 3], [4, 5]], LOGPROBS)
        generation.generate([[1, 2, 3]], LOGPROBS)
    # After the second and the fourth sync: one completion each, the longest.
    assert trainer.asked == [([1, 2, 3, 1, 2, 3], 1.0)] * 2
    assert recorded(sink) == pytest.approx([0.1, 0.3, 0.3] * 2)
    spans = [s for s in sink.named(semconv.GENERATE) if semconv.DRIFT_MEAN in s.attributes]
    assert [s.attributes[semconv.DRIFT_MEAN] for s in spans] == pytest.approx([0.7 / 3] * 2)
    assert [s.attributes[semconv.DRIFT_MAX] for s in spans] == pytest.approx([0.3] * 2)
    assert not unknown(sink.spans, sink.measurements)


def test_it_is_off_by_default(trainer, profiling, sink):
    generation = Generation(Engine(), trainer, profiling=profiling)
    generation.sync_weights()
    generation.generate([[1, 2, 3]], LOGPROBS)
    assert not trainer.asked
    assert not recorded(sink)


def test_long_completions_are_cut(trainer, profiling, sink):
    generation = Generation(Engine(max_model_length=2000), trainer, drift_every=1, profiling=profiling)
    generation.sync_weights()
    generation.generate([[1] * 900], Sampling(max_tokens=900))
    ((ids, _),) = trainer.asked
    assert len(ids) == 900 + MAX_TOKENS
    assert len(recorded(sink)) == MAX_TOKENS


def test_the_trainer_divides_by_the_temperature_and_greedy_is_temperature_one(trainer, profiling, sink):
    generation = generation_of(trainer, profiling, every=1)
    for temperature in (0.5, 0.0):
        generation.sync_weights()
        generation.generate([[1, 2, 3]], replace(LOGPROBS, temperature=temperature))
    assert [temperature for _, temperature in trainer.asked] == [0.5, 1.0]
    assert recorded(sink)[:3] == pytest.approx([0.35, 0.05, 0.05])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"extra": {"logit_bias": {1: 2.0}}}, "extra"),
    ],
)
def test_what_cannot_be_compared_is_said_once_and_not_recorded(trainer, profiling, sink, caplog, changed, says):
    generation = generation_of(trainer, profiling, every=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            generation.sync_weights()
            generation.generate([[1, 2, 3]], replace(LOGPROBS, **changed))
    assert not recorded(sink)
    assert not trainer.asked
    skipped = [s.attributes.get(semconv.DRIFT_SKIPPED, "") for s in sink.named(semconv.GENERATE)]
    assert all(says in reason for reason in skipped)
    messages = [r.getMessage() for r in caplog.records if "drift" in r.getMessage()]
    assert len(messages) == 1
    assert says in messages[0]


def test_adapters_and_images_are_left_out(trainer, profiling, sink):
    generation = generation_of(trainer, profiling, every=1)
    generation.sync_weights()
    generation.generate([[1, 2]], LOGPROBS, lora_request=LoRARequest(lora_name="a"))
    (span,) = sink.named(semconv.GENERATE)
    assert "adapter" in span.attributes[semconv.DRIFT_SKIPPED]


def test_completions_of_other_weights_are_left_out(trainer, profiling, sink):
    class Old(Engine):
        def _completion(self, request, sampling):
            return replace(super()._completion(request, sampling), weight_version="older")

    generation = Generation(Old(), trainer, drift_every=1, profiling=profiling)
    generation.sync_weights()
    generation.generate([[1, 2]], LOGPROBS)
    assert not trainer.asked
    assert not recorded(sink)


def test_a_call_that_cannot_be_compared_leaves_it_to_the_next(trainer, profiling, sink, caplog):
    generation = generation_of(trainer, profiling, every=1)
    generation.sync_weights()
    generation.score([[1, 2]], [[3]])
    assert not caplog.records
    generation.generate([[1, 2]], replace(LOGPROBS, top_p=0.5))
    generation.generate([[1, 2]], LOGPROBS)
    generation.generate([[1, 2]], LOGPROBS)
    assert len(trainer.asked) == 1


@pytest.mark.fault(
    point="a weight sync of a generation",
    did="The drift monitor's forward pass fails",
    happens="The completions are returned",
    within=20,
)
def test_a_forward_pass_that_fails_does_not_cost_the_completions(trainer, profiling, sink, monkeypatch):
    def fail(token_ids, temperature):
        raise CannotProbe("no memory for the trainer model's own forward pass")

    monkeypatch.setattr(trainer, "logprobs", fail)
    generation = generation_of(trainer, profiling, every=1)
    generation.sync_weights()
    assert len(generation.generate([[1, 2]], LOGPROBS)) == 1
    (span,) = sink.named(semconv.GENERATE)
    assert "no memory" in span.attributes[semconv.DRIFT_SKIPPED]


def test_a_regular_expression_of_the_constructor_counts_too(trainer, profiling, sink):
    generation = Generation(Engine(), trainer, drift_every=1, structured_outputs_regex="a+", profiling=profiling)
    generation.sync_weights()
    generation.generate([[1, 2]], LOGPROBS)
    assert not trainer.asked


def test_a_sharded_model_and_another_thread_are_left_alone(trainer, profiling, sink):
    generation = generation_of(trainer, profiling, every=1)
    generation.sync_weights()
    thread = threading.Thread(target=generation.generate, args=([[1, 2]], LOGPROBS))
    thread.start()
    thread.join()
    assert not trainer.asked
    trainer.was_collective = True
    generation.generate([[1, 2]], LOGPROBS)
    assert not trainer.asked
    skipped = [span.attributes[semconv.DRIFT_SKIPPED] for span in sink.named(semconv.GENERATE)]
    assert ["another thread" in skipped[0], "sharded" in skipped[1]] == [True, True]


def test_a_trainer_with_its_own_log_probabilities_passes_them(trainer, profiling, sink):
    generation = Generation(Engine(), trainer, profiling=profiling)
    generation.record_drift([-1.0, None, -2.0], [-1.5, -1.0, -2.0])
    assert recorded(sink) == [0.5, 0.0]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        generation.record_drift([-1.0, -2.0], [-1.0])


def test_renormalized_log_probabilities_are_said_once(trainer, profiling, caplog):
    generation = Generation(Engine(), trainer, profiling=profiling)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            generation.generate([[1, 2]], replace(LOGPROBS, top_p=0.9))
        generation.generate([[1, 2]], replace(LOGPROBS, top_p=0.9, logprobs=None))
    assert [("top_p" in r.getMessage(), "score()" in r.getMessage()) for r in caplog.records] == [(True, True)]


def test_what_renormalizes():
    assert renormalized_by(Sampling()) is None
    assert (
        renormalized_by(Sampling(temperature=0.3, top_k=-1, stop=["a"], extra={"skip_special_tokens": False})) is None
    )
    assert renormalized_by(Sampling(extra={"bad_words": ["a"]})) == "extra"


@pytest.mark.parametrize("every", [0, -1])
def test_a_wrong_interval_is_refused(trainer, every):
    with pytest.raises(ValueError, match="drift_every must be None or an integer of at least 1"):
        Generation(Engine(), trainer, drift_every=every)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("top_p", 0.999),
        ("top_k", 1),
        ("min_p", 0.001),
        ("repetition_penalty", 1.001),
        ("presence_penalty", -0.001),
        ("frequency_penalty", 0.001),
        ("min_tokens", 1),
    ],
)
def test_the_least_change_of_each_parameter_is_named(name, least):
    assert renormalized_by(Sampling(max_tokens=3, **{name: least})) == name
    assert renormalized_by(Sampling(max_tokens=3)) is None
