"""Ranks of which one, the leader, has the engine."""

from __future__ import annotations

import os
import threading
import time
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

from ..errors import EngineStateError, PromptError, RankError
from ..profiling import ProfilingContext, names
from ..profiling.carrier import unpack
from ..profiling.records import Link as SpanLink
from ..types import Completion
from . import wire
from .base import Asked, SingleRank
from .links import Link, meet, named, ready
from .wire import Message

_CHANNELS = ("generate", "sync_weights", "")
"""Calls that may be under way at the same time, each with connections of its own; the last is for all others."""
_GRACE = 5.0
"""Seconds that the others wait beyond the leader's own deadline, for its words."""
_SIGN_SECONDS = 1.0
"""How often the leader says, at most, that it is at work."""


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
        self._channels = {name: _Channel(links) for name, links in zip(_CHANNELS, met, strict=True)}
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


class _Channel:
    """Connections on which one call at a time is made."""

    def __init__(self, links: dict[int, Link]) -> None:
        self.links, self.lock, self.owner, self.number = links, threading.Lock(), 0, 0


class DistributedCall:
    """One call of all ranks, in which they go through the same methods. Calls are numbered: late words are passed over.

    On the leader, leaving it by an error tells that to all others; on another rank, to the leader.
    """

    def __init__(self, ranks: DistributedRanks, channel: _Channel, name: str) -> None:
        self.index, self.leading, self.name = ranks.index, ranks.leading, name
        self._ranks, self._channel, self._links = ranks, channel, channel.links
        self._timeout, self._number, self._over = ranks.timeout, 0, False
        self._pause = min(_SIGN_SECONDS, ranks.timeout / 4)
        self._counts: list[int] = []
        self._signed = self._checked = 0.0
        self.refused: PromptError | None = None
        self._early = deque[tuple[Message, int]]()

    def __enter__(self) -> Self:
        channel, here = self._channel, threading.get_ident()
        if channel.owner == here:
            raise EngineStateError(self.name, "at work in this thread", "wait for that call to return")
        channel.lock.acquire()
        channel.owner, channel.number = here, channel.number + 1
        self._number = channel.number
        self.alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None and not self._over:
                self.tell("error", error=wire.pack_error(error))
        finally:
            self._channel.owner = 0
            self._channel.lock.release()

    def gather(self, asked: Sequence[Asked], terms: Mapping[str, Any]) -> tuple[list[Asked], int]:
        """All ranks' prompts on the leader, none elsewhere; the open span is linked with the leader's."""
        own, outer, profiling = wire.terms(terms), self._ranks.profiling.current_span(), self._ranks.profiling
        with profiling.span(names.RANKS_GATHER) as span:
            if not self.leading:
                message = wire.pack_prompts(asked)
                sent = self._send(0, "ask", message, terms=own)
                leaders = unpack(self.wait("begun")[0].words["carrier"])
                if outer is not None and leaders is not None:
                    outer.link(SpanLink(leaders.trace_id, leaders.span_id))
                span.set({names.RANKS_BYTES: sent})
                return [], 0
            asks = self._everyone()
            span.set({names.RANKS_BYTES: sum(size for _, size in asks.values())})
            for rank, (message, _) in sorted(asks.items()):
                if other := sorted(name for name in own if own[name] != message.words["terms"].get(name)):
                    raise ValueError(f"rank {rank} called {self.name} with another {', '.join(other)} than rank 0")
            self.tell("begun", carrier=profiling.carrier(outer))
        everyone = [list(asked), *(wire.unpack_prompts(message) for _, (message, _) in sorted(asks.items()))]
        self._counts = [len(prompts) for prompts in everyone]
        return [prompt for prompts in everyone for prompt in prompts], 0

    def lead(self, work: Callable[[], list[Completion]]) -> list[Completion]:
        """`work()` on the leader; the others wait until it is done."""
        if not self.leading:
            self.wait("done")
            return []
        result = work()
        self.tell("done")
        return result

    def share(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns on the leader, of JSON's types, on every rank; ends the call."""
        if not self.leading:
            return self.wait("data")[0].words["result"]
        result = work()
        self._over = True
        self.tell("data", result=result)
        return result

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        """Send each rank its own completions and nothing else; ends the call."""
        clock_ns = time.time_ns() - time.monotonic_ns()
        with self._ranks.profiling.span(names.RANKS_SCATTER) as span:
            if not self.leading:
                message, size = self.wait("data")
                span.set({names.RANKS_BYTES: size})
                self.refused = _refused(message.words["refused"])
                return wire.unpack_completions(message, clock_ns)
            starts = [0, *accumulate(self._counts)]
            parts: list[list[Completion]] = [[] for _ in self._counts]
            for completion in sampled:
                parts[bisect_right(starts, completion.prompt_index, hi=len(parts)) - 1].append(completion)
            parts[1:] = [wire.shifted(part, start) for part, start in zip(parts[1:], starts[1:-1], strict=True)]
            bad = ((rank, c.error) for rank, part in enumerate(parts) for c in part if c.error is not None)
            refused = next(([rank, e.index, e.problem, e.limit] for rank, e in bad), None)
            self.refused = _refused(refused)
            self._over, sent, lost = True, 0, list[RankError]()
            for rank in self._links:
                message = wire.pack_completions(parts[rank], clock_ns)
                try:
                    sent += self._send(rank, "data", message, refused=refused)
                except RankError as error:
                    lost.append(error)  # the others' are on their way all the same
            span.set({names.RANKS_BYTES: sent})
            if lost:
                raise lost[0]
            return parts[0]

    def alive(self) -> None:
        """On the leader: tell the others, now and then, that they do not wait for nothing."""
        if self.leading and time.monotonic() - self._signed > self._pause:
            self._signed = time.monotonic()
            self.tell("alive")

    def check(self) -> None:
        """For whoever works without waiting: `alive`, and, now and then, `heard`."""
        self.alive()
        if time.monotonic() - self._checked > self._pause:
            self._checked = time.monotonic()
            self.heard()

    def heard(self) -> None:
        """Raise what another rank has raised within this call and told by now."""
        while found := ready(self._links, 0):
            message, size = self._receive(found[0])
            if message is not None:
                self._early.append((message, size))

    def wait(self, *expected: str) -> tuple[Message, int]:
        """The leader's next message of an expected kind, and its bytes; what the leader has raised is raised."""
        seconds = self._timeout + _GRACE
        deadline, silent = time.monotonic() + seconds, "did not come to"
        while (left := deadline - time.monotonic()) > 0:
            if self._early:
                message, size = self._early.popleft()
            elif ready(self._links, left):
                message, size = self._receive(0)
            else:
                continue
            if message is not None and message.words["is"] in expected:
                self._over = message.words["is"] == "data"
                return message, size
            if message is not None:
                deadline, silent = time.monotonic() + seconds, "has been silent in"
        raise RankError(f"rank 0 {silent} {self.name} for {seconds:g} s", rank=0)

    def tell(self, what: str, **words: Any) -> None:
        """To all other ranks that can be reached: who cannot is missed at the next `gather`."""
        for rank in self._links:
            try:
                self._send(rank, what, **words)
            except RankError:
                continue

    def _everyone(self) -> dict[int, tuple[Message, int]]:
        asks: dict[int, tuple[Message, int]] = {}
        deadline = time.monotonic() + self._timeout
        while missing := {rank: link for rank, link in self._links.items() if rank not in asks}:
            self.alive()
            left = deadline - time.monotonic()
            if left <= 0:
                who = named(sorted(missing))
                raise RankError(f"{who} did not come to {self.name} within {self._timeout:g} s", rank=min(missing))
            for rank in ready(missing, min(left, _SIGN_SECONDS)):
                message, size = self._receive(rank)
                if message is not None:
                    asks[rank] = message, size
        return asks

    def _receive(self, rank: int) -> tuple[Message | None, int]:
        """The next message of `rank`; None for one of an earlier call. What it raised is raised."""
        try:
            message, size = self._links[rank].receive(self._timeout)
        except OSError as error:
            raise RankError(f"rank {rank} is gone: its connection ended in {self.name}", rank=rank) from error
        if message.words["call"] != self._number:
            return None, size
        if message.words["is"] == "error":
            self._over = not self.leading
            raise wire.unpack_error(message.words["error"], message.words["rank"])
        return message, size

    def _send(self, rank: int, what: str, message: Message | None = None, **words: Any) -> int:
        own = {"is": what, "call": self._number, "rank": self.index, **words}
        whole = Message({**message.words, **own}, message.numbers) if message is not None else Message(own)
        try:
            return self._links[rank].send(whole, self._timeout)
        except OSError as error:
            raise RankError(f"rank {rank} is gone: its connection ended in {self.name}", rank=rank) from error


def _refused(found: list[Any] | None) -> PromptError | None:
    if found is None:
        return None
    rank, index, problem, limit = found
    error = PromptError(index, problem, limit)
    error.add_note(f"raised on rank {rank}")
    return error
