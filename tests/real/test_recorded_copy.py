"""The recorded copy on real vLLM on a CPU: used if parameters keep the layout they are loaded with, else refused."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from helpers.small_models import MODELS, PROMPTS, randomize, three_times

from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.profiling import semconv
from vgen.testing import MemorySink
from vgen.weights.load.batched_copy import AHEAD

pytestmark = pytest.mark.slow

SLOW = pytest.mark.slow
ALONE = pytest.mark.skipif(
    "VGEN_TEST_ALONE" not in os.environ,
    reason="vLLM cannot start a mixture of experts in a process that had a dense model: see the last test",
)


def made(model, sink):
    settings = dict(max_model_length=256, engine_kwargs={"kv_cache_memory_bytes": 16 << 20})
    return ColocateGeneration(model, profiling=ProfilingContext([sink]), **settings)


@pytest.fixture
def plain_layout(monkeypatch):
    keep_layout(monkeypatch)


def keep_layout(monkeypatch):
    """Switch off oneDNN's packing: as on a GPU, linear layers keep the layout they are loaded with."""
    import vllm._custom_ops as ops

    monkeypatch.setattr(ops, "_supports_onednn", False)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A model, its engine after three syncs of fresh weights, its sink, and the attributes of these syncs."""
    model, sink = MODELS["qwen2"](tmp_path_factory.mktemp("qwen2")), MemorySink()
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            keep_layout(patch)
            generation = stack.enter_context(made(model, sink))
            three_times(model, generation)
        yield model, generation, sink, syncs(sink)


def syncs(sink):
    return [span.attributes for span in sink.named(semconv.WEIGHT_SYNC)]


def test_the_recorded_copy_brings_fresh_weights_three_times(qwen2):
    *_, of_three = qwen2
    were_recorded(of_three)


def test_bits_are_verified_without_a_sync(qwen2):
    model, generation, *_ = qwen2
    generation.sync_weights()
    report = generation.verify("bits")
    assert (report.how, report.tensors) == ("bits", len(list(generation.source)))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(WeightSyncError, match="differs from the trainer's model") as caught:
        generation.verify("bits")
    assert (caught.value.phase, caught.value.parameter) == ("verify", "model.layers.1.mlp.down_proj.weight")
    generation.sync_weights()
    assert generation.verify("bits").tensors == report.tensors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "padded", "llama"])
def test_the_recorded_copy_brings_fresh_weights_three_times_to_other_models(tmp_path, plain_layout, kind):
    model, sink = MODELS[kind](tmp_path), MemorySink()
    with made(model, sink) as generation:
        three_times(model, generation)
    were_recorded(syncs(sink))


def were_recorded(of_three):
    assert {attributes[semconv.TRANSPORT] for attributes in of_three} == {"recorded"}
    assert {attributes[semconv.PLAN_RELOADED] for attributes in of_three} == {0}
    # The generation before the first of the three syncs too.
    assert [attributes.get(semconv.VERIFY) for attributes in of_three] == ["logprobs", None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", pytest.param("experts", marks=ALONE)])
def test_repacked_layers_use_the_engines_reload_and_the_span_has_the_reason(tmp_path, kind):
    model, sink = MODELS[kind](tmp_path), MemorySink()
    with made(model, sink) as generation:
        three_times(model, generation, 1e-3 if kind == "experts" else 1e-4)
    for attributes in syncs(sink):
        assert attributes[semconv.TRANSPORT] == attributes[semconv.PLAN_WAY] == "reload"
        assert attributes[semconv.PLAN_RELOADED] == attributes[semconv.PLAN_MODULES] > 10
        assert "the engine has repacked it" in attributes[semconv.TRANSPORT_REASON]
    assert syncs(sink)[0][semconv.VERIFY] == "logprobs"


@ALONE
def test_experts_are_recorded_if_their_layout_is_kept(tmp_path, plain_layout, monkeypatch):
    """vLLM's CPU kernels may repack experts into the same shape, so this test compares only bytes."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    from vgen.weights.load import weight_layout_allowlist

    model, sink = MODELS["experts"](tmp_path), MemorySink()
    monkeypatch.setattr(weight_layout_allowlist, "EXPERT_BACKENDS", weight_layout_allowlist.EXPERT_BACKENDS | {"CPU"})
    monkeypatch.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
    with made(model, sink) as generation:
        for _ in range(2):
            randomize(model)
            generation.sync_weights(verify="none")
            assert syncs(sink)[-1][semconv.TRANSPORT] == "recorded"

        def experts(worker):
            return dict(worker.model_runner.get_model().named_parameters())

        (found,) = generation.engine.llm.collective_rpc(experts)
        for layer in range(2):
            routed = f"model.layers.{layer}.mlp.experts.routed_experts"
            own = model.model.layers[layer].mlp.experts
            assert torch.equal(found[f"{routed}.w13_weight"], own.gate_up_proj)
            assert torch.equal(found[f"{routed}.w2_weight"], own.down_proj)


