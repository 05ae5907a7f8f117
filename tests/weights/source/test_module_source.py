"""Sources of models that are whole: names and bits against `save_pretrained`, order, filter, rename, wrappers."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import fill, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from vgen import WeightSyncError
from vgen.engines.inprocess.initial_checkpoint import checkpoint_of
from vgen.generation import Generation
from vgen.testing import FakeEngine
from vgen.weights import source_of
from vgen.weights.source.module_source import engine_dtype, metadata_of, one_pass
from vgen.weights.source.probe_forward import probe_logprobs

KINDS = ["qwen2", "tied", "llama", "qwen3_moe", "mixtral", "deepseek_v3", "qwen2_vl", "gemma3"]
TIED = ["tied", "gemma3"]


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_stream_is_what_save_pretrained_writes(tmp_path, kind, loaded):
    model = fill(tiny(kind))
    expected = saved(model, tmp_path)
    if loaded:  # a model that was loaded remembers how its checkpoint named things
        auto = AutoModelForImageTextToText if kind in ("qwen2_vl", "gemma3") else AutoModelForCausalLM
        model = auto.from_pretrained(tmp_path, dtype=torch.float32)
    source = source_of(model)
    described = source.metadata()
    for _ in range(2):
        found = dict(source)
        assert [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()] == described
        assert set(expected) <= set(found)
        assert same(found, expected)
        more = set(found) - set(expected)
        assert len(more) == (kind in TIED)
        for name in more:
            assert name.endswith("lm_head.weight")
            assert torch.equal(found[name], model.get_input_embeddings().weight)
        assert source.tensors == len(described)
        assert source.bytes == sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        fill(model, seed=9)  # the next pass brings what is there then
        expected = saved(model, tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_whole_parameters_are_not_copied(kind):
    model = tiny(kind)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for _, tensor in source_of(model)} == storages


def test_a_layer_is_complete_before_the_next_one_begins():
    names = [name for name, *_ in source_of(tiny("mixtral")).metadata()]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_a_filter_and_a_rename():
    model = tiny("qwen3_moe")
    whole = dict(source_of(model))
    source = source_of(model, include=lambda name: ".experts.1." in name, rename=lambda name: f"policy.{name}")
    found = dict(source)
    assert found
    assert set(found) == {f"policy.{name}" for name in whole if ".experts.1." in name}
    assert same({name.removeprefix("policy."): tensor for name, tensor in found.items()}, {
        name: tensor for name, tensor in whole.items() if ".experts.1." in name
    })  # fmt: skip
    assert [name for name, *_ in source.metadata()] == list(found)
    with pytest.raises(ValueError, match="two tensors the name 'x'"):
        source_of(model, rename=lambda name: "x").metadata()
    assert source_of(source) is source
    assert source.model is model
    with pytest.raises(ValueError, match="its own include and rename"):
        source_of(source, include=lambda name: True)


def compiled(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return torch.compile(model)


def checkpointed(model: Any) -> Any:
    kind = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    return model


@pytest.mark.parametrize("wrap", [compiled, checkpointed, torch.nn.DataParallel])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_wrappers_leave_no_trace(wrap, kind):
    expected = dict(source_of(fill(tiny(kind))))
    found = dict(source_of(wrap(fill(tiny(kind)))))
    assert set(found) == set(expected)
    assert same(found, expected)


def test_a_module_of_any_kind_keeps_its_names_and_the_buffers_that_it_saves():
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.BatchNorm1d(3)
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    model = Own()
    assert [name for name, _ in source_of(model)] == list(model.state_dict())


def test_a_model_that_changes_is_looked_at_anew():
    model = fill(tiny("qwen2"))
    source = source_of(model)
    first = dict(source)
    model.resize_token_embeddings(70)
    model.model.norm = model.model.norm.bfloat16()
    found = dict(source)
    assert found["lm_head.weight"].shape == (70, 32)
    assert found["model.norm.weight"].dtype == torch.bfloat16
    assert set(found) == set(first)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(70, 32))
    assert torch.equal(dict(source)["lm_head.weight"], torch.ones(70, 32))


@pytest.mark.fault(
    point="the trainer's model as a source",
    did="A parameter has no data",
    happens="`WeightSyncError` names it",
    within=60,
)
def test_what_has_no_data_is_refused_by_name():
    with torch.device("meta"):
        model = tiny("qwen2")
    with pytest.raises(WeightSyncError, match="no data") as caught:
        list(source_of(model))
    assert caught.value.parameter == "model.embed_tokens.weight"
    assert caught.value.phase == "gather"


def test_packed_integers_are_refused_by_name():
    model = tiny("qwen2")
    packed = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = packed
    with pytest.raises(WeightSyncError, match="quantized") as caught:
        list(source_of(model))
    assert caught.value.parameter == "model.layers.1.mlp.up_proj.weight"


def test_the_engines_dtype_is_that_of_most_weights():
    model = tiny("qwen2").bfloat16()
    model.model.norm.float()
    assert engine_dtype(source_of(model)) == "bfloat16"


def test_a_pass_that_was_left_cannot_go_on_beside_the_next():
    source = source_of(tiny("qwen2"))
    left = iter(source)
    next(left)
    assert len(list(source)) == 27
    with pytest.raises(WeightSyncError, match="another pass"):
        next(left)


def test_errors_of_a_receiver_come_through_and_leave_the_source_well():
    source = source_of(tiny("qwen2"))

    def receive(fails: str) -> int:
        with one_pass(source):
            if fails == "before":
                raise OSError(fails)
            for _ in source:
                if fails == "within":
                    raise OSError(fails)
        return source.tensors

    for fails in ("within", "before"):
        with pytest.raises(OSError, match=fails):
            receive(fails)
    assert not source.collective
    assert receive("not at all") == 27
    with one_pass(source_of([("w", torch.ones(1))])):
        pass


def test_nothing_is_kept_between_passes():
    model = tiny("qwen2")
    source = source_of(model)
    list(source)
    old = torch.nn.Parameter(torch.ones(64, 32))
    model.lm_head.weight = old
    list(source)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(64, 32))
    gc.unfreeze()  # whoever held it would be found
    gc.collect()
    assert len(gc.get_referrers(old)) <= 1  # this frame


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'vgen[bitsandbytes]'"
)
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_has_quantized_comes_as_the_forward_sees_it(tmp_path, adapters, double):
    plain = fill(tiny("qwen2"))
    plain.save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.float32)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    source = source_of(model)
    found = dict(source)
    assert [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()] == source.metadata()
    checkpoint = checkpoint_of(model, None)
    assert getattr(AutoConfig.from_pretrained(checkpoint.path), "quantization_config", None) is None
    assert checkpoint.folder is not None
    checkpoint.folder.cleanup()
    ids = torch.tensor([[1, 2, 3]])
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # there it would compute with the scales in bf16: see below
    with torch.no_grad():
        before = plain(ids).logits
        plain.load_state_dict(found)
        after, own = plain(ids).logits, model(ids).logits
    assert (before - own).abs().max() > 1e-3
    torch.testing.assert_close(after, own, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'vgen[bitsandbytes]'"
)
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_that_were_packed_for_a_cpu_come_back(double):
    """As a forward pass outside training does on a CPU with AVX512-BF16; packing itself works on any."""
    from bitsandbytes import functional, nn

    linear = nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    linear.weight = nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4")
    linear = linear.to("cpu")
    model = torch.nn.Sequential(linear)
    source = source_of(model)
    ((name, before),) = source
    said = source.metadata()
    linear.weight.data, state = functional._convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    for _ in range(2):  # reading them changes nothing
        ((again, after),) = source
        assert (again, after.dtype, source.metadata()) == (name, torch.float32, said)
        torch.testing.assert_close(after, before, rtol=2**-8, atol=0)
    assert state.packing_format_for_cpu


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'vgen[bitsandbytes]'"
)
@pytest.mark.parametrize("training", [False, True])
def test_a_probe_leaves_four_bits_as_they_are(tmp_path, training):
    plain = fill(tiny("qwen2"))
    plain.save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.float32)
    model.train(training)
    linear = model.model.layers[0].self_attn.q_proj
    before, packs = linear.weight.data.clone(), linear.support_avx512bf16_for_cpu
    linear.support_avx512bf16_for_cpu = True  # as on such a CPU
    probe_logprobs(model, [1, 2, 3])
    assert torch.equal(linear.weight.data, before)
    assert linear.support_avx512bf16_for_cpu
    assert linear.training is training
    linear.support_avx512bf16_for_cpu = packs


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'vgen[bitsandbytes]'"
)
def test_eight_bits_come_back_within_their_steps(tmp_path):
    plain = fill(tiny("qwen2"))
    plain.save_pretrained(tmp_path)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight, dtype=torch.float32)
    for again in (False, True):
        if again:
            model(torch.tensor([[1, 2, 3]]))  # the first forward moves the scales elsewhere
        for name, tensor in source_of(model):
            step = plain.state_dict()[name].abs().max() / 127
            assert tensor.dtype == torch.float32
            assert (tensor - plain.state_dict()[name]).abs().max() <= step


def test_named_tensors_that_iterate_repeatedly_are_a_source():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    for weights in (tensors, list(tensors.items()), tensors.items()):
        source = source_of(weights)
        for _ in range(2):
            assert [(name, id(tensor)) for name, tensor in source] == [(n, id(t)) for n, t in tensors.items()]
            assert (source.tensors, source.bytes) == (2, 32)
            assert source.seconds >= 0
        assert source_of(source) is source
        assert (source.model, source.collective, source.address_snapshot()) == (None, False, None)
        assert source.ties() == {}
        assert metadata_of(source) == [("a", (2, 3), torch.float32), ("b", (4,), torch.bfloat16)]
    assert list(source_of([])) == []
    assert source_of({"a": tensors["a"], "tied": tensors["a"]}).ties() == {"tied": "a"}


def test_tensors_in_the_same_memory_that_read_it_otherwise_are_not_tied():
    square = torch.randn(3, 3)
    halves = {"whole": square, "transposed": square.T, "part": square[:2], "bits": square.view(torch.int32)}
    assert source_of(halves | {"again": square}).ties() == {"again": "whole"}


def test_vllms_sources_describe_themselves():
    class Described(list):
        def metadata(self):
            return [SimpleNamespace(name="a", shape=torch.Size([2]), dtype=torch.float32)]

    assert source_of(Described([("a", torch.ones(2))])).metadata() == [("a", (2,), torch.float32)]


@pytest.mark.parametrize("weights", [None, 7, (pair for pair in [("a", torch.ones(1))])])
def test_what_is_no_source_is_refused(weights):
    with pytest.raises(TypeError, match="no source of weights"):
        source_of(weights)


def test_a_list_of_weights_is_enough_for_a_generation_and_its_engine_gets_them():
    weights = [("a", torch.ones(2)), ("b", torch.zeros(3))]
    for source in ([], weights):
        engine = FakeEngine()
        with Generation(engine, source=source) as generation:
            generation.sync_weights()
        assert list(engine.weights) == [name for name, _ in source]
