"""Which ranks there are: the accelerator's, torch.distributed's, or this process alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vgen import ProfilingContext
from vgen.ranks import SingleRank, ranks_of

pytest.importorskip("torch", reason="torch is not installed")


def accelerator(size: int) -> SimpleNamespace:
    return SimpleNamespace(process_index=0, num_processes=size)


@pytest.mark.parametrize("given", [None, accelerator(1)])
def test_one_process_is_alone(given):
    assert isinstance(ranks_of(given, profiling=ProfilingContext.disabled()), SingleRank)


def test_several_ranks_without_a_process_group_are_an_error():
    with pytest.raises(ValueError, match="2 ranks without torch"):
        ranks_of(accelerator(2), profiling=ProfilingContext.disabled())
