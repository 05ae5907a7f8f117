"""The trainer's own forward pass for a probe: right log-probabilities, and a model that is afterwards as before."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers.tiny_models import fill, tiny

from vgen.engine_protocol import CannotProbe
from vgen.weights import source_of
from vgen.weights.source import probe_forward
from vgen.weights.source.probe_forward import NOISE_PASSES, PACKS_IN_FORWARD, forward_hooks, probe_logprobs
from vgen.weights.source.rounding_noise import FLOAT32, TENSOR_FLOAT32

IDS = [5, 9, 2, 33, 60, 1]


@pytest.mark.parametrize("rows", [1, 2, 32])
def test_each_token_but_the_first_gets_its_log_probability(monkeypatch, rows):
    monkeypatch.setattr(probe_forward, "ROWS", rows)
    model = fill(tiny("qwen2")).eval()
    answer = probe_logprobs(model, IDS)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(answer.logprobs, expected[range(len(IDS) - 1), IDS[1:]])
    assert (answer.token_ids, answer.hooks) == (IDS, ())


def test_the_noise_is_that_of_the_coarser_side_and_routing_needs_enough_to_change():
    dense = fill(tiny("qwen2")).eval()
    float32, engine_bf16 = probe_logprobs(dense, IDS), probe_logprobs(dense, IDS, 2**-9)
    assert float32.noise.shape == (NOISE_PASSES, len(IDS) - 1)
    assert (float32.unit, engine_bf16.unit) == (FLOAT32, 2**-9)
    assert engine_bf16.noise.abs().mean() > 100 * float32.noise.abs().mean() > 0
    assert probe_logprobs(fill(tiny("qwen2")).bfloat16().eval(), IDS).unit == 2**-9
    assert probe_logprobs(fill(tiny("mixtral")).eval(), IDS).unit == TENSOR_FLOAT32
    experts = fill(tiny("qwen3_moe")).eval()
    assert [probe_logprobs(experts, IDS, unit).unit for unit in (0, 2**-12, 2**-11, 2**-9, 2**-4)] == [
        TENSOR_FLOAT32,
        2**-10,
        2**-9,
        2**-9,
        2**-4,
    ]


def test_dropout_is_off_and_each_module_gets_its_mode_back():
    model = fill(tiny("qwen2"))
    expected = probe_logprobs(model, IDS).logprobs
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.model.norm.eval()
    assert torch.equal(probe_logprobs(model, IDS).logprobs, expected)
    assert model.training
    assert not model.model.norm.training
    assert all(layer.training for layer in model.model.layers)


def test_nothing_of_a_probe_stays_behind_also_after_an_error():
    model = fill(tiny("qwen2")).train()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    probe_logprobs(model, IDS)
    norm, model.model.norm = model.model.norm, None
    with pytest.raises(CannotProbe, match="forward pass fails with TypeError"):
        probe_logprobs(model, IDS)
    model.model.norm = norm
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_that_a_forward_pass_writes_or_exchanges_come_back_and_random_numbers_too():
    model = fill(tiny("qwen2")).eval()
    rotary = model.model.rotary_emb
    model.register_buffer("steps", torch.zeros(2), persistent=False)
    before, state = rotary.inv_freq, torch.get_rng_state()

    def disturb(module, args, output):
        torch.rand(3)
        model.steps += 1
        rotary.inv_freq = rotary.inv_freq.clone()

    model.model.norm.register_forward_hook(disturb)
    probe_logprobs(model, IDS)
    assert model.steps.tolist() == [0, 0]
    assert rotary.inv_freq is before
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_around_the_call_is_off():
    model = fill(tiny("qwen2")).eval()
    expected = probe_logprobs(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        answer = probe_logprobs(model, IDS)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(answer.logprobs, expected.logprobs)
    assert answer.unit == FLOAT32


@pytest.fixture
def accelerate_state():
    """accelerate keeps the first precision of a process for good; other tests and libraries set it too."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel, torch.compile])
