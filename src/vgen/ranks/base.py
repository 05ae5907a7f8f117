"""What a generation asks of the trainer ranks that generate together, and the two easy cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from ..errors import PromptError
from ..types import Completion

Asked: TypeAlias = "tuple[list[int], Sequence[Any]]"
"""A prompt's token ids and images."""


class Call(Protocol):
    """One `generate` that all ranks make together: `gather`, `lead`, `scatter`, in this order.

    What one rank raises before it has gathered is raised on every rank.
    """

    refused: PromptError | None
    """After `scatter`: why the engine has refused a prompt of another rank, with its place there."""

    def gather(self, asked: Sequence[Asked], terms: Mapping[str, Any]) -> tuple[list[Asked], int]:
        """The prompts that this rank's engine is to be asked for, and where this rank's own begin among them.

        A rank without an engine gets none. `terms` must be the same on all ranks: `ValueError` names what is not.
        """
        ...

    def lead(self, work: Callable[[], list[Completion]]) -> list[Completion]:
        """`work()` where there is an engine; elsewhere wait for it, or for what it raises, and return nothing."""
        ...

    def alive(self) -> None:
        """Tell those who wait that the work goes on."""
        ...

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        """Give each rank its own of what was sampled; returns what `Job.place` finds this rank's own in."""
        ...


class Ranks(Protocol):
    """The ranks that generate together. All of them make the same calls."""

    index: int
    leading: bool
    """Whether this rank has an engine."""

    def call(self, name: str) -> AbstractContextManager[Call]:
        """A call that begins on every rank."""
        ...


class SingleRank:
    """One rank with an engine of its own. It is its own `Call`."""

    index, leading = 0, True
    refused: PromptError | None = None

    def call(self, name: str) -> SingleRank:
        return self

    def __enter__(self) -> SingleRank:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def gather(self, asked: Sequence[Asked], terms: Mapping[str, Any]) -> tuple[list[Asked], int]:
        return list(asked), 0

    def lead(self, work: Callable[[], list[Completion]]) -> list[Completion]:
        return work()

    def alive(self) -> None:
        pass

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        return sampled


class GroupRanks:
    """The ranks of a torch process group that are one engine's workers: all of them ask it for everything.

    They may hold different numbers of prompts, or none. The process group's own timeout applies.
    """

    leading = True

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group, self._dist = group, dist
        self.index = dist.get_rank(group)

    def call(self, name: str) -> _GroupCall:
        return _GroupCall(self)

    def exchange(self, mine: Any) -> list[Any]:
        """Every rank's `mine`."""
        everyone: list[Any] = [None] * self._dist.get_world_size(self._group)
        self._dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


class _GroupCall(SingleRank):
    def __init__(self, ranks: GroupRanks) -> None:
        self._ranks, self._gathered = ranks, False

    def __enter__(self) -> _GroupCall:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not self._gathered:
            self._ranks.exchange(error)  # a rank that raised alone would leave the others waiting for it

    def gather(self, asked: Sequence[Asked], terms: Mapping[str, Any]) -> tuple[list[Asked], int]:
        self._gathered = True
        everyone = self._ranks.exchange(list(asked))
        for found in everyone:
            if isinstance(found, Exception):
                raise found
        return [item for found in everyone for item in found], sum(map(len, everyone[: self._ranks.index]))
