"""One call that ranks with one engine among them make together."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ..errors import EngineStateError, PromptError, RankError
from ..profiling import names
from ..profiling.carrier import unpack
from ..profiling.records import Link as SpanLink
from ..types import Completion
from . import wire
from .base import Asked
from .links import Link, named, ready
from .wire import Message

if TYPE_CHECKING:
    from .distributed import DistributedRanks

_GRACE = 5.0
"""Seconds that the others wait beyond the leader's own deadline, for its words."""
_VERDICT_SECONDS = 5.0
"""How long a rank whose source has failed waits to be told whether another's failed first."""
_SIGN_SECONDS = 1.0
"""How often the leader says, at most, that it is at work."""


class Channel:
    """Connections on which one call at a time is made."""

    def __init__(self, links: dict[int, Link]) -> None:
        self.links, self.lock, self.owner, self.number = links, threading.Lock(), 0, 0


class DistributedCall:
    """One call of all ranks, in which they go through the same methods. Calls are numbered: late words are passed over.

    On the leader, leaving it by an error tells that to all others; on another rank, to the leader.
    """

    def __init__(self, ranks: DistributedRanks, channel: Channel, name: str) -> None:
        self.index, self.leading, self.name = ranks.index, ranks.leading, name
        self._ranks, self._channel, self._links = ranks, channel, channel.links
        self._timeout, self._number = ranks.timeout, 0
        self._over = self._told = False
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
            if error is not None and not self._over and not self._told:
                self.tell("error", error=wire.pack_error(error), at=time.time())
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
        """Raise what another rank has raised within this call and told by now; the first, for others follow from it."""
        links, told, gone = dict(self._links), list[Message](), list[RankError]()
        while found := ready(links, 0):
            rank = found[0]
            try:
                message, size = self._read(rank)
            except RankError as error:
                gone.append(error)
                del links[rank]
                continue
            if message is not None and message.words["is"] == "error":
                told.append(message)
                del links[rank]
            elif message is not None:
                self._early.append((message, size))
        if told:
            self._raise(min(told, key=lambda message: message.words["at"]))
        if gone:
            raise gone[0]

    def verdict(self, error: Exception) -> Exception:
        """What to raise after `error` on a rank without the engine: the leader's word, which knows what came first."""
        self._told = True
        self.tell("error", error=wire.pack_error(error), at=time.time())
        try:
            self.wait(seconds=_VERDICT_SECONDS)
        except (RankError, OSError):
            return error
        except Exception as leaders:
            return leaders
        return error

    def wait(self, *expected: str, seconds: float | None = None) -> tuple[Message, int]:
        """The leader's next message of an expected kind, and its bytes; what the leader has raised is raised."""
        seconds = self._timeout + _GRACE if seconds is None else seconds
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
        self.heard()  # one that asked long ago may have given up
        return asks

    def _receive(self, rank: int) -> tuple[Message | None, int]:
        """`_read`, but what that rank raised is raised."""
        message, size = self._read(rank)
        if message is not None and message.words["is"] == "error":
            self._raise(message)
        return message, size

    def _raise(self, message: Message) -> NoReturn:
        self._told = not self.leading  # the leader has told everyone
        raise wire.unpack_error(message.words["error"], message.words["rank"])

    def _read(self, rank: int) -> tuple[Message | None, int]:
        """The next message of `rank` and its bytes; None for one of an earlier call."""
        try:
            message, size = self._links[rank].receive(self._timeout)
        except OSError as error:
            raise RankError(f"rank {rank} is gone: its connection ended in {self.name}", rank=rank) from error
        return (message if message.words["call"] == self._number else None), size

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
