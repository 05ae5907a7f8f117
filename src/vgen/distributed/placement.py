"""Where this process stands among the trainer's ranks, and which ranks share an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..profiling import ProfilingContext
from .rank_consensus import RankGroup
from .ranks import Ranks, SingleRank, TensorParallelRanks

if TYPE_CHECKING:
    from .leader_ranks import LeaderRanks


@dataclass(frozen=True, slots=True)
class Placement:
    """This process's number among the trainer's ranks."""

    rank: int = 0
    size: int = 1
    """How many ranks there are."""

    @classmethod
    def of(cls, accelerator: Any = None) -> Placement:
        """As an `accelerate.Accelerator` says; without one as torch.distributed says; else one process alone."""
        if accelerator is not None:
            return cls(accelerator.process_index, accelerator.num_processes)
        import torch.distributed as dist

        return cls(dist.get_rank(), dist.get_world_size()) if initialized() else cls()

    def check(self, tensor_parallel_size: int) -> None:
        """Raise `ValueError` unless the ranks can be divided into engines of `tensor_parallel_size` workers."""
        if self.size % tensor_parallel_size:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size} must divide the {self.size} ranks evenly")

    def tensor_parallel_ranks(self, size: int) -> Ranks:
        """The ranks whose processes are the workers of this rank's engine: `size` neighbours, or this one alone.

        All ranks must call it together: torch makes a process group for each engine.
        """
        if size == 1:
            return SingleRank(self.rank)
        import torch.distributed as dist

        neighbours = [list(range(first, first + size)) for first in range(0, self.size, size)]
        group, _ = dist.new_subgroups_by_enumeration(neighbours)
        return TensorParallelRanks(RankGroup(group), self.rank // size)

    def leader_ranks(
        self, *, timeout: float = 600.0, group_port: int = 0, profiling: ProfilingContext
    ) -> SingleRank | LeaderRanks:
        """All ranks, of which rank 0 has the engine; this process alone where it is the only one.

        All ranks must call it together. Raises `ValueError` where torch.distributed is not initialized, and
        `RankError` where the ranks cannot connect.
        """
        if self.size == 1:
            return SingleRank()
        if not initialized():
            raise ValueError(f"{self.size} ranks without torch.distributed: initialize its process group first")
        from .leader_ranks import LeaderRanks  # it needs msgspec, which an engine in this process does without

        return LeaderRanks(self.rank, self.size, timeout=timeout, group_port=group_port, profiling=profiling)


def initialized() -> bool:
    """Whether torch.distributed has a default process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def all_ranks() -> RankGroup:
    """All ranks of torch.distributed's default process group, or this process alone where there is none."""
    return RankGroup(alone=not initialized())
