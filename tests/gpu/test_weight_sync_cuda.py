"""The recorded copy on a CUDA device: under CUDA graphs, after a level-2 sleep.

Without pytest: `python tests/gpu/test_weight_sync_cuda.py`.
"""

from __future__ import annotations

import tempfile

import torch

from vgen import ColocateGeneration, ProfilingContext, Sampling
from vgen.demo import max_logprob_difference
from vgen.profiling import names
from vgen.testing import MemorySink, tiny_model

PROMPTS = [[1, 2, 3], list(range(100)), [7] * 30]
TOLERANCE = 5e-3
"""In float32 vLLM's attention kernels multiply in TF32, which keeps ten bits of the mantissa."""


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def made(model: torch.nn.Module, sink: MemorySink) -> ColocateGeneration:
    settings = dict(enable_sleep_mode=True, gpu_memory_utilization=0.3, max_model_length=512)
    engine = {"kv_cache_memory_bytes": 1 << 28}
    return ColocateGeneration(model, profiling=ProfilingContext([sink]), engine_kwargs=engine, **settings)


def test_the_recorded_copy_under_cuda_graphs_and_after_level_2_sleep():
    sink = MemorySink()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder)[0].to("cuda")
        with made(model, sink) as generation:
            for _ in range(4):  # walked, proven, then replayed
                generation.generate(PROMPTS, Sampling(max_tokens=4))
                randomize(model)
                generation.sync_weights()
                assert (
                    max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=24), 4)) < TOLERANCE
                )
            spans = sink.named(names.WEIGHT_SYNC)
            assert [span.attributes[names.TRANSPORT] for span in spans] == ["recorded"] * 4
            assert spans[0].attributes[names.VERIFY] == "logprobs"
            assert spans[-1].attributes[names.PLAN_WAY] == "kernel", spans[-1].attributes

            generation.sleep(2)
            randomize(model)
            generation.wake_up()
            assert max_logprob_difference(model, generation.generate(PROMPTS, Sampling(max_tokens=8))) < TOLERANCE
            assert sink.named(names.WEIGHT_SYNC)[-1].attributes[names.PLAN_WAY] == spans[-1].attributes[names.PLAN_WAY]

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


def test_the_kernel_moves_every_byte():
    from vgen.weights.mover import KernelMover
    from vgen.weights.verify import verify_bits

    values = [torch.randn(size, device="cuda") for size in (1, 3, 1000, 1 << 20, (1 << 22) + 5)]
    values += [torch.randn(512, 512, device="cuda")[:, 256:], torch.randn(7, 3, device="cuda").t()]
    places = [torch.zeros(value.shape, device="cuda") for value in values]
    places += [torch.zeros(values[3].shape, device="cuda", dtype=torch.bfloat16)]
    pairs = list(zip(places, [*values, values[3]], strict=True))
    mover = KernelMover(pairs)
    for _ in range(2):
        for value in values:
            value.normal_()
        mover.run()
        assert verify_bits((str(index), *pair) for index, pair in enumerate(pairs)) == ()


if __name__ == "__main__":
    test_the_kernel_moves_every_byte()
    test_the_recorded_copy_under_cuda_graphs_and_after_level_2_sleep()
    print("passed")
