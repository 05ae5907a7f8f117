"""One call that all ranks make together, where the leader (rank 0) has the engine.

A call is a sequence of messages between the leader and each other rank:

    ask (others -> leader)      the rank's prompts and terms
    begun (leader -> others)    all ranks are there; the leader's trace context
    alive, pass, probe          from the leader while it works: a sign of life, and what the others must take part in
    done, data                  from the leader: the work is finished; the result, which ends the call
    error (either way)          what was raised; every rank raises it
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..completion_codec import pack, unpack
from ..errors import EngineStateError, RankError
from ..profiling import ProfilingContext, semconv
from ..profiling.propagation import unpack as unpack_carrier
from ..profiling.span_model import Link as SpanLink
from ..types import Completion
from .rank_consensus import pack_error, unpack_error
from .rank_messages import Message, comparable, decode, encode, pack_prompts, unpack_prompts
from .rank_sockets import RankConnection, named, ready
from .ranks import RankPrompt, first_refusal

_GRACE = 5.0
"""Seconds that the others wait beyond the leader's own deadline, for the leader's error."""
_VERDICT_SECONDS = 5.0
"""How long a rank whose source failed waits for the leader to say whether another rank failed first."""
_ALIVE_SECONDS = 1.0
"""The leader tells at most once in so many seconds that it is at work."""


class Channel:
    """A rank's connections, over which one call at a time is made."""

    def __init__(
        self, index: int, connections: dict[int, RankConnection], timeout: float, profiling: ProfilingContext
    ) -> None:
        self.index, self.connections, self.timeout, self.profiling = index, connections, timeout, profiling
        self._lock, self._owner, self._number = threading.Lock(), 0, 0

    @contextmanager
    def taken(self, name: str) -> Generator[CollectiveCall]:
        """The next call, once the one before it has ended.

        Raises `EngineStateError` where that one is made by this same thread.
        """
        if self._owner == threading.get_ident():
            raise EngineStateError(name, "at work in this thread", "wait for that call to return")
        with self._lock:
            self._owner, self._number = threading.get_ident(), self._number + 1
            try:
                call = CollectiveCall(self, name, self._number)
                call.alive()
                yield call
            finally:
                self._owner = 0


