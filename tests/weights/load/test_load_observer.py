"""What counts as a loader that needs values, and that observing one leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from helpers.loader_models import LoaderModel, metadata_of_stream, random_weights

from vgen import WeightSyncError
from vgen.weights.load.load_audit import audit_load
from vgen.weights.load.load_observer import LoadObserver

NEEDS_VALUES = {
    "item": lambda tensor: tensor.sum().item(),
    "bool": lambda tensor: bool((tensor > 0).any()),
    "int": lambda tensor: int(tensor.view(-1)[0]),
    "list": lambda tensor: tensor.tolist(),
    "numpy": lambda tensor: tensor.numpy(),
    "host": lambda tensor: torch.empty(tensor.shape).copy_(tensor).sum().item(),
    "nonzero": lambda tensor: tensor.nonzero(),
    "mask": lambda tensor: tensor[tensor > 0],
    "unique": lambda tensor: tensor.unique(),
}


def audited(use):
    class Model(LoaderModel):
        def load(self, name, tensor):
            if name == "k":
                use(tensor)
            super().load(name, tensor)

    model = Model()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        return audit_load(model, metadata_of_stream(random_weights()), {}, "engine")
    finally:
        after = model.state_dict(keep_vars=True)
        assert after.keys() == before.keys()
        assert all(id(tensor) == before[name][0] for name, tensor in after.items())
        assert all(torch.equal(tensor, before[name][1]) for name, tensor in after.items())


@pytest.mark.parametrize("use", NEEDS_VALUES.values(), ids=NEEDS_VALUES)
def test_a_loader_that_needs_values_cannot_be_audited(use):
    assert "needs values" in audited(use).skipped


@pytest.mark.parametrize("kind", [NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, AssertionError])
def test_a_loader_that_refuses_a_tensor_by_itself_is_not_taken_for_one_that_needs_values(kind):
    def refuse(tensor):
        raise kind("a bias is not supported here")

    with pytest.raises(WeightSyncError, match=r"loader refuses it \(shape \[2, 8\].*not supported here") as caught:
        audited(refuse)
    assert caught.value.parameter == "k"


def test_tied_parameters_that_are_apart_while_they_are_observed_count_as_one():
    """As vLLM restores the layers of an engine that has packed its weights: each gets a tensor of its own."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = (torch.nn.Parameter(torch.zeros(4, 2), requires_grad=False) for _ in range(2))

        def load_weights(self, weights):
            for name, tensor in weights:
                getattr(self, name).data.copy_(tensor)

    sent = [(name, (4, 2), torch.float32) for name in ("embed", "head")]
    for shared, overwritten in (({"embed": 7, "head": 7}, {"embed": "head"}), ({"embed": 7, "head": 8}, {}), ({}, {})):
        observer = LoadObserver(Model(), shared)
        assert observer.run(sent) is None
        assert observer.overwritten() == overwritten
