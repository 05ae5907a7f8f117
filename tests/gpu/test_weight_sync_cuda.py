"""The kernel that moves weights, on a CUDA device."""

from __future__ import annotations

import torch


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


def test_what_no_loader_writes_comes_back_from_the_device_and_from_the_host():
    from vgen.weights.kept import SMALL, Kept

    small, large = torch.randn(7, device="cuda"), torch.randn(SMALL, device="cuda")
    host = torch.ones(3)
    before, kept = [small.clone(), large.clone()], Kept([small, host, large])
    assert [content.device.type for _, content in kept] == ["cuda", "cpu", "cpu"]
    small.zero_(), large.zero_(), host.zero_()
    kept.restore()
    assert torch.equal(small, before[0])
    assert torch.equal(large, before[1])
    assert not host.any()  # a sleep has discarded nothing there
