"""What a conversion makes of which tensors: views are found, and conversions that cannot be followed are refused."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import tiny

from vgen import WeightSyncError
from vgen.weights.source.checkpoint_names import checkpoint_tensors_of, revert_of


def meta(*shape):
    return torch.empty(shape, device="meta")


def made(revert, **metas):
    return {tensor.name: tensor for tensor in checkpoint_tensors_of(metas, revert)}


def test_names_stay_as_they_are_without_a_conversion():
    tensors = made(dict, a=meta(2, 3), b=meta(4))
    assert {name: (tensor.sources, tensor.view) for name, tensor in tensors.items()} == {
        "a": ({"a"}, True),
        "b": ({"b"}, True),
    }


def test_parts_of_a_parameter_are_views_of_it_whatever_its_layout():
    def unfuse(tensors):
        gate, up = tensors["gate_up"].chunk(2, dim=1)
        return {"gate": gate.transpose(0, 1).contiguous(), "up": up.clone(memory_format=torch.contiguous_format)}

    tensors = made(unfuse, gate_up=meta(3, 8))
    fused = torch.randn(3, 8)
    for layout in (fused, fused.t().contiguous().t()):
        assert torch.equal(tensors["gate"].of(layout, (8, 1)), fused[:, :4].t())
        assert torch.equal(tensors["up"].of(layout, (8, 1)), fused[:, 4:])
    assert tensors["gate"].of(fused, (8, 1)).untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_tensors_that_are_computed_are_no_views_and_know_their_sources():
    def convert(tensors):
        return {"sum": tensors["a"] + tensors["b"], "cast": tensors["a"].half(), "c": tensors["c"]}

    tensors = made(convert, a=meta(2), b=meta(2), c=meta(1))
    assert {name: (set(tensor.sources), tensor.view) for name, tensor in tensors.items()} == {
        "sum": ({"a", "b"}, False),
        "cast": ({"a"}, False),
        "c": ({"c"}, True),
    }


def test_what_writes_into_the_model_or_comes_from_nowhere_is_refused():
    with pytest.raises(WeightSyncError, match="would write into it"):
        made(lambda tensors: {"a": tensors["a"].add_(1)}, a=meta(2))
    with pytest.raises(WeightSyncError, match="of nothing in the model") as caught:
        made(lambda tensors: {"b": torch.zeros(2, device="meta")}, a=meta(2))
    assert caught.value.parameter == "b"


def test_a_model_outside_transformers_has_no_conversion():
    assert revert_of(torch.nn.Linear(2, 2)) is dict


def test_the_experts_of_a_layer_are_separate_tensors_of_the_checkpoint():
    model = tiny("qwen3_moe")
    metas = {name: parameter.to("meta") for name, parameter in model.state_dict().items()}
    names = {tensor.name for tensor in checkpoint_tensors_of(metas, revert_of(model))}
    assert {f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(4)} <= names
