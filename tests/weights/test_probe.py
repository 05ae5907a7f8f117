"""What the end-to-end probe takes for right, with an engine that answers as it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import fill, tiny

from vgen import Completion, WeightSyncError
from vgen.weights.probe import CannotProbe, ask, judge, probe_of


@dataclass
class Answering:
    """An engine that gives the model's own log-probabilities, but for one that is off by so much."""

    said: Any = None
    off: float = 0.0
    dtype: str = "float32"
    quantization: str | None = None
    device_type: str = "cpu"
    kind = "engine"
    max_model_length = 40
    vocabulary_size = 1 << 31

    def stream(self, batch):
        (request,) = batch.requests
        scored = self.said.logprobs.tolist()
        scored[7] += self.off
        scored = [None, *scored][: len(request.token_ids)]
        yield Completion(
            prompt_index=0, generation_index=0, token_ids=[1], finish_reason="length", prompt_logprobs=scored
        )


@pytest.fixture(scope="module")
def model():
    return fill(tiny("qwen2")).eval()


def judged(model, **engine):
    made = Answering(**engine)
    made.said = ask(model, probe_of([made], model))
    return judge(made, made.said)


def test_the_probe_fits_engine_and_model_and_is_the_same_each_time(model):
    found = probe_of([Answering(), Answering()], model)
    assert found == probe_of([Answering()], model)
    assert len(found) == 39
    assert max(found) < model.config.vocab_size


def test_float32_is_judged_by_its_largest_difference(model):
    assert judged(model, off=5e-5).difference == pytest.approx(5e-5, abs=1e-5)
    for off in (1e-2, float("nan"), float("inf")):
        with pytest.raises(WeightSyncError, match="largest difference") as caught:
            judged(model, off=off)
        assert (caught.value.phase, caught.value.receiver) == ("verify", "engine")


def test_sixteen_bits_of_either_side_are_judged_by_the_mean(model):
    assert judged(model, off=5.0, dtype="bfloat16").rounded
    with pytest.raises(WeightSyncError, match="mean difference"):
        judged(model, off=50.0, dtype="bfloat16")
    assert ask(fill(tiny("qwen2")).bfloat16().eval(), [1, 2, 3]).rounded


def test_a_model_that_has_gone_astray_is_computed_to_fewer_decimals(model):
    astray = fill(tiny("qwen2")).eval()
    with torch.no_grad():
        astray.lm_head.weight.mul_(1000.0)
    with pytest.raises(WeightSyncError):
        judged(model, off=2e-3)
    assert judged(astray, off=2e-3).right


def test_what_cannot_be_compared_is_said(model):
    with pytest.raises(CannotProbe, match="quantized"):
        judged(model, quantization="fp8")
    with pytest.raises(CannotProbe, match="another device"):
        judged(model, device_type="cuda")
    with pytest.raises(CannotProbe, match="no weights yet"):
        judged(tiny("qwen2").to("meta"))
    broken = fill(tiny("qwen2"))
    broken.model.norm = None
    with pytest.raises(CannotProbe, match="forward pass fails"):
        judged(broken)
