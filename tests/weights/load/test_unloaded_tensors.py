"""What no loader writes comes back whole after a level-2 sleep has discarded it."""

from __future__ import annotations

import torch
from torch.testing._internal.two_tensor import TwoTensor

from vgen.weights.load import unloaded_tensors
from vgen.weights.load.unloaded_tensors import UnloadedTensors


def test_tensors_of_all_kinds_come_back_bit_for_bit():
    tensors = [
        torch.randn(3, 5),
        torch.tensor(0.25),  # as an attention layer's scales are
        torch.randn(7).bfloat16(),
        torch.arange(6),
        torch.empty(0),
        torch.randn(4, 6).T,
        torch.tensor([True, False, True]),
        torch.randn(2, 2, dtype=torch.float64),
    ]
    with torch.inference_mode():
        tensors.append(torch.randn(3))  # as what vLLM makes in a forward pass
    before = [tensor.clone() for tensor in tensors]
    unloaded = UnloadedTensors(tensor.data for tensor in tensors)
    assert all(torch.equal(tensor, content) for tensor, content in unloaded)
    for _ in range(2):
        with torch.inference_mode():
            for tensor in tensors:
                tensor.zero_()
        assert not torch.equal(tensors[0], before[0])
        unloaded.restore()
        assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    UnloadedTensors([]).restore()


class Backend:
    """As an attention layer's, which is no module."""

    def __init__(self) -> None:
        self.alibi_slopes = torch.tensor([0.5, 0.25])
        self.scale = 0.1


class Attention(torch.nn.Module):
    """Named as vLLM's, whose hook after loading makes nothing of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.ones(3))
        self.impl, self.view, self.kv_cache = Backend(), self.weight[:1], torch.ones(5)

    def process_weights_after_loading(self) -> None: ...


class Latent(Attention):
    """Makes tensors of its weights after each loading."""


def test_outside_are_those_that_nobody_registers_nor_makes_anew():
    layer, more = Attention(), torch.nn.Identity()
    more.table = torch.arange(4)
    model = torch.nn.ModuleList([layer, more, Latent()])
    outside = UnloadedTensors.outside_registries(model)
    assert outside is not None
    assert [tensor.tolist() for tensor, _ in outside] == [[0.5, 0.25], [0, 1, 2, 3]]
    layer.impl.alibi_slopes.zero_(), more.table.zero_()
    outside.restore()
    assert layer.impl.alibi_slopes.tolist() == [0.5, 0.25]
    assert more.table.tolist() == [0, 1, 2, 3]


def test_tensors_made_of_others_are_left_alone():
    layer = Attention()
    layer.weight = torch.nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    layer.other = TwoTensor(torch.ones(3), torch.ones(3))
    outside = UnloadedTensors.outside_registries(layer)
    assert outside is not None
    assert [tensor.tolist() for tensor, _ in outside] == [[1.0], [0.5, 0.25]]  # what was a view of the weight before


def test_more_than_fits_is_not_kept(monkeypatch):
    monkeypatch.setattr(unloaded_tensors, "MOST_BYTES", 16)
    assert UnloadedTensors.of([torch.ones(4)]) is not None
    assert UnloadedTensors.of([torch.ones(4), torch.ones(1)]) is None
