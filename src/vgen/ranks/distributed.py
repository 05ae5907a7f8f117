"""Ranks of which one, the leader, has the engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from ..profiling import ProfilingContext
from .base import SingleRank
from .call import Channel, DistributedCall
from .links import meet

_CHANNELS = ("generate", "sync_weights", "")
"""Calls that may be under way at the same time, each with connections of its own; the last is for all others."""


def ranks_of(
    accelerator: Any, *, timeout: float = 600.0, group_port: int = 0, profiling: ProfilingContext
) -> SingleRank | DistributedRanks:
    """The ranks of `accelerator`, or those of torch.distributed where that is initialized, or this process alone."""
    import torch.distributed as dist

    initialized = dist.is_available() and dist.is_initialized()
    if accelerator is not None:
        index, size = accelerator.process_index, accelerator.num_processes
    else:
        index, size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
    if size == 1:
        return SingleRank()
    if not initialized:
        raise ValueError(f"{size} ranks without torch.distributed: initialize its process group first")
    return DistributedRanks(index, size, timeout=timeout, group_port=group_port, profiling=profiling)


class DistributedRanks:
    """All ranks of the trainer's default process group; rank 0 is the leader and has the engine.

    What ranks tell each other goes over connections of vgen's own (`links`): a call that a rank does not come to, or
    in which one fails, raises on every rank within `timeout` seconds, or a little more where it is the leader that is
    silent. All ranks construct it together, in the process group, whose own timeout applies until they have met.
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
        self.index, self.size, self.timeout, self.leading = index, size, timeout, index == 0
        self.profiling = profiling
        met = meet(index, size, len(_CHANNELS), group_port, timeout)
        self._channels = {name: Channel(links) for name, links in zip(_CHANNELS, met, strict=True)}
        # In a forked child, a data loader's, it would keep connections open that their owner's death has to close.
        os.register_at_fork(after_in_child=_close_in_child(weakref.ref(self)))

    def call(self, name: str) -> DistributedCall:
        """A call that begins on every rank; those of the same name, or of none of its own channel, one at a time."""
        return DistributedCall(self, self._channels.get(name) or self._channels[""], name)

    def lead(self, name: str, work: Callable[[], Any], **terms: Any) -> Any:
        """What `work()` returns or raises on the leader, on every rank. It must be of JSON's types."""
        with self.call(name) as call:
            call.gather((), terms)
            return call.share(work)

    def close(self) -> None:
        """Close the connections. What has been sent arrives all the same."""
        for channel in self._channels.values():
            for link in channel.links.values():
                link.close()


def _close_in_child(reference: weakref.ref[DistributedRanks]) -> Callable[[], None]:
    def close() -> None:
        if (ranks := reference()) is not None:
            ranks.close()

    return close
