"""One mechanism by which trainer ranks fail together: what raises on one rank raises on all of them.

`fail_together` is the mechanism. How ranks tell each other is an `ErrorExchange`: `RankGroup` uses a torch process
group, whose own timeout applies, and `collective_call.CollectiveCall` uses vgen's own connections, with deadlines.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from ..errors import RankError, VgenError, WeightSyncError, error_from_dict, error_to_dict


class ErrorExchange(Protocol):
    """How the ranks of one operation tell each other what failed."""

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that `error` was raised here."""
        ...

    def confirm(self) -> None:
        """Tell the other ranks that nothing was raised here; raise what another rank reported."""
        ...


@contextmanager
def fail_together(exchange: ErrorExchange, *, phase: str | None = None) -> Generator[None]:
    """Run the block as one operation of all ranks: if it raises on any rank, it raises on all.

    The rank where it failed raises its own error. The others raise an error of the same class and with the same
    fields, with a note that names the rank (`raised on rank 2`) and that rank in `raised_on`. Where the block is a
    `phase` of a weight sync, the others always raise `WeightSyncError`, whatever failed.
    """
    try:
        yield
    except BaseException as error:
        report = error
        if phase is not None and isinstance(error, Exception) and not isinstance(error, WeightSyncError):
            report = WeightSyncError(f"{type(error).__name__}: {error}", phase=phase)
        exchange.report(report)
        raise
    exchange.confirm()


def pack_error(error: BaseException, rank: int) -> dict[str, Any]:
    """`error` as plain data, with the rank that raised it first: `rank`, unless it came here from another."""
    return {**error_to_dict(error), "rank": getattr(error, "raised_on", rank)}


def unpack_error(data: Mapping[str, Any]) -> Exception:
    """The error that another rank packed. One whose class cannot travel becomes a `RankError`."""
    error, rank = error_from_dict(data), data["rank"]
    if type(error) is VgenError:
        error = RankError(f"rank {rank} raised {error}", rank=rank)
    error.raised_on = rank  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(f"raised on rank {rank}")
    return error


class RankGroup:
    """The ranks of a torch process group, as an `ErrorExchange`. All of them must make the same calls.

    Args:
        group: The process group; None for the default one.
        alone: True for a group of this process only, which exchanges nothing and needs no torch.distributed.
    """

    def __init__(self, group: Any = None, *, alone: bool = False) -> None:
        self.rank, self.size, self._group = 0, 1, group
        if not alone:
            import torch.distributed as dist

            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order. Raises the error that a rank reported instead of a value."""
        answers = self._exchange((value, None))
        for _, error in answers:
            if error is not None:
                raise unpack_error(error)
        return [answer for answer, _ in answers]

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return any(self.gather(value))

    def report(self, error: BaseException) -> None:
        """An interrupted rank (`KeyboardInterrupt`) leaves at once: it must not wait here for the others."""
        if isinstance(error, Exception):
            self._exchange((None, pack_error(error, self.rank)))

    def confirm(self) -> None:
        self.gather(None)

    def _exchange(self, answer: tuple[Any, dict[str, Any] | None]) -> list[tuple[Any, dict[str, Any] | None]]:
        if self.size == 1:
            return [answer]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, answer, group=self._group)
        return answers
