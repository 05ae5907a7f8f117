"""Several trainer ranks in front of one engine: gather the prompts, keep one's own completions."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """The ranks that share an engine."""

    index: int

    def gather(self, mine: list[Any]) -> tuple[list[Any], int]:
        """All ranks' items in rank order, and where this rank's own begin."""
        ...


class SingleRank:
    """An engine of one's own."""

    index = 0

    def gather(self, mine: list[Any]) -> tuple[list[Any], int]:
        return mine, 0


class GroupRanks:
    """The ranks of a torch process group. They may hold different numbers of items, or none."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group, self._dist = group, dist
        self.index = dist.get_rank(group)

    def gather(self, mine: list[Any]) -> tuple[list[Any], int]:
        everyone: list[list[Any]] = [[] for _ in range(self._dist.get_world_size(self._group))]
        self._dist.all_gather_object(everyone, mine, group=self._group)
        return [item for rank in everyone for item in rank], sum(len(rank) for rank in everyone[: self.index])
