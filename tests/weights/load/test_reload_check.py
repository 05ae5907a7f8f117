"""Reloads of random weights: which parameters are found to keep old values, and which right ones are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.loader_models import runner_of
from torch import nn

from vgen.weights.load import reload_check
from vgen.weights.load.load_audit import LoadAudit, audit_load
from vgen.weights.load.reload_check import unchanged_by_reload


class Model(nn.Module):
    """Weights in several layouts, as kernels keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 64))
        self.transposed = nn.Parameter(torch.zeros(64, 64).t())
        self.padded = nn.Parameter(torch.zeros(80, 64))
        self.norm = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.zeros(1))
        self.k_scale = nn.Parameter(torch.ones(1))

    def load_weights(self, weights):
        for name, tensor in weights:
            parameter = getattr(self, name).data
            parameter[: tensor.shape[0]].copy_(tensor)
            parameter[tensor.shape[0] :].fill_(0)


SENT = [
    ("weight", (64, 64), torch.float32),
    ("transposed", (64, 64), torch.float32),
    ("padded", (64, 64), torch.float32),
    ("norm", (8,), torch.bfloat16),
    ("scale", (1,), torch.float32),
]


def unchanged(monkeypatch, model, after=lambda model: None, sent=SENT, audit=None) -> list[str]:
    """What is found if each reload ends with `after`."""

    def reload(runner, stream):
        model.load_weights(stream)
        after(model)

    monkeypatch.setattr(reload_check, "reload", reload)
    return unchanged_by_reload(runner_of(model), sent, audit or audit_load(model, sent, {}, "engine"))


def test_nothing_is_found_where_all_is_reloaded(monkeypatch):
    assert unchanged(monkeypatch, Model()) == []


@pytest.mark.parametrize("name", ["weight", "transposed", "padded", "norm", "scale"])
@pytest.mark.fault(
    point="tensors that a loader loses",
    did="A reload leaves a parameter as it was",
    happens="It is found and named",
    within=60,
)
def test_a_parameter_that_stays_as_it_is_is_found(monkeypatch, name):
    def drop(model):
        getattr(model, name).data.fill_(1)

    assert unchanged(monkeypatch, Model(), drop) == [name]


@pytest.mark.parametrize("name", ["weight", "transposed"])
def test_a_part_that_stays_as_it_is_is_found(monkeypatch, name):
    def drop(model):
        memory = getattr(model, name).data
        memory.as_strided((4096,), (1,))[1024:1280] = 1  # 4 of 64 rows of the memory

    assert unchanged(monkeypatch, Model(), drop) == [name]


def test_padding_may_stay_as_it_is_also_without_an_audit(monkeypatch):
    assert unchanged(monkeypatch, Model(), audit=LoadAudit(skipped="its loader needs values")) == []

    def drop(model):
        model.padded.data.fill_(1)

    assert unchanged(monkeypatch, Model(), drop, audit=LoadAudit(skipped="its loader needs values")) == ["padded"]


def test_scales_that_are_powers_of_two_change_with_the_weights(monkeypatch):
    def quantize(model):
        model.scale.data.copy_(torch.exp2(torch.ceil(torch.log2(model.weight.abs().max() / 448))))

    assert unchanged(monkeypatch, Model(), quantize) == []


def test_a_thousand_numbers_of_four_bytes_are_not_alike_by_chance():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert len({int(reload_check._block_sums(value.reshape(1))) for value in values}) == len(set(values.tolist()))


def test_names_that_the_loader_refuses_are_not_sent(monkeypatch):
    audit = LoadAudit(nameless=frozenset({"tied"}))
    sent = [*SENT, ("tied", (64, 64), torch.float32)]
    assert "tied" not in unchanged(monkeypatch, Model(), sent=sent, audit=audit)


def test_gaps_are_not_judged_and_odd_addresses_are(monkeypatch):
    model = Model()
    model.gaps = nn.Parameter(torch.zeros(64, 64)[:, :32])
    model.odd = nn.Parameter(torch.zeros(513, dtype=torch.bfloat16)[1:])
    model.empty = nn.Parameter(torch.zeros(0))
    sent = [*SENT, ("odd", (512,), torch.bfloat16)]
    assert unchanged(monkeypatch, model, sent=sent) == []


@pytest.mark.parametrize(("stale", "found"), [(0, []), (4, ["weight"]), (8, ["weight"])])
def test_rows_that_a_kernel_pads_are_no_old_values(stale, found):
    """As CUTLASS pads the rows of fp8 matrices to a multiple of 16."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.utils import replace_parameter

    class Padding(QuantizeMethodBase):
        def create_weights(self, *args, **kwargs): ...

        def apply(self, *args, **kwargs): ...

        def process_weights_after_loading(self, layer):
            padded = torch.zeros(16, 128)
            padded[stale:8] = layer.weight.data[stale:]
            replace_parameter(layer, "weight", padded)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 128), requires_grad=False)
            record_metadata_for_reloading(self)
            self.quant_method = Padding()
            self.quant_method.process_weights_after_loading(self)

        def load_weights(self, weights):
            for _, tensor in weights:
                self.weight.weight_loader(self.weight, tensor)

    model, sent = Padded(), [("weight", (8, 128), torch.float32)]
    model.weight.weight_loader = lambda parameter, tensor: parameter.data.copy_(tensor)
    runner = runner_of(model)
    runner.model_config = SimpleNamespace(enforce_eager=True, dtype=torch.float32)
    assert unchanged_by_reload(runner, sent, LoadAudit({}, loaded={"weight": 1.0})) == found