def test_autocast_that_accelerate_put_into_forward_is_off_and_back_afterwards(accelerate_state, wrap):
    from accelerate import Accelerator

    model = fill(tiny("qwen2")).eval()
    expected = probe_logprobs(model, IDS)
    wrapped = wrap(Accelerator(mixed_precision="bf16", cpu=True).prepare(model))
    forward = vars(model)["forward"]
    answer = probe_logprobs(wrapped, IDS)
    assert torch.equal(answer.logprobs, expected.logprobs)
    assert answer.unit == FLOAT32
    assert vars(model)["forward"] is forward
    assert not torch.equal(model(torch.tensor([IDS])).logits, model._original_forward(torch.tensor([IDS])).logits)


def test_autocast_within_a_module_counts_by_the_dtype_that_computes():
    model = fill(tiny("qwen2")).eval()
    inner = model.model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(*args, **kwargs)

    model.model.forward = forward
    assert probe_logprobs(model, IDS).unit == 2**-9


def test_a_compiled_model_runs_with_the_noise():
    model = fill(tiny("qwen2")).eval()
    expected = probe_logprobs(model, IDS)
    model.compile(backend="eager")
    answer = probe_logprobs(model, IDS)
    assert torch.equal(answer.logprobs, expected.logprobs)
    assert torch.equal(answer.noise, expected.noise)


def test_hooks_of_the_user_are_named_and_those_of_frameworks_are_not():
    model = fill(tiny("qwen2")).eval()
    model.enable_input_require_grads()

    def steer(module, args, output):
        return output * 1.5

    model.model.norm.register_forward_hook(steer)
    model.model.norm.register_forward_pre_hook(partial(lambda scale, module, args: None, 2))
    steering, preparing = forward_hooks(model).values()
    assert steering.startswith("model.norm: ")
    assert steering.endswith("steer")
    assert preparing == "model.norm: partial"
    assert probe_logprobs(model, IDS).hooks == (steering, preparing)


def test_a_model_whose_modules_cannot_be_disturbed_is_not_compared():
    class Fixed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.config, self.weight = inner.config, torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, use_cache):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 64))

    with pytest.raises(CannotProbe, match="noise cannot be put into"):
        probe_logprobs(Fixed(tiny("qwen2")), IDS)


def test_a_lack_of_memory_is_no_failure_of_the_model(monkeypatch):
    model = tiny("qwen2")

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "forward", exhausted)
    with pytest.raises(CannotProbe, match="no memory"):
        probe_logprobs(model, IDS)


def test_wrappers_that_speak_to_other_ranks_are_left_out():
    model = fill(tiny("qwen2")).eval()
    wrapped = torch.nn.DataParallel(model)
    wrapped.forward = None  # would raise
    assert torch.equal(probe_logprobs(wrapped, IDS).logprobs, probe_logprobs(model, IDS).logprobs)


def test_a_source_probes_its_own_model_and_one_without_a_model_cannot():
    model = fill(tiny("qwen2")).eval()
    answer, expected = source_of(model).probe_logprobs(IDS, 2**-9), probe_logprobs(model, IDS, 2**-9)
    assert torch.equal(answer.logprobs, expected.logprobs)
    assert torch.equal(answer.noise, expected.noise)
    with pytest.raises(CannotProbe, match="no model"):
        source_of([("a", torch.ones(1))]).probe_logprobs(IDS)


def test_modules_that_pack_their_weights_in_a_forward_pass_do_not_while_they_are_probed():
    model, seen = tiny("llama"), []
    packs = model.model.layers[0].mlp.up_proj
    setattr(packs, PACKS_IN_FORWARD, True)
    packs.register_forward_pre_hook(lambda module, _: seen.append(getattr(module, PACKS_IN_FORWARD)))
    probe_logprobs(model, [1, 2, 3])
    assert seen
    assert not any(seen)
    assert getattr(packs, PACKS_IN_FORWARD) is True
    assert not hasattr(model.model.layers[1].mlp.up_proj, PACKS_IN_FORWARD)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_module_with_one_kind_of_hook_alone_is_looked_at(register):
    model = fill(tiny("qwen2")).eval()

    def steer(*_):
        return None

    getattr(model.model.layers[1], register)(steer)
    (named,) = forward_hooks(model).values()
    assert named.startswith("model.layers.1: ")
    assert named.endswith("steer")
