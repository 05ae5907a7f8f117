"""Simulated rounding errors: where they are injected, how large they are, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import fill, tiny

from vgen.weights.source.rounding_noise import (
    FLOAT32,
    TENSOR_FLOAT32,
    observed_dtypes,
    rounding_noise,
    rounding_unit,
)

IDS = torch.arange(2, 40)[None]


def test_the_coarsest_dtype_counts_and_float32_is_tf32_on_a_gpu():
    assert rounding_unit([torch.float32, torch.bfloat16, torch.float16], "cuda") == 2**-9
    assert rounding_unit([torch.float16], "cpu") == 2**-12
    assert rounding_unit([torch.float32], "cpu") == rounding_unit([], "cpu") == FLOAT32
    assert rounding_unit([torch.float32], "cuda") == TENSOR_FLOAT32


def test_what_modules_return_is_multiplied_by_factors_of_that_size():
    module = torch.nn.Sequential(torch.nn.Linear(64, 4096))
    value = torch.randn(64)
    with rounding_noise(module, 2**-5, seed=1):
        noisy = module(value)
    factors = noisy / module(value) - 1
    assert float(factors.detach().std()) == pytest.approx(2**-5, rel=0.05)
    assert not module[0]._forward_hooks


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen3_moe"])
def test_noise_depends_on_the_seed_alone_and_leaves_the_random_states(kind):
    model, state = fill(tiny(kind)).eval(), torch.get_rng_state()

    def noisy(seed):
        with torch.no_grad(), rounding_noise(model, 2**-9, seed):
            return model(IDS).logits

    first = noisy(1)
    assert torch.equal(first, noisy(1))
    assert not torch.equal(first, noisy(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_experts_routers_norms_and_blocks_are_disturbed():
    model, disturbed = fill(tiny("qwen3_moe")).eval(), set()
    with rounding_noise(model, 2**-9, seed=0):
        disturbed = {name for name, module in model.named_modules() if module._forward_hooks}
    layer = "model.layers.0"
    assert {
        "lm_head",
        "model.norm",
        layer,
        f"{layer}.mlp.experts",
        f"{layer}.mlp.gate",
        f"{layer}.self_attn.q_proj",
    } < (disturbed)
    assert not {"model", "", f"{layer}.mlp", f"{layer}.self_attn"} & disturbed


def test_every_number_of_a_tuple_is_disturbed_and_indices_are_not():
    class Router(torch.nn.Module):
        def forward(self, value):
            return value, value.long(), "text"

    module, value = Router(), torch.full((8,), 3.0)
    with rounding_noise(module, 2**-9, seed=0), observed_dtypes(module) as dtypes:
        weights, indices, text = module(value)
    assert not torch.equal(weights, value)
    assert (indices.tolist(), text) == ([3] * 8, "text")
    assert dtypes == {torch.float32}


def test_the_dtypes_that_really_compute_are_observed():
    model = fill(tiny("qwen2")).eval()
    with torch.no_grad(), observed_dtypes(model) as dtypes, torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert torch.bfloat16 in dtypes
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
