"""A copy by addresses stops where the trainer's model is no longer what the addresses were taken of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vgen.weights.source.address_snapshot import AddressSnapshot


def made() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)) for _ in range(2))
    model.register_buffer("scale", torch.ones(4))
    return model


def exchanged(model: nn.Module) -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = model.layers[0][0].weight
    model.layers[0][0] = layer


def renamed(model: nn.Module) -> None:
    norm = model.layers[1][1]
    norm.gain = norm.weight
    del norm.weight


def reshaped(model: nn.Module) -> None:
    model.layers[0][0].weight.data = model.layers[0][0].weight.data.view(2, 8)


def transposed(model: nn.Module) -> None:
    model.layers[0][0].weight.data = model.layers[0][0].weight.data.t()  # of as many rows as columns


def reread(model: nn.Module) -> None:
    model.scale = model.scale.view(torch.int32)


def another_table(model: nn.Module) -> None:
    norm = model.layers[0][1]
    norm._parameters = {name: nn.Parameter(value.data * 2) for name, value in norm._parameters.items()}


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module is another one with the same weights": exchanged,
    "a module is put in": lambda model: model.layers.append(nn.Identity()),
    "a module is taken out": lambda model: model.layers.pop(-1),
    "a parameter is put in": lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
    "a buffer is put in": lambda model: model.register_buffer("more", torch.ones(1)),
    "a bias comes where there was none": lambda model: setattr(model.layers[0][0], "bias", nn.Parameter(torch.ones(4))),
    "a bias is gone": lambda model: setattr(model.layers[0][1], "bias", None),
    "a parameter has another name": renamed,
    "a parameter has another shape in the same place": reshaped,
    "a parameter has rows and columns exchanged in the same place": transposed,
    "a buffer has another dtype in the same place": reread,
    "a module registers its parameters elsewhere": another_table,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_noticed(change):
    model = made()
    snapshot = AddressSnapshot.of(model)
    assert snapshot is not None
    with torch.no_grad():
        for parameter in model.parameters():  # as a trainer's step
            parameter.add_(1)
    assert snapshot.in_place()
    assert snapshot.unchanged()
    assert AddressSnapshot(model).same_as(snapshot)
    CHANGES[change](model)
    assert not snapshot.unchanged()


def test_where_a_weight_lies_is_looked_at_before_memory_is_read():
    model = made()
    snapshot = AddressSnapshot.of(model)
    assert snapshot is not None
    model.layers[0][0].weight.data = model.layers[0][0].weight.data.clone()
    assert not snapshot.in_place()
    assert snapshot.unchanged()
    assert not AddressSnapshot(model).same_as(snapshot)
