"""What a generation asks of the trainer ranks that generate together, and the two cases without a leader."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ..types import Completion
from .rank_consensus import RankGroup, fail_together, pack_error, unpack_error


@dataclass(frozen=True, slots=True)
class RankPrompt:
    """One prompt, and who asks for it."""

    prompt_index: int
    """Its place in the list that the caller on `rank` passed."""
    token_ids: list[int]
    images: Sequence[Any] = ()
    """`PIL.Image`s, one for each placeholder in the prompt."""
    rank: int = 0


class Call(Protocol):
    """One `generate` that all ranks make together: `gather`, `lead`, `scatter`, in this order.

    If a rank raises before it has gathered, all ranks raise.
    """

    refused: Exception | None
    """After `scatter`: why the engine refused a prompt of any rank, or None. `index` is the prompt's place there."""

    def gather(self, prompts: Sequence[RankPrompt], terms: Mapping[str, Any]) -> list[RankPrompt]:
        """The prompts that this rank's engine samples: of all ranks, in rank order; none on a rank without an engine.

        `terms` must be the same on all ranks: `ValueError` names those that differ.
        """
        ...

    def lead(self, sample: Callable[[], list[Completion]]) -> list[Completion]:
        """`sample()` on a rank with an engine. Another rank waits for it, or for its error, and returns nothing."""
        ...

    def alive(self) -> None:
        """Tell the ranks that wait that the work goes on."""
        ...

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        """The completions of this rank's own prompts, out of everything that was sampled."""
        ...


class Ranks(Protocol):
    """The ranks that generate together. All of them make the same calls."""

    index: int
    """This rank's number, which its completions carry as `Completion.rank`."""
    leading: bool
    """Whether this rank has an engine."""
    engine: int
    """The number of these ranks' engine, where the trainer's ranks have several."""

    def call(self, name: str) -> AbstractContextManager[Call]:
        """A call that begins on every rank."""
        ...


class SingleRank:
    """One rank with an engine to itself. It is its own `Call`."""

    index, leading = 0, True
    refused: Exception | None = None

    def __init__(self, engine: int = 0) -> None:
        self.engine = engine

    def call(self, name: str) -> AbstractContextManager[SingleRank]:
        return nullcontext(self)

    def gather(self, prompts: Sequence[RankPrompt], terms: Mapping[str, Any]) -> list[RankPrompt]:
        return list(prompts)

    def lead(self, sample: Callable[[], list[Completion]]) -> list[Completion]:
        return sample()

    def alive(self) -> None:
        pass

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        return sampled


class TensorParallelRanks:
    """The ranks of a torch process group that are the workers of one engine: each asks it for all ranks' prompts.

    They may have different numbers of prompts, or none. The process group's own timeout applies.
    """

    leading = True

    def __init__(self, group: RankGroup, engine: int = 0) -> None:
        self.index, self._group, self.engine = group.rank, group, engine

    @contextmanager
    def call(self, name: str) -> Generator[Call]:
        call = _TensorParallelCall(self._group)
        with fail_together(call):
            yield call


class _TensorParallelCall(SingleRank):
    """`gather` is where the ranks meet, so that errors are exchanged until then and never after."""

    def __init__(self, group: RankGroup) -> None:
        self._group, self._gathered = group, False

    def report(self, error: BaseException) -> None:
        if not self._gathered:
            self._group.report(error)

    def confirm(self) -> None:
        pass

    def gather(self, prompts: Sequence[RankPrompt], terms: Mapping[str, Any]) -> list[RankPrompt]:
        self._gathered = True
        return [prompt for of_rank in self._group.gather(list(prompts)) for prompt in of_rank]

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        self.refused = first_refusal(sampled)
        return [completion for completion in sampled if completion.rank == self._group.rank]


def first_refusal(completions: Iterable[Completion]) -> Exception | None:
    """Why the engine refused a prompt, with a note of the rank that asked: the first by rank and prompt, or None."""
    refused = min((c for c in completions if c.error is not None), key=lambda c: c.key, default=None)
    if refused is None or refused.error is None:
        return None
    return unpack_error(pack_error(refused.error, refused.rank))
