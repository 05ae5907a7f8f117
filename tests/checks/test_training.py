"""What stands for training changes all that it should, by the same seed in the same way."""

from __future__ import annotations

import pytest
import torch

from vgen.checks.architectures import tiny_model
from vgen.checks.training import train


@pytest.fixture
def model():
    model = tiny_model("qwen2", seed=1)
    return model


def test_fresh_weights_get_the_size_of_trained_ones(model):
    assert 0.4 < float(model.lm_head.weight.std()) * 128**0.5 < 0.8
    assert 0.1 < float(model.model.layers[0].self_attn.q_proj.bias.std()) < 0.3  # zero in a fresh model
    assert 0.1 < float(model.model.norm.weight.std()) < 0.3


@pytest.mark.parametrize("strength", [0.15, 0.6])
def test_every_parameter_changes_and_keeps_its_size(model, strength):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert train(model, 5, strength) == len(before)
    for name, parameter in model.named_parameters():
        change = float((parameter - before[name]).std())
        assert change > 0.05 * strength * float(before[name].std()), name
        if parameter.dim() > 1:
            assert float(parameter.std()) == pytest.approx(float(before[name].std()), rel=0.1)


def test_a_seed_gives_the_same_change(model):
    train(model, 5, 0.6)
    other = tiny_model("qwen2", seed=1)
    train(other, 5, 0.6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_what_is_named_changes(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert train(model, 5, 0.6, lambda name: ".1." in name) == sum(".1." in name for name in before)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".1." in name}


def test_a_matrix_of_zeros_gets_values(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    train(model, 5, 0.6, lambda name: name == "lm_head.weight")
    assert float(model.lm_head.weight.std()) > 0.01
