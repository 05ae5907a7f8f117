"""Tensors that kernels read: found wherever a module or an object of vLLM's holds them, and put back in place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vgen import WeightSyncError
from vgen.weights.load.kernel_tensors import KernelTensors, follow_tied, held_tensors


class Kernel:
    """An object that a layer computes with."""

    def __init__(self) -> None:
        self.packed = torch.zeros(4)
        self.table = {"scales": torch.ones(2)}
        self.parts = [torch.ones(3), torch.ones(3)]
        self.kv_cache = torch.zeros(8)


Kernel.__module__ = "vllm.fake"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.register_buffer("angles", torch.zeros(3))
        self.derived = torch.zeros(5)
        self.kernel = Kernel()
        self.kernel_again = self.kernel
        self.other = SimpleNamespace(tensor=torch.zeros(1))  # not vLLM's


PATHS = ["angles", "derived", "kernel.packed", "kernel.parts.0", "kernel.parts.1", "kernel.table.scales", "weight"]


def model_of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def test_every_tensor_is_found_once_except_the_cache_and_strange_objects():
    assert sorted(held.path for held in held_tensors(model_of(Layer()))) == [f"0.{path}" for path in PATHS]


def test_objects_that_hold_each_other_end():
    layer = Layer()
    layer.kernel.myself = layer.kernel
    layer.kernel.layer = layer
    assert len(list(held_tensors(model_of(layer)))) == len(PATHS)


def replace_all(model: nn.Module, change=lambda tensor: tensor.clone() + 1) -> dict[str, torch.Tensor]:
    """New tensors with new content in all places; returns the contents."""
    contents: dict[str, torch.Tensor] = {}
    for held in list(held_tensors(model)):
        new = change(held.tensor.detach())
        contents[held.path] = new.clone()
        is_parameter = isinstance(held.tensor, nn.Parameter)
        held.table[held.key] = nn.Parameter(new, requires_grad=False) if is_parameter else new
    return contents


def test_new_content_is_at_the_old_addresses_after_a_reload():
    model = model_of(Layer(), Layer())
    before = {held.path: held.tensor for held in held_tensors(model)}
    addresses = {path: tensor.data_ptr() for path, tensor in before.items()}
    kernels = KernelTensors(model)
    contents = replace_all(model)
    kernels.put_back()
    after = {held.path: held.tensor for held in held_tensors(model)}
    assert after.keys() == before.keys()
    for path, tensor in after.items():
        assert tensor is before[path], path
        assert tensor.data_ptr() == addresses[path]
        assert torch.equal(tensor, contents[path]), path


def test_a_tensor_that_two_hold_stays_one():
    model = model_of(Layer(), Layer())
    model[1].weight = model[0].weight
    kernels = KernelTensors(model)
    model[0].weight = model[1].weight = nn.Parameter(torch.ones(4, 2), requires_grad=False)
    kernels.put_back()
    assert model[0].weight is model[1].weight
    assert model[0].weight.sum() == 8


@pytest.mark.parametrize(
    "change", [lambda t: torch.zeros(t.numel() + 1), lambda t: t.double(), lambda t: torch.zeros(2 * t.numel())[::2]]
)
@pytest.mark.fault(
    point="a reload by the engine's own loader",
    did="A kernel's tensor has another layout after the reload",
    happens="`WeightSyncError` names it",
    within=60,
)
def test_another_layout_is_an_error(change):
    model = model_of(Layer())
    kernels = KernelTensors(model)
    model[0].kernel.packed = change(model[0].kernel.packed)
    with pytest.raises(WeightSyncError, match="enforce_eager=True") as caught:
        kernels.put_back()
    assert (caught.value.phase, caught.value.parameter) == ("load", "0.kernel.packed")


def test_tensors_that_were_not_there_or_have_no_data_stay():
    model = model_of(Layer())
    kernels = KernelTensors(model)
    model[0].kernel.new = new = torch.ones(7)
    model[0].derived = torch.zeros(5, device="meta")
    del model[0].angles
    kernels.put_back()
    assert model[0].kernel.new is new
    assert model[0].derived.is_meta


class UnquantizedEmbeddingMethod:
    """As vLLM's, which packs the weight on a CPU."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight.detach().clone()


class Unknown(UnquantizedEmbeddingMethod):
    """A method that is on no list."""


def head(weight: nn.Parameter, method: object) -> nn.Module:
    layer = nn.Module()
    layer.weight, layer.quant_method, layer.packed = weight, method, weight.detach().clone()
    return layer


def test_a_tied_head_that_is_not_loaded_itself_packs_the_new_weight():
    embedding = nn.Embedding(4, 2)
    heads = [head(embedding.weight, UnquantizedEmbeddingMethod()), head(embedding.weight, Unknown())]
    alone = head(nn.Parameter(torch.zeros(4, 2)), UnquantizedEmbeddingMethod())
    model = model_of(embedding, *heads, alone)
    with torch.no_grad():
        embedding.weight.fill_(3)
        alone.weight.fill_(3)
    follow_tied(model, [*heads, alone])
    assert (heads[0].packed == 3).all()
    assert not (heads[1].packed == 3).any()  # it is unknown what it does
    assert not alone.packed.any()  # nothing that it shares was loaded
