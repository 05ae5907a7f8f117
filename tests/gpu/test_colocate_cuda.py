"""`ColocateGeneration` on a CUDA device: CUDA graphs, real sleep, restored weights, device time."""

from __future__ import annotations

import pytest
import torch
from helpers.random_streams import states

from vgen import ColocateGeneration, ProfilingContext, Sampling, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import EngineState, Source
from vgen.profiling import semconv
from vgen.testing import MemorySink, tiny_model
from vgen.weights import ModuleSource

PROMPTS = [[1, 2, 3], list(range(100)), [7] * 30]
TOLERANCE = 2e-3
"""In float32 vLLM's attention kernels multiply in TF32, which keeps ten bits of the mantissa."""


@pytest.fixture(scope="module")
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))[0].to("cuda")


@pytest.fixture(scope="module")
def generation(model, sink):
    profiling = ProfilingContext([sink])
    with ColocateGeneration(
        model,
        enable_sleep_mode=True,
        max_model_length=512,
        profiling=profiling,
        engine_kwargs={"kv_cache_memory_bytes": 1 << 30},
    ) as made:
        yield made


def test_generation_leaves_the_trainers_random_states_alone(generation):
    before = states()
    for seed in (None, 3):
        generation.generate(PROMPTS, Sampling(max_tokens=4, seed=seed), 2)
    assert states() == before


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def test_the_recorded_copy_under_cuda_graphs_and_after_level_2_sleep(generation, model, sink):
    sink.clear()
    for _ in range(4):  # walked, proven, then replayed
        randomize(model)
        generation.sync_weights()
        assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=24), 4)) < TOLERANCE
    spans = sink.named(semconv.WEIGHT_SYNC)
    assert [span.attributes[semconv.TRANSPORT] for span in spans] == ["recorded"] * 4
    assert spans[-1].attributes[semconv.PLAN_WAY] == "kernel", spans[-1].attributes

    generation.sleep(2)
    randomize(model)
    generation.wake_up()
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE
    assert sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.PLAN_WAY] == "kernel"

    model.to("cpu"), torch.cuda.empty_cache()  # as a trainer that makes room does
    model.to("cuda")
    randomize(model)
    generation.sync_weights()
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE

    model.to("cpu")
    randomize(model)
    generation.sync_weights()  # from the host
    model.to("cuda")
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE


def test_weights_that_come_asleep_are_looked_at_when_it_wakes(generation, model, sink, monkeypatch):
    def asleep(source) -> list[str | None]:
        generation.sleep(2)
        generation.wake_up(["weights"])
        randomize(model)
        with monkeypatch.context() as patched:
            patched.setattr(generation, "source", source)
            generation.sync_weights()
        generation.wake_up(["kv_cache"])
        return [sink.named(kind)[-1].attributes.get(semconv.VERIFY) for kind in (semconv.WEIGHT_SYNC, semconv.WAKE_UP)]

    source = generation.source

    class Wrong(ModuleSource):
        """One layer is not the trainer's."""

        def __iter__(self):
            for name, tensor in super().__iter__():
                yield name, tensor * 3 if "layers.1.mlp" in name else tensor

    generation.engine._verified = False
    assert asleep(source) == ["deferred", "logprobs"]
    assert sink.named(semconv.SYNC_VERIFY)[-1].parent is sink.named(semconv.WAKE_UP)[-1]
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=24))) < TOLERANCE
    generation.engine._verified = False
    with pytest.raises(WeightSyncError, match="log-probabilities"):
        asleep(Wrong(model))
    assert generation.state is EngineState.FAILED
    generation.sync_weights()  # awake by now
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_the_first_token_after_waking_is_right(generation, model, level):
    before = torch.cuda.mem_get_info()[0]
    slept = generation.sleep(level)
    assert slept.memory_freed
    assert slept.device_bytes > 1 << 30
    assert torch.cuda.mem_get_info()[0] - before == pytest.approx(slept.device_bytes, rel=0.05)
    woke = generation.wake_up()
    assert generation.state is EngineState.AWAKE
    assert woke.device_bytes == pytest.approx(slept.device_bytes, rel=0.05)
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_told_by_tag_and_cycles_leak_nothing(generation, sink, level):
    sink.clear()
    for _ in range(3):
        slept = generation.sleep(level)
        assert {"weights", "kv_cache"} <= set(slept.expected)
        assert slept.device_bytes == pytest.approx(sum(slept.expected.values()), rel=0.05)
        for tag in ("weights", "kv_cache"):
            woke = generation.wake_up([tag])
            assert woke.taken[tag] == woke.device_bytes
            assert woke.device_bytes == pytest.approx(sum(woke.expected.values()), rel=0.05, abs=64 << 20)
        generation.generate(PROMPTS, Sampling(max_tokens=4))
    assert max(span.attributes[semconv.LEAKED] for span in sink.named(semconv.SLEEP)) < 64 << 20


def test_waking_in_two_steps_around_a_sync(generation, model):
    generation.sleep(2)
    generation.wake_up(["weights"])
    randomize(model)
    generation.sync_weights()
    generation.wake_up(["kv_cache"])
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE


def test_the_trainers_random_numbers_are_its_own(generation):
    torch.manual_seed(5)
    first = generation.generate([[1, 2, 3]], Sampling(max_tokens=16, ignore_eos=True))
    after = torch.rand(1, device="cuda"), torch.rand(1)
    torch.manual_seed(5)
    second = generation.generate([[1, 2, 3]], Sampling(max_tokens=16, ignore_eos=True))
    assert (torch.rand(1, device="cuda"), torch.rand(1)) == after
    assert first[0].token_ids != second[0].token_ids


def test_device_time_and_memory_are_on_record(generation, sink):
    generation.sync_weights()
    torch.cuda.synchronize()
    generation.sync_weights()
    timed = [m for m in sink.measurements if m.instrument is semconv.DEVICE_TIME]
    assert timed
    assert all(0 < value < 60 for measurement in timed for value in measurement.values)
    sync = sink.named(semconv.WEIGHT_SYNC)[-1]
    assert sync.attributes[semconv.DEVICE_USED] > 1 << 30
    assert sync.attributes[semconv.ALLOCATED] > 0


def test_a_sync_that_fails_is_brought_back(generation, model, monkeypatch):
    class Broken(Source):
        def __iter__(self):
            for name, parameter in model.named_parameters():
                yield name, parameter[:-1] if name.endswith("k_proj.weight") else parameter.detach()

    with monkeypatch.context() as patch:
        patch.setattr(generation, "source", Broken())
        with pytest.raises(Exception, match="k_proj"):
            generation.sync_weights()
    assert generation.state is EngineState.FAILED
    randomize(model)
    generation.sync_weights()
    assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE
