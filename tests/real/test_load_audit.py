"""A real engine refuses weights that it cannot load as they are, keeps what it has, and takes the next right ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_models import MODELS, PROMPTS, randomize
from torch import nn

from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink

pytestmark = pytest.mark.slow  # an engine of its own


@pytest.fixture(scope="module")
def sink():
    return MemorySink()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return MODELS["llama"](tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def generation(model, sink):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm._custom_ops._supports_onednn", False)  # as on a GPU, parameters keep the loaded layout
        with ColocateGeneration(
            model,
            max_model_length=256,
            engine_kwargs={"kv_cache_memory_bytes": 16 << 20},
            profiling=ProfilingContext([sink]),
        ) as made:
            yield made


def biased(model: nn.Module) -> str:
    layer = model.model.layers[0].mlp.down_proj
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return "model.layers.0.mlp.down_proj.bias"


def wider(model: nn.Module) -> str:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(128, 300, bias=False), nn.Linear(128, 300, bias=False)
    mlp.down_proj = nn.Linear(300, 128, bias=False)
    return "model.layers.0.mlp."


def more_queries(model: nn.Module) -> str:
    model.model.layers[1].self_attn.q_proj = nn.Linear(128, 192, bias=False)
    return "model.layers.1.self_attn.q_proj.weight"


def value_head(model: nn.Module) -> str:
    model.value_head = nn.Linear(128, 1)
    return "value_head."


def without_norm(model: nn.Module) -> str:
    model.model.norm = nn.Identity()
    return "model.norm.weight"


def not_a_number(model: nn.Module) -> str:
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    return "model.norm.weight"


def restored(model: nn.Module, modules: list[nn.Module], tables: tuple[list[dict[str, Any]], ...]) -> None:
    """The modules and parameters that were registered before."""
    for module, own, parameters in zip(modules, tables[0], tables[1], strict=True):
        module._modules.clear()
        module._modules.update(own)
        module._parameters.clear()
        module._parameters.update(parameters)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (biased, ["no place for it (shape [128]", "include="]),
        (wider, ["32768 of its 38400 elements (shape [300, 128])", "gate_up_proj.weight [512, 128]"]),
        (more_queries, ["16384 of its 24576 elements (shape [192, 128])", "qkv_proj.weight [256, 128]"]),
        (value_head, ["value_head", "change the model back"]),
        (without_norm, ["does not provide it", "shape [128]"]),
        (not_a_number, ["not finite"]),
    ],
)
def test_what_does_not_fit_is_refused_and_the_next_right_sync_is_right(
    model, generation, sink, change: Callable[[nn.Module], str], says: list[str]
):
    modules = list(model.modules())
    tables = [dict(module._modules) for module in modules], [dict(module._parameters) for module in modules]
    randomize(model)
    generation.sync_weights()
    before = {name: tensor.clone() for name, tensor in engine_tensors(generation).items()}
    try:
        parameter = change(model)
        with pytest.raises(WeightSyncError) as caught:
            generation.sync_weights(verify="bits" if change is not_a_number else None)
    finally:
        restored(model, modules, tables)
    assert str(caught.value.parameter).startswith(parameter)
    for words in says:
        assert words in str(caught.value)
    if change is not not_a_number:  # a value is known only when it is there
        for name, tensor in engine_tensors(generation).items():
            assert torch.equal(tensor, before[name]), name
    randomize(model)
    generation.sync_weights()
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= 1e-4
    assert sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.AUDIT] == "passed"


def engine_tensors(generation: ColocateGeneration) -> dict[str, torch.Tensor]:
    """The engine's own parameters."""

    def parameters(worker):
        return dict(worker.model_runner.get_model().named_parameters())

    return generation.engine.llm.collective_rpc(parameters)[0]
