"""The kernel that moves weights, on a CUDA device."""

from __future__ import annotations

import torch


def test_the_kernel_moves_every_byte():
    from vgen.weights.load.batched_copy import BatchedCopy
    from vgen.weights.verification.bit_check import Differences

    values = [torch.randn(size, device="cuda") for size in (1, 3, 1000, 1 << 20, (1 << 22) + 5)]
    values += [torch.randn(512, 512, device="cuda")[:, 256:], torch.randn(7, 3, device="cuda").t()]
    places = [torch.zeros(value.shape, device="cuda") for value in values]
    places += [torch.zeros(values[3].shape, device="cuda", dtype=torch.bfloat16)]
    pairs = list(zip(places, [*values, values[3]], strict=True))
    batched = BatchedCopy(pairs)
    for _ in range(2):
        for value in values:
            value.normal_()
        batched.run()
        differences = Differences()
        for index, pair in enumerate(pairs):
            differences.compare(str(index), *pair)
        assert differences.names() == ()


def test_what_no_loader_writes_comes_back_from_the_device_and_from_the_host():
    from vgen.weights.load.unloaded_tensors import SMALL_BYTES, UnloadedTensors

    small, large = torch.randn(7, device="cuda"), torch.randn(SMALL_BYTES, device="cuda")
    host = torch.ones(3)
    before, unloaded = [small.clone(), large.clone()], UnloadedTensors([small, host, large])
    assert [content.device.type for _, content in unloaded] == ["cuda", "cpu", "cpu"]
    small.zero_(), large.zero_(), host.zero_()
    unloaded.restore()
    assert torch.equal(small, before[0])
    assert torch.equal(large, before[1])
    assert not host.any()  # a sleep has discarded nothing there
