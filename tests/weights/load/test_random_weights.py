"""Random weights in a source's place: repeatable, of the same forms, and tied as its tensors are."""

from __future__ import annotations

import pytest
import torch

from vgen.weights.load.random_weights import RandomWeights

METADATA = [("embed", (6, 4), torch.float32), ("norm", (4,), torch.bfloat16), ("head", (6, 4), torch.float32)]
CPU = torch.device("cpu")


def test_each_pass_has_the_same_values_and_each_name_its_own():
    source = RandomWeights(METADATA, CPU)
    first, second = dict(source), dict(source)
    assert [(n, tuple(t.shape), t.dtype) for n, t in first.items()] == METADATA == source.metadata()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed"], first["head"])
    assert source.ties() == {}


def test_tied_names_have_the_same_values_and_are_said_to_be_tied():
    source = RandomWeights(METADATA, CPU, ties={"head": "embed"})
    tensors = dict(source)
    assert torch.equal(tensors["embed"], tensors["head"])
    assert source.ties() == {"head": "embed"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.float16])
def test_every_dtype_can_be_drawn(dtype):
    ((_, tensor),) = RandomWeights([("x", (64,), dtype)], CPU)
    assert tensor.dtype is dtype
    assert len(tensor.float().unique()) > 1
