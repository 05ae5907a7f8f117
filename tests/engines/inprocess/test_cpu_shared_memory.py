"""Each job's shared memory has names of its own, and none after the start."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vgen.distributed.rank_consensus import RankGroup
from vgen.engines.inprocess import cpu_shared_memory
from vgen.engines.inprocess.cpu_shared_memory import names_for, own_names


class Distributed:
    @staticmethod
    def make_group_name(communicator: Any) -> str:
        return f"//-{communicator.unique_name}-[0-1]-cpushm"


class Pair(RankGroup):
    """Two ranks that are told what the first says."""

    size, said = 2, "job-of-rank-0"

    def __init__(self) -> None:
        super().__init__(alone=True)
        self.size = 2

    def gather(self, value: Any) -> list[Any]:
        return [self.said, value]


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    package: Any = ModuleType("vllm.distributed.device_communicators")
    package.cpu_communicator = SimpleNamespace(_CPUSHMDistributed=Distributed)
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(cpu_shared_memory, "DIRECTORY", tmp_path)
    return tmp_path


TP = SimpleNamespace(unique_name="tp:0")


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_agree_on_names_that_are_theirs_and_leave_none(vllm, fails):
    (vllm / "-tp:0-[0-1]-cpushm_0").touch()  # of a run that crashed
    try:
        with own_names(Pair()):
            name = Distributed().make_group_name(TP)
            assert name == "vgen-job-of-rank-0--tp:0-[0-1]-cpushm"
            for rank in range(2):
                (vllm / f"{name}_{rank}").touch()
            if fails:
                raise RuntimeError("vLLM could not start")
    except RuntimeError:
        assert fails
    assert [path.name for path in vllm.iterdir()] == ["-tp:0-[0-1]-cpushm_0"]
    assert Distributed.make_group_name(TP) == "//-tp:0-[0-1]-cpushm"


@pytest.mark.parametrize(("device", "workers", "own"), [("cpu", 2, True), ("cpu", 1, False), ("cuda", 2, False)])
def test_only_several_workers_on_a_cpu_share_memory(vllm, device, workers, own):
    with names_for(device, workers, Pair):
        assert Distributed.make_group_name(TP).startswith("vgen-") is own


def test_two_jobs_on_a_machine_never_meet(vllm):
    names = set()
    for _ in range(2):
        with own_names(RankGroup(alone=True)):
            names.add(Distributed.make_group_name(TP))
    assert len(names) == 2
