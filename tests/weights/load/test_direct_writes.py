"""Models whose loaders copy into parameters by themselves: the reload counts that, and brings all of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import replace_parameter

from vgen import WeightSyncError
from vgen.weights.load import recorded_copy
from vgen.weights.load.layerwise_reload import NamedStream, Reload, reload
from vgen.weights.load.recorded_copy import RecordedCopy
from vgen.weights.source.module_source import source_of

SHAPES = {"c.sink": (8,), "a.weight": (8, 64), "c.weight": (8, 64), "a.sink": (8,)}


class Transposing(QuantizeMethodBase):
    """Keeps its matrix in another layout, as kernels do."""

    def create_weights(self, *args, **kwargs): ...

    def apply(self, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        replace_parameter(layer, "weight", layer.weight.data.t().contiguous())


class Layer(nn.Module):
    def __init__(self, repacks: bool) -> None:
        super().__init__()
        self.weight, self.sink = nn.Parameter(torch.zeros(8, 64)), nn.Parameter(torch.zeros(8))
        if repacks:
            self.quant_method = Transposing()


class Model(nn.Module):
    """One layer is written directly, in parts; of the other one parameter directly and one by its loader."""

    def __init__(self, repacks: bool) -> None:
        super().__init__()
        self.a, self.c = Layer(repacks), Layer(repacks)
        self.repacks = repacks
        record_metadata_for_reloading(self)
        if repacks:
            for layer in (self.a, self.c):
                layer.quant_method.process_weights_after_loading(layer)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameter = parameters[name]
            if name in ("a.weight", "c.sink"):
                parameter.data.copy_(tensor)
            elif name == "a.sink":
                for half in (slice(0, 4), slice(4, 8)):
                    parameter.data[half].copy_(tensor[half])
            else:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)

    def has(self, sent) -> bool:
        return all(
            torch.equal(parameter.t() if self.repacks and name.endswith("weight") else parameter, sent[name])
            for name, parameter in self.named_parameters()
        )


def runner_of(model):
    config = SimpleNamespace(enforce_eager=True, dtype=torch.float32)
    return SimpleNamespace(get_model=lambda: model, model_config=config, reset_lora_state=lambda: None)


def weights(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("repacks", [False, True])
def test_three_syncs_bring_everything_to_the_old_addresses(repacks):
    model = Model(repacks)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    copy = RecordedCopy()
    for seed in range(3):
        copy.load(runner_of(model), source_of(list(weights(seed).items())))
        assert model.has(weights(seed))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    assert copy.way == ("reload" if repacks else "foreach")


@pytest.mark.parametrize("repacks", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_whose_memory_is_used_again(repacks, size):
    model = Model(repacks)
    for seed in range(2):
        sent = weights(seed)
        steps = Reload(model, runner_of(model).model_config)
        steps.start()
        for start in range(0, len(sent), size):
            part = [(name, tensor.clone()) for name, tensor in [*sent.items()][start : start + size]]
            steps.load_part(part)
            for _, tensor in part:
                tensor.fill_(float("nan"))
        steps.finish()
        assert model.has(sent)


def test_a_loader_wrapped_by_an_earlier_reload_is_not_counted_twice():
    model = Model(repacks=True)
    layer = model.c
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    # As quantization while loading does, whose loaders the restored parameters keep.
    initialize_online_processing(layer)
    record_metadata_for_reloading(model)
    sent = weights(0)
    model.repacks = False  # recorded in the transposed layout
    sent["a.weight"], sent["c.weight"] = sent["a.weight"].t().contiguous(), sent["c.weight"].t().contiguous()
    for each in (model.a, model.c):
        del each.quant_method
    reload(runner_of(model), NamedStream(sent.items()))
    assert model.has(sent)


@pytest.mark.fault(
    point="a reload by the engine's own loader",
    did="A loader writes into a finished layer",
    happens="An error; the layers come back",
    within=60,
)
def test_a_write_into_a_layer_that_was_complete_is_an_error_and_the_layers_come_back():
    class Twice(Model):
        def load_weights(self, weights):
            sink = self.a.sink
            super().load_weights(weights)
            sink.data.mul_(2)

    model = Twice(repacks=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="after it was complete"):
            reload(runner_of(model), NamedStream(weights(0).items()))
        assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.fault(
    point="a reload by the engine's own loader",
    did="A sync that was refused is tried again",
    happens="It is refused again, and no old weights are used",
    within=60,
)
def test_a_refused_reload_is_refused_again(monkeypatch):
    """A sync after the refused one must not pass with the old weights that the refusal was about."""
    monkeypatch.setattr(recorded_copy, "unchanged_by_reload", lambda *_: ["a.weight"])
    model, copy = Model(repacks=True), RecordedCopy()
    for seed in range(3):
        with pytest.raises(WeightSyncError, match="reload leaves old values"):
            copy.load(runner_of(model), source_of(list(weights(seed).items())))


class Waiting(nn.Module):
    """A layer whose two parameters come through their loaders, so that it waits with the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        record_metadata_for_reloading(self)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_layer_waits_with_is_kept_when_its_memory_is_used_again(reverse):
    model = Waiting()
    for seed in range(2):
        sent = {name: torch.randn_like(parameter) + seed for name, parameter in model.named_parameters()}
        steps = Reload(model, runner_of(model).model_config)
        steps.start()
        for name in sorted(sent, reverse=reverse):
            memory = sent[name].clone()
            steps.load_part([(name, memory)])
            memory.fill_(float("nan"))
        steps.finish()
        assert all(torch.equal(parameter, sent[name]) for name, parameter in model.named_parameters())
