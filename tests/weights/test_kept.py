"""What no loader writes comes back whole after a level-2 sleep has discarded it."""

from __future__ import annotations

import torch

from vgen.weights.kept import Kept


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
    before = [tensor.clone() for tensor in tensors]
    kept = Kept(tensors)
    assert all(torch.equal(tensor, content) for tensor, content in kept)
    for tensor in tensors:
        tensor.zero_()
    assert not torch.equal(tensors[0], before[0])
    kept.restore()
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    Kept([]).restore()
