"""The audit of a stock server by vLLM's definition of its model, in a process of its own."""

from __future__ import annotations

import sys

import pytest
import torch

from vgen import WeightSyncError
from vgen.testing import tiny_model
from vgen.weights.load import definition_audit
from vgen.weights.load.definition_audit import audit_definition
from vgen.weights.source.module_source import metadata_of, source_of

vllm = pytest.importorskip("vllm")
METADATA = [("weight", (2,), torch.float32)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model, _ = tiny_model(folder)
    return model, {"model": str(folder), "dtype": "torch.float32", "vllm_version": vllm.__version__}


def unaudited(definition) -> str:
    return audit_definition(definition, METADATA, {}, "server")["unaudited"]


def test_without_vllm_or_the_configuration_the_load_is_unaudited(monkeypatch, tmp_path):
    assert "'/nowhere/x', is not on this host" in unaudited({"model": "/nowhere/x"})
    assert "'nobody/ever', is not on this host" in unaudited({"model": str(tmp_path), "hf_config_path": "nobody/ever"})
    monkeypatch.setattr(definition_audit, "find_spec", lambda name: None)
    assert "vLLM is not installed beside the trainer" in unaudited({"model": str(tmp_path)})


def test_a_process_that_ends_without_an_answer_or_hangs_leaves_the_load_unaudited(monkeypatch, tmp_path):
    monkeypatch.setattr(definition_audit, "__name__", "vgen.no_such_module")
    reason = unaudited({"model": str(tmp_path)})
    assert "ended with 1" in reason
    assert "No module named vgen.no_such_module" in reason
    monkeypatch.setattr(definition_audit, "SECONDS", 0.01)
    assert "has not built its model within 0.01 s" in unaudited({"model": str(tmp_path)})


@pytest.mark.slow  # each imports vLLM in a process of its own
def test_the_right_tensors_pass_and_this_process_stays_as_it_is(served):
    model, definition = served
    source, before = source_of(model), set(sys.modules)
    assert audit_definition(definition, metadata_of(source), source.ties(), "server") == {
        "unaudited": "",
        "narrowed": [],
    }
    assert not [name for name in set(sys.modules) - before if name.startswith("vllm.model_executor")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("model.layers.0.mlp.down_proj.bias", (128,), r"no place for it \(shape \[128\]"),
        ("model.layers.1.self_attn.q_proj.weight", (192, 128), r"\[192, 128\]"),
        ("model.norm.weight", None, "does not provide it"),
    ],
)
def test_a_tensor_too_many_of_another_shape_or_missing_is_refused_by_its_name(served, name, shape, says):
    model, definition = served
    source = source_of(model)
    metadata = [entry for entry in metadata_of(source) if entry[0] != name]
    if shape is not None:
        metadata.append((name, shape, torch.float32))
    with pytest.raises(WeightSyncError, match=says) as caught:
        audit_definition(definition, metadata, source.ties(), "server")
    assert caught.value.parameter == name
    assert (caught.value.phase, caught.value.receiver) == ("load", "server")


@pytest.mark.slow
def test_another_version_of_vllm_or_a_model_that_it_cannot_build_leaves_the_load_unaudited(served):
    _, definition = served
    assert "it runs vLLM 0.30.0, where" in unaudited({**definition, "vllm_version": "0.30.0"})
    reason = unaudited({**definition, "quantization": "no_such_method"})
    assert "cannot build its model" in reason
    assert "no_such_method" in reason