class CollectiveCall:
    """One call of all ranks, in which they go through the same methods. It is the `ErrorExchange` of its ranks.

    Calls are numbered, and a message of an earlier call is ignored.
    """

    def __init__(self, channel: Channel, name: str, number: int) -> None:
        self.index, self.leading, self.name, self._number = channel.index, channel.index == 0, name, number
        self._connections, self._timeout, self._profiling = channel.connections, channel.timeout, channel.profiling
        self._settled = False
        """Whether the other ranks need not hear of an error: the call has ended, or they know of one."""
        self._pause = min(_ALIVE_SECONDS, channel.timeout / 4)
        self._signed = self._checked = 0.0
        self._early = deque[tuple[Message, int]]()
        self.refused: Exception | None = None

    def report(self, error: BaseException) -> None:
        """Tell the error to the leader, or as the leader to all others."""
        if not self._settled:
            self._settled = True
            self.tell("error", error=pack_error(error, self.index), at=time.time())

    def confirm(self) -> None:
        """Nothing to say: the leader's `data` has ended the call."""

    def gather(self, prompts: Sequence[RankPrompt], terms: Mapping[str, Any]) -> list[RankPrompt]:
        """All ranks' prompts on the leader, none elsewhere. The other ranks' open spans are linked to the leader's.

        Raises `ValueError` where another rank's `terms` differ, `RankError` where a rank does not come in time.
        """
        own_terms, outer, profiling = comparable(terms), self._profiling.current_span(), self._profiling
        with profiling.span(semconv.RANKS_GATHER) as span:
            if not self.leading:
                sent = self._send(0, Message("ask", 0, 0, {"terms": own_terms}, pack_prompts(prompts)))
                begun, _ = self.wait("begun")
                with _understood(0):
                    leaders = unpack_carrier(begun.data["carrier"])
                if outer is not None and leaders is not None:
                    outer.link(SpanLink(leaders.trace_id, leaders.span_id))
                span.set({semconv.RANKS_BYTES: sent})
                return []
            asks = self._asks()
            span.set({semconv.RANKS_BYTES: sum(size for _, size in asks)})
            everything = [*prompts]
            for message, _ in asks:
                with _understood(message.rank):
                    terms_of_rank = message.data["terms"]
                    different = sorted(name for name in own_terms if own_terms[name] != terms_of_rank.get(name))
                    everything += unpack_prompts(message)
                if different:
                    names = ", ".join(different)
                    raise ValueError(f"rank {message.rank} called {self.name} with another {names} than rank 0")
            self.tell("begun", carrier=profiling.carrier(outer))
        return everything

    def lead(self, sample: Callable[[], list[Completion]]) -> list[Completion]:
        """`sample()` on the leader; the others wait until it is finished."""
        if not self.leading:
            self.wait("done")
            return []
        sampled = sample()
        self.tell("done")
        return sampled

    def share(self, function: Callable[[], Any]) -> Any:
        """What `function()` returns on the leader, as plain data, on every rank. It ends the call."""
        if not self.leading:
            message, _ = self.wait("data")
            with _understood(0):
                return message.data["result"]
        result = function()
        self._settled = True
        self.tell("data", result=result)
        return result

    def scatter(self, sampled: list[Completion]) -> list[Completion]:
        """Send each rank its own completions and nothing else. It ends the call.

        Timestamps become those of the receiver's monotonic clock: both sides know what theirs lacks to the wall clock.
        """
        clock_ns = time.time_ns() - time.monotonic_ns()
        with self._profiling.span(semconv.RANKS_SCATTER) as span:
            if not self.leading:
                message, size = self.wait("data")
                span.set({semconv.RANKS_BYTES: size})
                with _understood(0):
                    shift_ns = message.data["clock_ns"] - clock_ns
                    self.refused = None if (refused := message.data["refused"]) is None else unpack_error(refused)
                    return [unpack(packed, shift_ns=shift_ns) for packed in message.completions]
            shares: dict[int, list[Completion]] = {rank: [] for rank in (0, *self._connections)}
            for completion in sampled:
                shares[completion.rank].append(completion)
            self.refused = refused = first_refusal(sampled)
            data = {"clock_ns": clock_ns, "refused": None if refused is None else pack_error(refused, 0)}
            self._settled, sent, lost = True, 0, list[RankError]()
            for rank in self._connections:
                try:
                    sent += self._send(rank, Message("data", 0, 0, data, [], list(map(pack, shares[rank]))))
                except RankError as error:
                    lost.append(error)  # the other ranks still get theirs
            span.set({semconv.RANKS_BYTES: sent})
            if lost:
                raise lost[0]
            return shares[0]

    def alive(self) -> None:
        """On the leader: tell the other ranks that it is at work, unless it has just done so."""
        if self.leading and time.monotonic() - self._signed > self._pause:
            self._signed = time.monotonic()
            self.tell("alive")

    def check(self) -> None:
        """For a rank that works without waiting for messages: `alive`, and now and then `raise_reported`."""
        self.alive()
        if time.monotonic() - self._checked > self._pause:
            self._checked = time.monotonic()
            self.raise_reported()

    def raise_reported(self) -> None:
        """Raise the first error that another rank has reported so far: later ones are its consequences."""
        connections, reports, gone = dict(self._connections), list[Message](), list[RankError]()
        while ranks := ready(connections, 0):
            rank = ranks[0]
            try:
                message, size = self._read(rank)
            except RankError as error:
                gone.append(error)
                del connections[rank]
                continue
            if message is not None and message.kind == "error":
                reports.append(message)
                del connections[rank]
            elif message is not None:
                self._early.append((message, size))
        if reports:
            self._raise(min(reports, key=_reported_at))
        # A leader that closes right after it has sent the result is not missed.
        if gone and not any(message.kind == "data" for message, _ in self._early):
            raise gone[0]

    def verdict(self, error: Exception) -> Exception:
        """Report `error` to the leader; returns the error to raise, which may be another rank's that came first."""
        self.report(error)
        try:
            self.wait(seconds=_VERDICT_SECONDS)
        except (RankError, OSError):
            return error
        except Exception as leaders:
            return leaders
        return error

    def wait(self, *expected: str, seconds: float | None = None) -> tuple[Message, int]:
        """The leader's next message of an expected kind, and its size in bytes. Raises what the leader reported.

        Raises `RankError` where the leader has sent nothing for `seconds`.
        """
        seconds = self._timeout + _GRACE if seconds is None else seconds
        deadline, silent = time.monotonic() + seconds, "did not come to"
        while (left := deadline - time.monotonic()) > 0:
            if self._early:
                message, size = self._early.popleft()
            elif ready(self._connections, left):
                message, size = self._receive(0)
            else:
                continue
            if message is not None and message.kind in expected:
                self._settled = self._settled or message.kind == "data"
                return message, size
            if message is not None:
                deadline, silent = time.monotonic() + seconds, "has been silent in"
        raise RankError(f"rank 0 {silent} {self.name} for {seconds:g} s", rank=0)

    def tell(self, kind: str, **data: Any) -> None:
        """Send a message to all other ranks. One that cannot be reached is missed at the next `gather`."""
        for rank in self._connections:
            with suppress(RankError):
                self._send(rank, Message(kind, 0, 0, data))

    def _asks(self) -> list[tuple[Message, int]]:
        """The other ranks' `ask` messages and their sizes, in rank order."""
        asks: dict[int, tuple[Message, int]] = {}
        deadline = time.monotonic() + self._timeout
        while missing := {rank: each for rank, each in self._connections.items() if rank not in asks}:
            self.alive()
            left = deadline - time.monotonic()
            if left <= 0:
                ranks = named(sorted(missing))
                raise RankError(f"{ranks} did not come to {self.name} within {self._timeout:g} s", rank=min(missing))
            for rank in ready(missing, min(left, _ALIVE_SECONDS)):
                message, size = self._receive(rank)
                if message is not None:
                    asks[rank] = message, size
        self.raise_reported()  # a rank that asked long ago may have given up
        return [ask for _, ask in sorted(asks.items())]

    def _receive(self, rank: int) -> tuple[Message | None, int]:
        """As `_read`, but raises the error that the message reports."""
        message, size = self._read(rank)
        if message is not None and message.kind == "error":
            self._raise(message)
        return message, size

    def _raise(self, message: Message) -> NoReturn:
        self._settled = not self.leading  # the leader itself must pass it on to the other ranks
        with _understood(message.rank):
            error = unpack_error(message.data["error"])
        raise error

    def _read(self, rank: int) -> tuple[Message | None, int]:
        """The next message of `rank` and its size; None for a message of an earlier call."""
        try:
            content, size = self._connections[rank].receive(self._timeout)
        except OSError as error:
            raise RankError(f"rank {rank} is gone: its connection ended in {self.name}", rank=rank) from error
        with _understood(rank):
            message = decode(content)
            message.rank = rank  # whatever it says of itself
        return (message if message.call == self._number else None), size

    def _send(self, rank: int, message: Message) -> int:
        """Send `message` under this call's and this rank's number; returns its size in bytes."""
        message.call, message.rank = self._number, self.index
        try:
            return self._connections[rank].send(encode(message), self._timeout)
        except OSError as error:
            raise RankError(f"rank {rank} is gone: its connection ended in {self.name}", rank=rank) from error


def _reported_at(message: Message) -> float:
    with _understood(message.rank):
        return float(message.data["at"])


@contextmanager
def _understood(rank: int) -> Generator[None]:
    """A block that reads a message of `rank`. Raises `RankError` for one that no rank of this version sends."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        problem = f"rank {rank} sent what cannot be read here ({type(error).__name__}): do all ranks run the same vgen?"
        raise RankError(problem, rank=rank) from error
