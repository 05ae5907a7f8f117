"""An adapter alone: what PEFT itself saves, in files that a server may be reading."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers.tiny_models import fill, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from vgen import WeightSyncError
from vgen.weights import adapter_of

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=LINEAR),
    "dora": LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "trained bias": LoraConfig(r=4, target_modules=LINEAR, bias="lora_only"),
    "modules to save": LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_alone_is_what_peft_saves(tmp_path, case):
    model = fill(get_peft_model(tiny("qwen2"), CONFIGS[case]))
    model.save_pretrained(tmp_path / "peft")
    adapter_of(model).save(tmp_path / "own")
    expected, found = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("peft", "own"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert peft.PeftConfig.from_pretrained(tmp_path / "own").r == 4
    assert not model.peft_config["default"].inference_mode
    with pytest.raises(WeightSyncError, match="no adapter 'other'"):
        adapter_of(model, "other")


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(WeightSyncError, match="no PEFT adapter"):
        adapter_of(tiny("qwen2"))


def test_an_adapter_that_transformers_added_has_pefts_names(tmp_path):
    config = CONFIGS["lora"]
    model = tiny("qwen2")
    model.add_adapter(config)
    fill(model)
    names = set(adapter_of(model).tensors)
    assert names == set(adapter_of(get_peft_model(tiny("qwen2"), config)).tensors)


def test_tensors_are_copies_and_later_training_does_not_show():
    model = fill(get_peft_model(tiny("qwen2"), CONFIGS["lora"]))
    adapter = adapter_of(model)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    fill(model, seed=9)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in before.items())


def test_one_of_several_active_adapters_must_be_named():
    model = get_peft_model(tiny("qwen2"), CONFIGS["lora"])
    model.add_adapter("second", CONFIGS["lora"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(WeightSyncError, match="name one of the active adapters"):
        adapter_of(model)
    assert adapter_of(model, "second").tensors


def test_files_are_replaced_and_nothing_else_stays_in_the_folder(tmp_path):
    model = get_peft_model(tiny("qwen2"), CONFIGS["lora"])
    for seed in (1, 2):
        adapter_of(fill(model, seed=seed)).save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter_of(model).tensors.items())
