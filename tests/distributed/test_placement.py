"""Which ranks there are: the accelerator's, torch.distributed's, or this process alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vgen import ProfilingContext
from vgen.distributed.placement import Placement, all_ranks, initialized
from vgen.distributed.ranks import SingleRank, TensorParallelRanks

pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def process_group(tmp_path):
    """torch.distributed, initialized for this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def accelerator(size: int) -> SimpleNamespace:
    return SimpleNamespace(process_index=size - 1, num_processes=size)


@pytest.mark.parametrize("given", [None, accelerator(1)])
def test_one_process_is_alone(given):
    placement = Placement.of(given)
    assert placement == Placement(rank=0, size=1)
    assert isinstance(placement.leader_ranks(profiling=ProfilingContext.disabled()), SingleRank)
    assert isinstance(placement.tensor_parallel_ranks(1), SingleRank)
    assert all_ranks().size == 1


def test_an_accelerators_word_counts_more_than_torchs(process_group):
    assert Placement.of() == Placement(0, 1)
    assert Placement.of(accelerator(4)) == Placement(3, 4)


def test_several_ranks_without_a_process_group_are_an_error():
    with pytest.raises(ValueError, match="2 ranks without torch"):
        Placement.of(accelerator(2)).leader_ranks(profiling=ProfilingContext.disabled())


def test_engines_must_divide_the_ranks_evenly():
    Placement(rank=3, size=4).check(2)
    with pytest.raises(ValueError, match="tensor_parallel_size 3 must divide the 4 ranks evenly"):
        Placement(rank=3, size=4).check(3)


def test_ranks_with_an_engine_each_need_no_process_group():
    assert isinstance(Placement(rank=1, size=4).tensor_parallel_ranks(1), SingleRank)


def test_neighbours_are_one_engines_workers(process_group, monkeypatch):
    import torch.distributed as dist

    groups = []
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda ranks: (groups.append(ranks), (None, []))[1])
    assert isinstance(Placement(rank=1, size=4).tensor_parallel_ranks(2), TensorParallelRanks)
    assert groups == [[[0, 1], [2, 3]]]


def test_a_process_group_is_asked_for_this_process_number(process_group, monkeypatch):
    import torch.distributed as dist

    assert initialized() is True
    monkeypatch.setattr(dist, "get_rank", lambda *_: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    assert Placement.of() == Placement(2, 3)
    assert all_ranks().size == 3


def test_without_a_process_group_there_is_one_rank():
    assert initialized() is False
    assert Placement.of() == Placement(0, 1)