@SLOW
def test_a_hook_that_repacks_into_the_same_shape_is_found_by_comparing_with_a_reload(
    tmp_path, plain_layout, monkeypatch
):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def repacks(method, layer, own=UnquantizedLinearMethod.process_weights_after_loading):
        own(method, layer)
        layer.weight.data.copy_(layer.weight.data.flip(0))

    model, sink = MODELS["qwen2"](tmp_path), MemorySink()
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", repacks)
    with made(model, sink) as generation:
        generation.sync_weights(verify="none")
    assert syncs(sink)[-1][semconv.TRANSPORT] == "reload"
    assert "something else than the record" in syncs(sink)[-1][semconv.TRANSPORT_REASON]


class TorchBatchedCopy:
    """As `BatchedCopy`, by torch's own copies."""

    how = "kernel"
    calls: list[str]

    def __init__(self, pairs):
        by_size = sorted(pairs, key=lambda pair: -pair[0].numel())
        self.ahead, self.others = by_size[:AHEAD], by_size[AHEAD:]
        self.largest = {tensor.untyped_storage().data_ptr() for pair in self.ahead for tensor in pair}

    def start(self):
        self.calls.append("start")
        for place, value in self.ahead:
            place.copy_(value)

    def finish(self):
        self.calls.append("finish")
        for place, value in self.others:
            place.copy_(value)

    def run(self):
        self.start()
        self.finish()

    @classmethod
    def of(cls, pairs):
        batched = cls(pairs)
        batched.run()
        cls.calls.append("made")
        return batched


def test_the_largest_weights_are_copied_first_if_their_addresses_are_unchanged(qwen2, monkeypatch):
    from vgen.weights.load import recorded_copy

    model, generation, *_ = qwen2
    monkeypatch.setattr(TorchBatchedCopy, "calls", [], raising=False)
    monkeypatch.setattr(recorded_copy, "batched_copy_of", TorchBatchedCopy.of)
    weights = generation.engine._weights
    looked = recorded_copy.RecordedCopy._prepare
    monkeypatch.setattr(
        recorded_copy.RecordedCopy, "_prepare", lambda *own: TorchBatchedCopy.calls.append("look") or looked(*own)
    )

    def sync() -> list[str]:
        TorchBatchedCopy.calls.clear()
        randomize(model)
        generation.sync_weights()
        assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= 1e-4
        return [*TorchBatchedCopy.calls]

    weights._batched_copy = weights._addresses = None
    assert sync() == ["look"]
    assert sync() == (making := ["look", "start", "finish", "made"])  # it lies where it lay
    assert sync() == ["start", "finish"]
    largest = model.model.embed_tokens.weight
    smallest = model.model.norm.weight
    for moved in (smallest, largest):
        moved.data = moved.data.clone()
        assert sync() == (["start", "look"] if moved is smallest else ["look"])
        assert weights._batched_copy is None
        assert sync() == making
        assert sync() == ["start", "finish"]
    # A change that is seen only after the copy: the copy is made again, from the model as it is then.
    square, norm = model.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].input_layernorm
    square.data = square.data.t()
    assert sync() == ["start", "finish", "look"]
    square.data = square.data.t()
    assert [sync(), sync(), sync()] == [["look"], making, ["start", "finish"]]
    norm._parameters = {"weight": torch.nn.Parameter(norm.weight.data.clone())}
    assert sync() == ["start", "finish", "look"]
    assert weights._batched_copy is None
    assert [sync(), sync()] == [making, ["start", "finish"]]
    unloaded = [*weights._record.unloaded, *weights._outside]
    assert any(content.any() for _, content in unloaded)
    for tensor, _ in unloaded:
        tensor.zero_()
    weights.forget()  # as level-2 sleep does, which also discards tensors that no loader writes
    assert sync() == ["start", "finish"]
    assert all(torch.equal(tensor, content) for tensor, content in unloaded)
    weights._batched_copy = weights._addresses = None


