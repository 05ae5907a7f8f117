"""What ranks with engines in their own processes do together, in torch's default process group.

They all make the same calls. The process group's own timeout applies.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..errors import WeightSyncError


class Together:
    """The ranks of one sync. Where each is on its own, nothing is exchanged."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self._everyone(mine))

    @contextmanager
    def one_fate(self, phase: str) -> Generator[None]:
        """Around a part of a sync: what fails on one rank raises on every, once all have come to its end.

        What is interrupted leaves at once, without a word.
        """
        try:
            yield
        except Exception as error:
            self._everyone(_told(error, phase))
            raise
        for rank, said in enumerate(self._everyone(None)):
            if said is not None:
                text, phase, parameter, receiver = said
                raise WeightSyncError(text, phase=phase, parameter=parameter, receiver=f"{receiver} of rank {rank}")

    def _everyone(self, mine: Any) -> list[Any]:
        if self._alone:
            return [mine]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found


def _told(error: Exception, phase: str) -> tuple[str, str, str | None, str]:
    """Problem, phase, parameter and receiver, as plain data: another rank may not have the error's class."""
    if isinstance(error, WeightSyncError):
        return error.problem, error.phase, error.parameter, error.receiver
    return f"{type(error).__name__}: {error}", phase, None, "engine"
