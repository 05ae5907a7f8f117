"""A module that computes a weight from other tensors is refused, with the call that makes it a parameter again."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny
from torch.nn.utils import parametrizations, parametrize, prune

from vgen import WeightSyncError
from vgen.weights.source.module_source import source_of

LAYER = "model.layers.0.mlp.up_proj"
CASES = [
    (parametrizations.weight_norm, "parametrizations.weight.original0", "parametrize.remove_parametrizations"),
    (parametrizations.spectral_norm, "parametrizations.weight.original", "parametrize.remove_parametrizations"),
    (torch.nn.utils.spectral_norm, "weight_orig", "remove_spectral_norm"),
    (lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig", "prune.remove"),
]


@pytest.mark.parametrize(("change", "tensor", "fix"), CASES)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.fault(
    point="the trainer's model as a source",
    did="A weight is computed by a reparametrization",
    happens="The error names the module and the call that helps",
    within=20,
)
def test_the_error_names_the_module_and_the_call_that_helps(change, tensor, fix, adapted):
    model = tiny("qwen2")
    change(model.get_submodule(LAYER))
    path = LAYER
    if adapted:
        peft = pytest.importorskip("peft")
        model, path = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"])), f"{LAYER}.base_layer"
    with pytest.raises(
        WeightSyncError, match=f"module '{path}' computes.* by torch.nn.utils.{fix}.module, 'weight'"
    ) as e:
        source_of(model).metadata()
    assert (e.value.phase, e.value.parameter) == ("gather", f"{path}.{tensor}")


def test_what_the_error_recommends_makes_the_model_right_again():
    model = tiny("qwen2")
    first, second = (model.get_submodule(LAYER.replace("0", layer)) for layer in "01")
    source, before = source_of(model), dict(source_of(model))
    parametrizations.weight_norm(first)
    prune.l1_unstructured(second, "weight", 0.5)
    prune.random_unstructured(second, "weight", 0.5)  # both are in one hook now
    with pytest.raises(WeightSyncError):
        dict(source)
    parametrize.remove_parametrizations(first, "weight")
    with pytest.raises(WeightSyncError, match=f"module '{LAYER.replace('0', '1')}'"):
        dict(source)
    prune.remove(second, "weight")
    after = dict(source)
    assert after.keys() == before.keys()
    assert torch.equal(after[f"{LAYER.replace('0', '1')}.weight"], second.weight)


def test_a_module_that_is_left_out_may_compute_its_weight():
    model = tiny("qwen2")
    model.score = parametrizations.weight_norm(torch.nn.Linear(4, 1))
    with pytest.raises(WeightSyncError, match="module 'score'"):
        source_of(model).metadata()
    names = [name for name, _, _ in source_of(model, include=lambda name: not name.startswith("score")).metadata()]
    assert f"{LAYER}.weight" in names
