"""Which modules may be loaded by a record. vLLM's classes are stood in for; real engines are in `tests/real`."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from vgen.weights.load.weight_layout_allowlist import layout_change


class QuantizeMethodBase: ...


class AttentionImplBase:
    def process_weights_after_loading(self, dtype): ...


class UnquantizedLinearMethod(QuantizeMethodBase): ...


class Fp8LinearMethod(UnquantizedLinearMethod): ...


@pytest.fixture(autouse=True)
def layerwise_info(monkeypatch):
    """The modules of vLLM that are imported, with what its reload knows of each module."""
    info = WeakKeyDictionary()
    contents = {
        "vllm.model_executor.layers.quantization.base_config": {"QuantizeMethodBase": QuantizeMethodBase},
        "vllm.v1.attention.backend": {"AttentionImplBase": AttentionImplBase},
        "vllm.model_executor.model_loader.reload.layerwise": {"LAYERWISE_INFO": info},
    }
    for name, attributes in contents.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            package = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        vars(sys.modules[name]).update(attributes)
    return info


def linear(method=None, **attributes) -> nn.Module:
    module = nn.Linear(3, 2)
    module.quant_method = method
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def experts(backend="TRITON", balanced=False) -> nn.Module:
    method = type("UnquantizedFusedMoEMethod", (), {})()
    method.unquantized_backend = SimpleNamespace(name=backend)
    method.moe = SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=balanced))
    return linear(method)


class Attention(nn.Module):
    def __init__(self, implementation=None, quant_config=None) -> None:
        super().__init__()
        self.impl, self.quant_config = implementation, quant_config

    def process_weights_after_loading(self, dtype): ...


class LatentAttention(Attention): ...


class KeepsSinks(AttentionImplBase):
    def process_weights_after_loading(self, dtype): ...


class HasNoSinks(KeepsSinks):
    _sinks_source = None


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(3),
        linear(UnquantizedLinearMethod()),
        experts(),
        Attention(),
        Attention(AttentionImplBase()),
        Attention(HasNoSinks()),
    ],
)
def test_layers_that_keep_the_loaders_layout_are_accepted(module):
    assert layout_change(module) is None


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (linear(Fp8LinearMethod()), "quantization method Fp8LinearMethod"),
        (experts("FLASHINFER"), "expert backend FLASHINFER"),
        (experts(balanced=True), "balance their load"),
        (linear(_bf16x3_weight=torch.ones(1)), "split copy"),
        (LatentAttention(), "LatentAttention processes its weights"),
        (Attention(quant_config=object()), "quantization config"),
        (Attention(KeepsSinks()), "KeepsSinks processes weights"),
    ],
)
def test_everything_else_is_left_to_the_engines_reload_with_the_reason(module, why):
    assert why in (layout_change(module) or "")


def test_weights_in_host_memory_are_left_to_the_reload():
    module = nn.Linear(3, 2)
    module.weight._vllm_is_uva_offloaded = True
    assert layout_change(module) == "weight lives in host memory"


def test_a_tensor_of_another_shape_dtype_or_layout_than_constructed_was_repacked(layerwise_info):
    module = nn.Linear(3, 3, bias=False)
    meta = module.weight.to("meta")
    layerwise_info[module] = SimpleNamespace(restore_metadata=({"weight": meta}, {}))
    assert layout_change(module) is None
    for repacked in (torch.zeros(9), torch.zeros(3, 3).half(), torch.zeros(3, 3).t()):
        module.weight = nn.Parameter(repacked)
        assert layout_change(module) == "the engine has repacked it"
