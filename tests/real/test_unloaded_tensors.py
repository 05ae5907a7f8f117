"""Tensors that level-2 sleep discards and no loader writes. On a CPU sleep discards nothing, so the tests do it."""

from __future__ import annotations

import pytest
import torch
from helpers.small_models import PROMPTS, bloom, randomize

from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink
from vgen.weights import source_of
from vgen.weights.load.unloaded_tensors import UnloadedTensors

pytestmark = pytest.mark.slow  # an engine of a family of its own


@pytest.fixture(scope="module")
def sink():
    return MemorySink()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bloom(tmp_path_factory.mktemp("bloom"))


@pytest.fixture(scope="module")
def generation(model, sink):
    """A Bloom: its attention keeps the ALiBi slopes in an object that is not a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm._custom_ops._supports_onednn", False)  # as on a GPU, parameters keep the loaded layout
        with ColocateGeneration(
            source_of(model, include=lambda name: name != "lm_head.weight"),  # vLLM's loader does not accept it
            max_model_length=256,
            engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
            profiling=ProfilingContext([sink]),
        ) as made:
            yield made


def refresh(model):
    """Random weights with norms away from zero, so that attention influences the log-probabilities."""
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "ln_f.weight")):
                parameter.add_(0.3)


def off(model, generation):
    return max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8)))


def discard(engine):
    """As a sleep on a GPU does."""
    for tensor, _ in engine._weights._outside:
        tensor.zero_()
    engine._weights.forget()
    if 2 not in engine._slept:
        engine._slept.add(2)
        engine._verified = False


def how(sink):
    return sink.named(semconv.WEIGHT_SYNC)[-1].attributes.get(semconv.VERIFY)


def test_tensors_outside_vllms_modules_are_restored(model, generation, sink):
    refresh(model)
    generation.sync_weights()
    assert how(sink) == "logprobs"
    assert off(model, generation) <= 1e-4
    for tensor, _ in generation.engine._weights._outside:
        tensor.zero_()
    assert off(model, generation) > 1e-3  # the constants are in use
    for verified in ("logprobs", None):  # only the first sync after a sleep is verified
        discard(generation.engine)
        refresh(model)
        generation.sync_weights()
        assert how(sink) == verified
        assert off(model, generation) <= 1e-4


def test_what_does_not_come_back_is_noticed_after_the_first_sleep(model, generation, sink, monkeypatch):
    generation.engine._slept.clear()
    monkeypatch.setattr(UnloadedTensors, "restore", lambda unloaded: None)
    for _ in range(2):  # it is not trusted until it was right once
        discard(generation.engine)
        refresh(model)
        with pytest.raises(WeightSyncError, match="log-probabilities"):
            generation.sync_weights()
        assert generation.state == "failed"
    monkeypatch.undo()
    discard(generation.engine)
    generation.sync_weights()
    assert how(sink) == "logprobs"
    assert off(model, generation) <= 1e-4
