"""Random generators of requests whose token is discarded are put back; those of others go on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from vgen.engines.cpu_seeds import keep_seeds


class Runner:
    """Draws a number for each request, and takes the generators of discarded ones back as vLLM does."""

    def __init__(self):
        generators = {row: torch.Generator().manual_seed(row) for row in range(3)}
        self.input_batch = SimpleNamespace(num_reqs=3, generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, False, True]))

    def _sample(self):
        generators = sorted(self.input_batch.generators.items())
        return [float(torch.rand((), generator=generator)) for _, generator in generators]

    def _bookkeeping_sync(self):
        for row in np.nonzero(self.discard_request_mask.np[:3])[0]:
            if (generator := self.input_batch.generators.get(int(row))) is not None:
                generator.set_offset(generator.get_offset() - 4)  # which a generator on a CPU does not have


def check(runner):
    first = runner._sample()
    runner._bookkeeping_sync()
    again = runner._sample()
    assert [a == b for a, b in zip(first, again, strict=True)] == [False, True, False]
    assert sorted(runner.input_batch.generators) == [0, 1, 2]


def test_a_runner():
    runner = Runner()
    keep_seeds(runner)
    check(runner)


def test_the_class_of_runners():
    class Mended(Runner):
        pass

    keep_seeds(Mended)
    check(Mended())


def test_a_class_and_its_runner_are_mended_once():
    class Mended(Runner):
        pass

    keep_seeds(Mended)
    runner = Mended()
    keep_seeds(runner)
    assert "_sample" not in vars(runner)
    check(runner)
