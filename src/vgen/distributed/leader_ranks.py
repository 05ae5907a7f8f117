"""Ranks of which one, the leader, has the engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from ..profiling import ProfilingContext
from .collective_call import Channel, CollectiveCall
from .rank_consensus import fail_together
from .rank_sockets import meet

_CHANNELS = ("generate", "sync_weights", "")
"""Calls that may run at the same time, each with connections of its own; the last one is for all other calls."""


class LeaderRanks:
    """All ranks of the trainer's default process group; rank 0 is the leader and has the engine.

    The ranks talk over vgen's own connections (`rank_sockets`). If a rank fails in a call or does not come to it, every
    rank raises within `timeout` seconds, or a little more where the leader is the silent one. All ranks construct it
    together, in the process group, whose own timeout applies until they are connected.
    """

    def __init__(
        self,
        index: int,
        size: int,
        *,
        timeout: float = 600.0,
        group_port: int = 0,
        profiling: ProfilingContext = ProfilingContext.disabled(),
    ) -> None:
        self.index, self.leading, self.engine = index, index == 0, 0
        connections = meet(index, size, len(_CHANNELS), group_port, timeout)
        self._channels = {
            name: Channel(index, by_rank, timeout, profiling)
            for name, by_rank in zip(_CHANNELS, connections, strict=True)
        }
        # A forked child, such as a data loader's, would keep connections open that must close when their owner dies.
        os.register_at_fork(after_in_child=_close_in_child(weakref.ref(self)))

    @contextmanager
    def call(self, name: str) -> Generator[CollectiveCall]:
        """A call that begins on every rank. Calls with the same channel run one at a time."""
        with self._channels.get(name, self._channels[""]).taken(name) as call, fail_together(call):
            yield call

    def lead(self, name: str, function: Callable[[], Any], **terms: Any) -> Any:
        """What `function()` returns or raises on the leader, on every rank. It must return plain data.

        Raises `ValueError` where `terms` differ between the ranks.
        """
        with self.call(name) as call:
            call.gather((), terms)
            return call.share(function)

    def close(self) -> None:
        """Close the connections. What has been sent arrives all the same."""
        for channel in self._channels.values():
            for connection in channel.connections.values():
                connection.close()


def _close_in_child(reference: weakref.ref[LeaderRanks]) -> Callable[[], None]:
    def close() -> None:
        if (ranks := reference()) is not None:
            ranks.close()

    return close
