"""The judge's figures, against what is computed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from vgen.checks.architectures import tiny_model
from vgen.checks.oracle import BOUND, Oracle, measurement
from vgen.checks.subject import Sampled

PROMPTS = [[5, 9, 33, 120], [7, 7, 7], [200, 1, 0, 90]]
ANSWERS = [[3, 4, 5], [8, 9, 10], [11, 12, 13]]


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", seed=1)
    return model


@torch.no_grad()
def by_hand(model, prompt, answer):
    rows = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return [float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def sampled(model, change=0.0):
    return [
        Sampled(answer, [value + change for value in by_hand(model, prompt, answer)])
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]


def test_the_trainers_log_probabilities_are_those_of_its_forward_pass(model):
    trainer, _, engine = Oracle(model).logprobs(PROMPTS, sampled(model, 0.5))
    expected = [value for pair in zip(PROMPTS, ANSWERS, strict=True) for value in by_hand(model, *pair)]
    assert trainer.tolist() == pytest.approx(expected, abs=1e-6)
    assert (engine - trainer).tolist() == pytest.approx([0.5] * 9, abs=1e-5)  # float32, summed in another order


def test_noise_is_what_the_dtype_does(model):
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    noise = Oracle(coarse).logprobs(PROMPTS, sampled(model))[1]
    wide = copy.deepcopy(coarse).float()
    expected = [
        a - b
        for pair in zip(PROMPTS, ANSWERS, strict=True)
        for a, b in zip(by_hand(coarse, *pair), by_hand(wide, *pair), strict=True)
    ]
    assert noise.tolist() == pytest.approx(expected, abs=1e-6)
    assert 1e-3 < noise.abs().max() < 0.5


def test_an_engine_of_another_dtype_or_in_fp8_has_the_noise_of_that(model):
    size = {
        name: float(noise.abs().mean())
        for name, noise in (
            ("float32", Oracle(model).logprobs(PROMPTS, sampled(model))[1]),
            ("bfloat16", Oracle(model, "bfloat16").logprobs(PROMPTS, sampled(model))[1]),
            ("fp8", Oracle(model, fp8=True).logprobs(PROMPTS, sampled(model))[1]),
        )
    }
    assert size["float32"] < 1e-5 < 100 * size["float32"] < size["bfloat16"] < size["fp8"]


def test_a_difference_is_right_up_to_the_bound_times_the_noise():
    noise, trainer = torch.full((64,), 0.01), torch.full((64,), -3.0)
    assert measurement(trainer + 0.0399, trainer, noise, 0.0).ratio == pytest.approx(3.99, rel=1e-3)
    assert measurement(trainer + 0.0399, trainer, noise, 0.0).right
    assert not measurement(trainer + 0.0401, trainer, noise, 0.0).right
    assert BOUND == 4


def test_one_token_far_off_is_not_enough_and_a_fault_of_all_is():
    """Rounding sends single tokens to other experts; a wrong weight moves every token."""
    noise, trainer = torch.full((128,), 0.01), torch.full((128,), -3.0)
    flipped = trainer.clone()
    flipped[5] += 2
    assert measurement(flipped, trainer, noise, 0.0).right
    flipped[: len(flipped) // 2] += 0.08
    assert not measurement(flipped, trainer, noise, 0.0).right


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_nan_is_never_right(model, value):
    answers = sampled(model)
    answers[1] = Sampled(answers[1].token_ids, [*answers[1].logprobs[:2], value])
    assert not Oracle(model).measure(PROMPTS, answers).right


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        assert Oracle(model, "bfloat16").measure(PROMPTS, sampled(copy.deepcopy(model).eval())).tokens == 9
        assert model.training
        assert not model.model.layers[0].training
        assert model.model.layers[1].training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    finally:
        model.eval()


def test_autocast_around_the_check_changes_nothing(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert Oracle(model).measure(PROMPTS, sampled_outside(model)).ratio < 1


def sampled_outside(model):
    with torch.autocast("cpu", enabled=False):
        return sampled(model)


def test_how_far_a_token_is_behind_the_likeliest(model):
    with torch.no_grad():
        row = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().log_softmax(-1)
    best, other = int(row.argmax()), int(row.argmin())
    oracle = Oracle(model)
    assert oracle.behind_the_likeliest(PROMPTS[:1], [Sampled([best], [0.0])]) == 0
    assert oracle.behind_the_likeliest(PROMPTS[:1], [Sampled([other], [0.0])]) == pytest.approx(
        float(row[best] - row[other]), abs=1e-6
    )


def test_a_mixture_of_experts_has_a_wider_reference_too():
    model = tiny_model("qwen3_moe", seed=2)
    assert Oracle(model).measure(PROMPTS, sampled(model)).ratio < 1
