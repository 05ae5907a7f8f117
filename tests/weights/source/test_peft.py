"""Sources of adapted models: the bits of PEFT's own merge, while the trainer's tensors stay as they are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import fill, tiny
from peft import LoraConfig, get_peft_model

from vgen import WeightSyncError
from vgen.engines.inprocess.initial_checkpoint import checkpoint_of
from vgen.weights import source_of
from vgen.weights.source.module_source import engine_dtype
from vgen.weights.verification.checkpoint_rows import first_difference

LINEAR = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, tuple[str, Any]] = {
    "lora": ("qwen2", LoraConfig(r=4, target_modules=LINEAR)),
    "rslora": ("qwen2", LoraConfig(r=4, target_modules=LINEAR, use_rslora=True)),
    "dora": ("qwen2", LoraConfig(r=4, target_modules=LINEAR, use_dora=True)),
    "trained bias": ("qwen2", LoraConfig(r=4, target_modules=LINEAR, bias="lora_only")),
    "lora bias": ("qwen2", LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)),
    "embeddings": ("qwen2", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])),
    "modules to save": ("qwen2", LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"])),
    "tokens": ("qwen2", LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[1, 5])),
    "tied tokens": ("tied", LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[1, 5])),
    "tied head": (
        "tied",
        LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "experts": ("qwen3_moe", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "ia3": ("qwen2", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": ("qwen2", peft.LoHaConfig(r=4, target_modules=LINEAR)),
    "oft": ("qwen2", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)),
    "vera": ("qwen2", peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4)),
}


def adapted(case: str = "lora", dtype: torch.dtype = torch.float32) -> Any:
    kind, config = CONFIGS[case]
    return fill(get_peft_model(tiny(kind).to(dtype), copy.deepcopy(config)))


def bits(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> bool:
    now = model.state_dict()
    return set(now) == set(before) and all(
        now[name].data_ptr() == address and torch.equal(now[name].view(torch.uint8), old.view(torch.uint8))
        for name, (address, old) in before.items()
        if old.ndim
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONFIGS)
def test_merged_weights_equal_pefts_own_merge_of_a_copy_bit_for_bit(case, dtype):
    model = adapted(case, dtype)
    before = bits(model)
    source = source_of(model)
    described = source.metadata()
    found = dict(source)
    assert [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()] == described
    assert unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dict(source_of(copy.deepcopy(model).merge_and_unload()))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", ["lora", "modules to save"])
def test_a_hundred_passes_leave_the_trainers_weights_as_they_were(case):
    model = adapted(case, torch.bfloat16)
    before, source = bits(model), source_of(model)
    first = {name: tensor.clone() for name, tensor in source}
    for number in range(100):
        for index, (name, tensor) in enumerate(source):
            if number == 50 and index == 5:
                break  # a receiver that fails changes nothing either
            if tensor.data_ptr() not in {address for address, _ in before.values()}:
                tensor.fill_(1)  # the copy is the receiver's
            else:
                assert torch.equal(tensor, first[name])
    assert unchanged(model, before)
    assert all(torch.equal(first[name], tensor) for name, tensor in source)


def test_merging_in_place_is_what_drifts():
    """The reason for all this: what the test above would see if adapters were merged and taken out again."""
    model = adapted("lora", torch.bfloat16)
    before = bits(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not unchanged(model, before)


def test_what_the_forward_uses_is_what_is_sent():
    model = adapted("modules to save")
    base = dict(source_of(fill(tiny("qwen2"))))
    ids = torch.tensor([[1, 2, 3]])

    def own_logits() -> torch.Tensor:
        plain = tiny("qwen2")
        plain.load_state_dict(dict(source))
        return plain(ids).logits

    source = source_of(model)
    with torch.no_grad():
        torch.testing.assert_close(own_logits(), model(ids).logits)
        with model.disable_adapter():
            torch.testing.assert_close(own_logits(), model(ids).logits)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        fill(model, seed=3)
        model.set_adapter("other")
        torch.testing.assert_close(own_logits(), model(ids).logits)
        model.merge_adapter()  # what the user has merged is not merged again
        torch.testing.assert_close(own_logits(), model(ids).logits)
    assert set(dict(source)) == set(base)


def test_adapters_that_transformers_added_itself():
    model = tiny("qwen3_moe")
    names = set(dict(source_of(model)))
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    fill(model)
    found = dict(source_of(model))
    assert set(found) == names
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], expected)


@pytest.mark.fault(
    point="the trainer's model as a source",
    did="An adapter is of a kind that no engine can follow",
    happens="`WeightSyncError` names the kind",
    within=60,
)
def test_what_no_engine_could_follow_is_refused():
    prompt = get_peft_model(tiny("qwen2"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(WeightSyncError, match="PROMPT_TUNING"):
        list(source_of(prompt))


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        (dict(target_modules=["q_proj"]), True),
        (dict(target_modules=["embed_tokens"]), False),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
        (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), False),
        (dict(target_modules=["embed_tokens", "lm_head"]), False),
        (dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), True),
        (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
        (dict(target_modules=["q_proj"], trainable_token_indices=[1, 5]), True),
    ],
)
def test_adapters_leave_weights_tied_only_where_both_have_the_same(options, tied):
    model = fill(get_peft_model(tiny("tied"), LoraConfig(r=4, **options)))
    source = source_of(model)
    tensors = dict(source)
    assert (source.ties() == {"lm_head.weight": "model.embed_tokens.weight"}) is tied
    assert torch.allclose(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"], atol=1e-6) is tied


def test_a_head_untied_by_hand_is_no_longer_tied_at_the_next_look():
    model = tiny("tied")
    source = source_of(model)
    assert source.ties() == {"lm_head.weight": "model.embed_tokens.weight"}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert source.ties() == {}
    model.lm_head.weight = model.model.embed_tokens.weight
    assert source.ties() == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.fault(
    point="the trainer's model as a source",
    did="Merging an adapter fails",
    happens="The error names the layer; the model is as before",
    within=60,
)
def test_a_merge_that_fails_names_the_layer_and_changes_nothing(monkeypatch):
    model = adapted()
    before, source = bits(model), source_of(model)
    source.metadata()

    def fail(self: Any, adapter: str) -> torch.Tensor:
        raise RuntimeError("out of memory")

    layer = type(model.base_model.model.model.layers[1].mlp.down_proj)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "get_delta_weight", fail)
        with pytest.raises(WeightSyncError, match="out of memory") as caught:
            list(source)
    assert caught.value.parameter == "model.layers.0.self_attn.q_proj"
    assert unchanged(model, before)
    assert len(list(source)) == 27


def test_the_engine_starts_from_the_base_models_config_and_dtype():
    base = tiny("qwen2").bfloat16()
    model = get_peft_model(base, LoraConfig(r=64, target_modules=LINEAR))
    for wrapped in (model, torch.compile(model), torch.nn.DataParallel(model)):
        checkpoint = checkpoint_of(wrapped, None)
        assert type(base.config).from_pretrained(checkpoint.path).architectures == ["Qwen2ForCausalLM"]
        assert checkpoint.folder is not None
        checkpoint.folder.cleanup()
    assert engine_dtype(source_of(model)) == "bfloat16"


def test_an_adapted_model_is_not_its_base_models_checkpoint(tmp_path):
    model = adapted()
    model.unload().save_pretrained(tmp_path)
    assert "is different" in str(first_difference(source_of(adapted()), tmp_path))
