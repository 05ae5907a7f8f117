"""How one call's requests are spread over servers, and nothing of it is lost or done twice."""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field

from ..errors import EngineError, ServerError
from ..types import Completion
from . import batches, completions
from .base import Batch, Request, refused_by
from .peer import Peer, started_anew

CONCURRENCY = 1024
"""Calls that one server is given at a time, where each is for one completion."""
ATTEMPTS = 4
"""How often a request is sent in all before its error is the caller's. Only what was not answered is sent again."""
REFUSALS = (400, 413, 422)
"""What a server answers to a request that makes no sense to it."""
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True, eq=False)
class Work:
    """One `stream`: what is still to be sent, what has arrived."""

    batch: Batch
    timing: bool
    timeout: float
    waiting: deque[Request] = field(default_factory=deque[Request])
    arrived: queue.SimpleQueue[Completion | BaseException] = field(default_factory=queue.SimpleQueue)
    failed_at: defaultdict[tuple[int, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    """The servers that a request has been sent to in vain."""
    unanswered: int = 0
    workers: set[str] = field(default_factory=set[str])
    """The servers that are at work on this."""
    one_by_one: bool = False
    """A call for several was refused: each is sent by itself, so that one bad prompt does not lose the others."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.waiting.extend(self.batch.requests)
        self.unanswered = len(self.waiting)
        self.deadline = time.monotonic() + self.timeout

    def finish(self, done: Future[None]) -> None:
        """Wake whoever waits for what will not arrive any more."""
        if not done.cancelled():
            error = done.exception()
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.arrived.put(error or EngineError("the servers answered fewer completions than were asked for"))

    @property
    def left(self) -> float:
        """Seconds until the deadline, never quite none."""
        return max(self.deadline - time.monotonic(), 0.001)

    def notify(self) -> None:
        self.changed.set()

    def answer(self, completion: Completion) -> None:
        self.arrived.put(completion)
        self.unanswered -= 1
        self.notify()

    def put_back(self, requests: Sequence[Request], error: ServerError, peer: str) -> None:
        """Have `requests` sent again, by others. Raises `error` where that cannot help, or was tried often enough."""
        for request in requests:
            failed_at = self.failed_at[place(request)]
            failed_at.append(peer)
            if not error.retryable or len(failed_at) >= ATTEMPTS or time.monotonic() > self.deadline:
                raise error
        self.waiting.extendleft(reversed(requests))
        self.notify()

    def take(self, count: int, peer: str) -> list[Request]:
        """Up to `count` of those that wait, without any that failed at `peer` as long as another may take it.

        A server that fails at once would otherwise use up a request's attempts while the others are at work.
        """
        taken: list[Request] = []
        passed: list[Request] = []
        while self.waiting and len(taken) < count:
            request = self.waiting.popleft()
            failed_at = self.failed_at.get(place(request), ())
            (passed if peer in failed_at and self.workers.difference(failed_at) else taken).append(request)
        self.waiting.extendleft(reversed(passed))
        return taken


def place(request: Request) -> tuple[int, int]:
    """What tells a request of a batch from the others."""
    return request.prompt_index, request.generation_index


async def serve(work: Work, peers: Sequence[Peer]) -> None:
    """Have all servers work on `work` until nothing is left, or nobody."""
    lost: list[ServerError] = []
    work.workers = {peer.name for peer in peers}
    share = _shares(peers)
    total = work.unanswered
    async with asyncio.TaskGroup() as group:
        for peer in peers:
            group.create_task(_keep_busy(peer, work, math.ceil(total * share[peer.name]), lost))
    if work.unanswered:
        raise lost[-1]  # every server has been lost


def _shares(peers: Sequence[Peer]) -> dict[str, float]:
    """Which part of a call each server is given at first: by how fast they were, and none less than a quarter's due."""
    known = [peer.speed for peer in peers if peer.speed is not None]
    usual = sum(known) / len(known) if known else 1.0
    speeds = {peer.name: min(max(peer.speed or usual, usual / 4), usual * 4) for peer in peers}
    whole = sum(speeds.values())
    return {name: speed / whole for name, speed in speeds.items()}


async def _keep_busy(peer: Peer, work: Work, limit: int, lost: list[ServerError]) -> None:
    """Send one server requests until all are answered or it is lost. `limit` is its share of them."""
    busy: set[asyncio.Task[ServerError | None]] = set()
    state = _Load(peer, work, limit)
    failures = 0
    try:
        while work.unanswered:
            if chunk := state.take():
                busy.add(asyncio.create_task(_send(state, chunk)))
                await asyncio.sleep(0)  # others take theirs
                continue
            work.changed.clear()
            change = asyncio.create_task(work.changed.wait())
            done, _ = await asyncio.wait({*busy, change}, return_when=asyncio.FIRST_COMPLETED, timeout=work.left)
            change.cancel()
            if not done and time.monotonic() > work.deadline:
                raise ServerError(f"not all was answered within {work.timeout:g} s", url=peer.name, retryable=True)
            calls, busy = busy & done, busy - done
            errors = _failures(calls)
            if not errors:
                continue
            if busy:  # they fail by themselves if it is gone; what they bring is welcome
                await asyncio.wait(busy)
            errors += _failures(busy)
            busy.clear()
            if not await _recovered(peer, work, errors[-1], failures):
                lost += errors
                return
            failures += 1
    finally:
        work.workers.discard(peer.name)
        work.notify()
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


def _failures(calls: Iterable[asyncio.Task[ServerError | None]]) -> list[ServerError]:
    """The errors that calls have returned, to be recovered from. Raises the first that one has raised."""
    calls = list(calls)
    raised = [error for call in calls if (error := call.exception()) is not None]
    if raised:
        raise raised[0]
    return [error for call in calls if (error := call.result()) is not None]


async def _recovered(peer: Peer, work: Work, error: ServerError, failures: int) -> bool:
    """Whether a server that failed may be given more. Waits a little, unless others are there to do the work."""
    busy = error.status in (408, 425, 429)
    peer.lost = peer.lost or not busy
    pause = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
    await asyncio.sleep(min(pause, work.left))
    return (busy or await peer.back()) and time.monotonic() < work.deadline and failures < 2 * ATTEMPTS


class _Load:
    """What one server has in hand."""

    def __init__(self, peer: Peer, work: Work, limit: int) -> None:
        self.peer, self.work = peer, work
        self.outstanding = 0
        self._batches = "batch" in peer.features
        self._seeded = any(request.seed is not None for request in work.batch.requests)
        self._share = limit

    def take(self) -> list[Request]:
        """The requests of the next call; empty where it has enough, or nothing waits."""
        work = self.work
        # /v1/completions reports timing for one completion alone, and has one seed and one trace context for all.
        single = work.one_by_one or (not self._batches and (work.timing or self._seeded))
        limit = self._share if len(work.workers) > 1 else len(work.batch.requests)
        if single:
            limit = min(limit, CONCURRENCY)
        elif len(work.workers) > 1:
            limit = min(limit, 2 * self.peer.max_num_seqs)
        room = min(limit - self.outstanding, len(work.waiting), 1 if single else len(work.waiting))
        if room < 1 or (not single and self.outstanding and room < min(len(work.waiting), limit // 4)):
            return []
        taken = work.take(room, self.peer.name)
        self.outstanding += len(taken)
        return taken

    async def answers(self, requests: Sequence[Request]) -> AsyncGenerator[Completion | tuple[Request, ServerError]]:
        """What the server makes of `requests`."""
        work, peer = self.work, self.peer
        if self._batches:
            async with aclosing(batches.complete(peer.server, work.batch, requests, work.left)) as stream:
                async for answer in stream:
                    yield answer
        else:
            for answer in await completions.complete(peer.server, peer.model, work.batch, requests, work.left):
                yield answer


async def _send(load: _Load, requests: list[Request]) -> ServerError | None:
    """One call; an error that may be the server's puts what was not answered back for others and is returned."""
    work, peer, start, tokens = load.work, load.peer, time.monotonic(), 0
    waiting = {place(request): request for request in requests}
    expected = peer.weight_version
    failed: ServerError | None = None
    try:
        async with aclosing(load.answers(requests)) as answers:
            async for answer in answers:
                load.outstanding -= 1
                if isinstance(answer, Completion):
                    request = waiting.pop((answer.prompt_index, answer.generation_index))
                    if not started_anew(answer.weight_version, expected):
                        tokens += len(answer.token_ids)
                        work.answer(answer)
                        continue
                    if not peer.lost:
                        peer.stray(answer.weight_version)
                    failed = ServerError("it was started anew, and holds other weights", url=peer.name, retryable=True)
                else:
                    request, failed = answer
                    del waiting[place(request)]
                work.put_back([request], failed, peer.name)
        peer.measured(tokens, time.monotonic() - start)
    except ServerError as error:
        load.outstanding -= len(waiting)
        if error.status == 400 and "batch" in peer.features:
            raise ValueError(error.said) from error  # of all: a prompt that it refuses is answered by itself
        if error.status in REFUSALS:
            if len(requests) == 1:
                work.answer(refused_by(requests[0], error))
            else:  # whichever it is: one by one
                work.one_by_one = True
                work.waiting.extendleft(reversed(requests))
                work.notify()
            return None
        work.put_back(list(waiting.values()), error, peer.name)
        return error
    return failed
