"""What a level-2 sleep discards beside the weights, on real vLLM on a CPU, where a sleep itself discards nothing."""

from __future__ import annotations

import pytest
import torch
from small_models import PROMPTS, bloom, randomize

from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.profiling import names
from vgen.testing import MemorySink
from vgen.weights.kept import Kept
from vgen.weights.source import source_of


@pytest.fixture(scope="module")
def sink():
    return MemorySink()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bloom(tmp_path_factory.mktemp("bloom"))


@pytest.fixture(scope="module")
def generation(model, sink):
    """Its attention keeps the slopes of ALiBi in an object that is no module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm._custom_ops._supports_onednn", False)  # as on a GPU: parameters stay as they are loaded
        with ColocateGeneration(
            source_of(model, include=lambda name: name != "lm_head.weight"),  # vLLM's loader has no place for it
            max_model_length=256,
            engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
            profiling=ProfilingContext([sink]),
        ) as made:
            yield made


def refresh(model):
    """Random weights, of norms away from zero: what attention sees has its part in what is said."""
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layernorm.weight", "ln_f.weight")):
                parameter.add_(0.3)


def off(model, generation):
    return max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8)))


def discard(engine):
    """As a sleep on a GPU does."""
    for tensor, _ in engine._weights._constants:
        tensor.zero_()
    engine._discarded()


def how(sink):
    return sink.named(names.WEIGHT_SYNC)[-1].attributes.get(names.VERIFY)


def test_what_vllm_keeps_outside_its_modules_comes_back(model, generation, sink):
    refresh(model)
    generation.sync_weights()
    assert how(sink) == "logprobs"
    assert off(model, generation) <= 1e-4
    for tensor, _ in generation.engine._weights._constants:
        tensor.zero_()
    assert off(model, generation) > 1e-3  # these are in use
    for verified in ("logprobs", None):  # the first weights after a sleep are looked at, the others not
        discard(generation.engine)
        refresh(model)
        generation.sync_weights()
        assert how(sink) == verified
        assert off(model, generation) <= 1e-4


def test_what_does_not_come_back_is_noticed_after_the_first_sleep(model, generation, sink, monkeypatch):
    generation.engine._slept = False
    monkeypatch.setattr(Kept, "restore", lambda kept: None)
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