def test_the_largest_weights_of_another_process_are_copied_first(qwen2, monkeypatch):
    from vgen.weights.load import recorded_copy
    from vgen.weights.transports.cuda_ipc import ResidentWeights

    model, generation, *_ = qwen2
    monkeypatch.setattr(TorchBatchedCopy, "calls", [], raising=False)
    monkeypatch.setattr(recorded_copy, "batched_copy_of", TorchBatchedCopy.of)
    held = list(generation.source)
    table = {"name": "weights", "handles": [], "tensors": []}
    for index, (name, tensor) in enumerate(held):
        table["handles"].append({"handle": str(index), "bytes": tensor.numel() * tensor.element_size()})
        table["tensors"].append((name, "float32", list(tensor.shape), list(tensor.stride()), index, 0))

    def opened(own, handle, size, device):
        return held[int(handle)][1].detach().flatten().view(torch.uint8)

    monkeypatch.setattr(ResidentWeights, "_open", opened)
    source = ResidentWeights(table, torch.device("cpu"))
    weights = generation.engine._weights
    weights._batched_copy = weights._addresses = None
    for calls in ([], ["start", "finish", "made"], ["start", "finish"], ["start", "finish"]):
        TorchBatchedCopy.calls.clear()
        randomize(model)
        generation.engine._load(source, False)
        generation.engine._reset_caches()
        assert TorchBatchedCopy.calls == calls
        assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= 1e-4
    weights._batched_copy = weights._addresses = None


def test_too_many_unloaded_tensors_lead_to_the_reload(qwen2, plain_layout):
    model, generation, sink, _ = qwen2
    weights = generation.engine._weights
    for outside, transport, reason in ((None, "reload", "it has too much"), (weights._outside, "recorded", "in")):
        weights._outside = outside
        weights.discard_record()
        randomize(model)
        generation.sync_weights()
        assert syncs(sink)[-1][semconv.TRANSPORT] == transport
        assert syncs(sink)[-1][semconv.TRANSPORT_REASON].startswith(reason)
        assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= 1e-4


def test_bits_and_logprobs_detect_a_stale_weight(qwen2, plain_layout, monkeypatch):
    from vgen.weights.load import recorded_copy

    model, generation, sink, _ = qwen2
    generation.sync_weights()
    randomize(model)
    monkeypatch.setattr(recorded_copy, "copy_pairs", lambda pairs: [p.copy_(v) for p, v in pairs[:-4]])
    with pytest.raises(WeightSyncError, match="log-probabilities") as caught:
        generation.sync_weights(verify="logprobs")
    assert caught.value.phase == "verify"
    assert generation.state == "failed"
    with pytest.raises(WeightSyncError, match="differs from its source") as caught:
        generation.sync_weights(verify="bits")
    assert caught.value.parameter.startswith("model.layers.1")
    generation.sync_weights()  # from now on with the engine's reload
    assert syncs(sink)[-1][semconv.TRANSPORT] == "reload"
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) <= 1e-4


def test_the_callers_choice_of_transport(tmp_path):
    model = MODELS["tied"](tmp_path)
    settings = dict(max_model_length=256, engine_kwargs={"kv_cache_memory_bytes": 16 << 20})
    with ColocateGeneration(model, weight_transport="recorded", **settings) as generation:
        with pytest.raises(WeightSyncError, match=r"not safe here: .*repacked"):
            generation.sync_weights()
        assert generation.state == "failed"


@SLOW
def test_experts_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", "experts and not own", __file__]
    environment = {**os.environ, "VGEN_TEST_ALONE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
