"""What the end-to-end probe takes for right: planted faults, routing, 16 bits, quantization, and decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.tiny_models import fill, tiny

from vgen import Completion, WeightSyncError
from vgen.engine_protocol import CannotProbe, ProbeLogprobs
from vgen.weights.source.probe_forward import probe_logprobs
from vgen.weights.source.rounding_noise import rounding_noise
from vgen.weights.verification.logprob_check import (
    BOUND,
    DECODED,
    SHORT,
    compare,
    judge,
    noise_ratio,
    probe_of,
    unit_of,
)


@dataclass
class Computing:
    """An engine that computes with a model of its own, by its own rounding errors."""

    model: Any
    unit: float = 0.0
    stale_decoding: Any = None
    """The model that decodes, if that is another one."""
    stale_below: int = 1000
    """It decodes in contexts that are shorter than that."""
    dtype: str = "float32"
    quantization: str | None = None
    device_type: str = "cpu"
    seed: int = 100
    omits: str = ""
    prompts: list[list[int]] = field(default_factory=list)
    kind = "engine"
    max_model_length = 63
    vocabulary_size = 1 << 31

    def stream(self, batch):
        (request,) = batch.requests
        ids = list(request.token_ids)
        self.prompts.append(ids)
        assert batch.sampling.temperature == 1.0
        written = list(range(2, 2 + batch.sampling.max_tokens))
        prompt = self._logprobs(self.model, ids, seed=self.seed + 1)
        decoding = self.stale_decoding if self.stale_decoding and len(ids) < self.stale_below else self.model
        decoded = self._logprobs(decoding, ids + written, seed=self.seed + 2)[-len(written) :]
        answer = dict(prompt_logprobs=[None, *prompt], logprobs=decoded)
        answer.pop(self.omits, None)
        yield Completion(prompt_index=0, generation_index=0, token_ids=written, finish_reason="length", **answer)

    def _logprobs(self, model, ids, seed):
        with torch.no_grad(), rounding_noise(model, self.unit, seed):
            logits = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return logits[range(len(ids) - 1), ids[1:]].tolist()


def judged(trainer, engine):
    return judge(engine, expected_by(trainer, engine))


def expected_by(trainer, engine):
    return probe_logprobs(trainer, probe_of([engine], trainer), unit_of([engine]))


@pytest.fixture(scope="module")
def model():
    return fill(tiny("qwen2")).eval()


def test_the_probe_fits_engine_and_model_and_is_the_same_each_time(model):
    ids = probe_of([Computing(model), Computing(model)], model)
    assert ids == probe_of([Computing(model)], model)
    assert len(ids) == 63 - DECODED - 2
    assert max(ids) < model.config.vocab_size
    short = Computing(model)
    short.max_model_length = 17
    with pytest.raises(CannotProbe, match="shorter than"):
        probe_of([short], model)


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2**-22), ("float16", 2**-12), ("bfloat16", 2**-9)])
def test_rounding_alone_is_right_in_every_dtype(model, dtype, unit):
    result = judged(model, Computing(model, unit, dtype=dtype))
    assert 0 < result.ratio < 1.5
    assert 0 <= result.decoded_ratio < 1.5
    assert 0 < result.mean <= result.largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "plant",
    [
        lambda m: [p.data.normal_(0, 0.1) for p in m.model.layers[1].parameters() if p.dim() > 1],
        lambda m: m.lm_head.weight.data.normal_(0, 0.1),
        lambda m: m.model.layers[0].self_attn.v_proj.bias.data.zero_(),
        lambda m: m.model.norm.weight.data.mul_(1.1),
    ],
    ids=["layer", "head", "bias", "norm"],
)
@pytest.mark.fault(
    point="verification of weights",
    did="A layer is stale, a head swapped, a router lost",
    happens="The verification fails",
    within=60,
)
def test_planted_faults_are_wrong_in_every_dtype(model, plant, dtype):
    faulty = fill(tiny("qwen2")).eval()
    with torch.no_grad():
        plant(faulty)
    with pytest.raises(WeightSyncError, match="a weight is stale") as caught:
        judged(model, Computing(faulty, 2**-9 if dtype == "bfloat16" else 2**-22, dtype=dtype))
    assert (caught.value.phase, caught.value.receiver) == ("verify", "engine")


def test_a_right_mixture_of_experts_may_send_few_tokens_to_other_experts():
    experts = fill(tiny("qwen3_moe")).eval()
    for seed in range(8):
        judged(experts, Computing(experts, 2**-11, dtype="float32", seed=10 * seed))
    noise = torch.full((3, 256), 0.01)
    expected = ProbeLogprobs([1] * 257, torch.full((256,), -5.0), noise, 2**-9)
    changes = torch.full((256,), 0.007)
    assert noise_ratio(changes, expected) == pytest.approx(0.7, abs=0.01)
    changes[:8] = 3.0  # these tokens met other experts
    assert noise_ratio(changes, expected) < BOUND
    changes[:40] = 3.0  # and these an expert with another one's weights
    assert noise_ratio(changes, expected) > BOUND


def test_small_faults_of_all_tokens_show_beside_tokens_that_change_experts():
    noise = torch.full((3, 256), 0.01)
    noise[:, :20] = 1.0
    expected = ProbeLogprobs([1] * 257, torch.full((256,), -5.0), noise, 2**-9)
    assert noise_ratio(noise[0], expected) == pytest.approx(1, abs=0.01)
    assert noise_ratio(torch.full((256,), 0.2), expected) > BOUND


def test_nan_and_infinity_are_wrong_and_the_same_infinity_on_both_sides_is_right(model):
    engine = Computing(model)
    expected = expected_by(model, engine)
    for value in (float("nan"), float("inf"), float("-inf")):
        expected.logprobs[3] = value
        assert not compare(engine, expected).right
    engine._logprobs = lambda *_, **__: [float("-inf")] * 200
    assert noise_ratio(torch.zeros(4), expected) == 0


@pytest.mark.fault(
    point="verification of weights",
    did="Decoding alone uses old weights",
    happens="The verification fails and says so",
    within=60,
)
def test_old_weights_in_decoding_alone_are_found_and_named(model):
    stale = fill(tiny("qwen2"), seed=8).eval()
    for dtype in ("float32", "bfloat16"):
        for below in (1000, SHORT + 1):  # in every context, and in a short one alone
            engine = Computing(model, stale_decoding=stale, stale_below=below, dtype=dtype)
            with pytest.raises(WeightSyncError, match=r"8 decoded tokens differ .* CUDA graphs"):
                judged(model, engine)
    first, second, short, again = engine.prompts
    assert second[: len(first)] == first
    assert len(second) == len(first) + DECODED + 1
    assert (short, len(again)) == (first[:SHORT], SHORT + DECODED + 1)


def test_a_quantized_engine_is_measured_by_its_own_noise(model):
    assert judged(model, Computing(model, 2**-4, quantization="fp8")).ratio < BOUND
    with pytest.raises(WeightSyncError):
        judged(model, Computing(model, 2**-4))
    stale = fill(tiny("qwen2"), seed=8).eval()
    with pytest.raises(WeightSyncError):
        judged(model, Computing(stale, 2**-4, quantization="fp8"))
    units = {method: unit_of([Computing(model, quantization=method)]) for method in ("fp8_e4m3 KV cache", "awq_marlin")}
    assert units == {"fp8_e4m3 KV cache": 2**-4, "awq_marlin": 2**-3}
    assert unit_of([Computing(model, quantization="experts_int8", dtype="bfloat16")]) == 2**-6
    assert unit_of([Computing(model, quantization="modelopt_fp4")]) == 2**-2
    assert unit_of([Computing(model), Computing(model, dtype="torch.bfloat16")]) == 2**-9


def test_a_forward_hook_that_changes_results_is_wrong_and_named(model):
    steered = fill(tiny("qwen2")).eval()

    def steer(module, args, output):
        return output * 1.5

    steered.model.norm.register_forward_hook(steer)
    with pytest.raises(WeightSyncError, match=r"forward hook .*model\.norm: .*steer"):
        judged(steered, Computing(model))


def test_what_cannot_be_compared_is_said(model):
    with pytest.raises(CannotProbe, match="another device"):
        judged(model, Computing(model, device_type="cuda"))
    with pytest.raises(CannotProbe, match="no weights yet"):
        judged(tiny("qwen2").to("meta"), Computing(model))
    broken = fill(tiny("qwen2"))
    broken.model.norm = None
    with pytest.raises(CannotProbe, match="forward pass fails"):
        judged(broken, Computing(model))
    for omitted, what in (("prompt_logprobs", "prompts"), ("logprobs", "tokens that it generates")):
        with pytest.raises(CannotProbe, match=what):
            judged(model, Computing(model, omits=omitted))


def test_the_shortest_engine_that_a_probe_fits():
    model = tiny("llama")
    engine = Computing(model)
    engine.max_model_length = 2 * DECODED + 2
    ids = probe_of([engine], model)
    assert len(ids) == DECODED
    engine.max_model_length -= 1
    with pytest.raises(CannotProbe, match=f"shorter than {2 * DECODED + 2} tokens"):
        probe_of([engine], model)
