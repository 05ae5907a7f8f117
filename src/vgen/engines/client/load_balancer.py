"""Spreads the requests of a batch over servers: each request is answered once, also when servers fail."""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing

from ...engine_protocol import Batch, Request, refused_by
from ...errors import EngineError, ServerError
from ...types import Completion
from . import batch_client, openai_client
from .endpoint import Endpoint, was_restarted
from .event_loop_thread import EventLoopThread

CONCURRENCY = 1024
"""The most calls to one server at a time, if each call is for one completion."""
ATTEMPTS = 4
"""How often a request is sent at most. Only a request that was not answered is sent again."""
REFUSALS = (400, 413, 422)
"""HTTP statuses by which a server says that a request itself is wrong."""
BUSY = (408, 425, 429)
"""HTTP statuses by which a server that works well asks the client to come later."""
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
GRACE_SECONDS = 5.0
"""How long `stream` waits after the deadline, because the error of the task that keeps the deadline says more."""
SPEED_RATIO = 4
"""A server's first share of a batch is at most this many times the average, and at least the average divided by it."""


class LoadBalancer:
    """Samples batches with several servers. Any number of threads may call `stream` at once.

    A server gets requests in proportion to its measured speed. What a lost server has not answered goes to the others.

    Args:
        loop: Runs the HTTP calls.
        request_timing: Whether each completion needs its timing. A stock server then needs one call per completion.
        timeout: Seconds for one batch.
    """

    def __init__(self, loop: EventLoopThread, *, request_timing: bool, timeout: float) -> None:
        self._loop, self._request_timing, self._timeout = loop, request_timing, timeout
        self._in_flight: set[Dispatch] = set()

    def stream(self, batch: Batch, endpoints: Sequence[Endpoint]) -> Generator[Completion]:
        """Yield each completion as it arrives. Closing early closes the connections, which aborts the rest."""
        dispatch = Dispatch(batch, self._request_timing, self._timeout)
        self._in_flight.add(dispatch)
        future = self._loop.start(_serve(dispatch, endpoints))
        future.add_done_callback(dispatch.finish)
        batch.cancellation.then(lambda: dispatch.arrived.put(asyncio.CancelledError()))
        try:
            for _ in batch.requests:
                try:
                    arrived = dispatch.arrived.get(timeout=dispatch.seconds_left + GRACE_SECONDS)
                except queue.Empty:
                    names = ", ".join(endpoint.name for endpoint in endpoints)
                    raise EngineError(f"{names} did not answer all requests within {self._timeout:g} s") from None
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            self._in_flight.discard(dispatch)
            future.cancel()

    def abandon(self, error: EngineError) -> None:
        """End every batch that is in flight with `error`."""
        for dispatch in tuple(self._in_flight):
            dispatch.arrived.put(error)


class Dispatch:
    """One batch on its way: which requests wait to be sent, and which completions have arrived.

    Only the event loop changes it; `arrived` brings completions to the thread that called `stream`.
    """

    def __init__(self, batch: Batch, timing: bool, timeout: float) -> None:
        self.batch, self.timing, self.timeout = batch, timing, timeout
        self.deadline = time.monotonic() + timeout
        self.waiting = deque(batch.requests)
        """Requests that no server has now."""
        self.arrived = queue.SimpleQueue[Completion | BaseException]()
        self.failed_at = defaultdict[tuple[int, int, int], list[str]](list)
        """By request, the servers that failed to answer it."""
        self.unanswered = len(batch.requests)
        self.active = set[str]()
        """The servers that work on this batch."""
        self.one_by_one = False
        """Whether each request gets its own call, because a server refused a call with several of them."""
        self.changed = asyncio.Event()
        """Set when requests wait again, or when a completion has arrived."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, at least a millisecond, since 0 means no timeout to some APIs."""
        return max(self.deadline - time.monotonic(), 0.001)

    def finish(self, done: Future[None]) -> None:
        """Tell the thread in `stream` that nothing more will arrive."""
        if done.cancelled():  # by `close`; after a cancellation of its own nobody reads on
            self.arrived.put(EngineError("the engine was closed while it generated"))
            return
        error = done.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.arrived.put(error or EngineError("the servers returned fewer completions than requested"))

    def answer(self, completion: Completion) -> None:
        self.arrived.put(completion)
        self.unanswered -= 1
        self.changed.set()

    def put_back(self, requests: Sequence[Request], error: ServerError, endpoint: str) -> None:
        """Queue requests again that `endpoint` failed to answer.

        Raises `error` if it is not retryable, if a request has used all its attempts, or if the deadline has passed.
        """
        for request in requests:
            failed_at = self.failed_at[request.key]
            failed_at.append(endpoint)
            if not error.retryable or len(failed_at) >= ATTEMPTS or time.monotonic() > self.deadline:
                raise error
        self.return_unsent(requests)

    def return_unsent(self, requests: Sequence[Request]) -> None:
        """Queue requests again, first in line."""
        self.waiting.extendleft(reversed(requests))
        self.changed.set()

    def take(self, count: int, endpoint: str) -> list[Request]:
        """Up to `count` waiting requests for `endpoint`.

        Requests that failed at this endpoint are left to the other active ones, if there are any. Otherwise a server
        that fails at once would use up a request's attempts while the others are busy.
        """
        taken: list[Request] = []
        passed: list[Request] = []
        while self.waiting and len(taken) < count:
            request = self.waiting.popleft()
            failed_at = self.failed_at.get(request.key, ())
            (passed if endpoint in failed_at and self.active.difference(failed_at) else taken).append(request)
        self.waiting.extendleft(reversed(passed))
        return taken


async def _serve(dispatch: Dispatch, endpoints: Sequence[Endpoint]) -> None:
    """Let all servers work until every request is answered. Raises the last error if every server is lost."""
    errors: list[ServerError] = []
    dispatch.active = {endpoint.name for endpoint in endpoints}
    shares = _shares(endpoints)
    total = dispatch.unanswered
    async with asyncio.TaskGroup() as group:
        for endpoint in endpoints:
            share = math.ceil(total * shares[endpoint.name])
            group.create_task(_keep_busy(_EndpointLoad(endpoint, dispatch, share), errors))
    if dispatch.unanswered:
        raise errors[-1]


def _shares(endpoints: Sequence[Endpoint]) -> dict[str, float]:
    """The fraction of a batch that each server gets first, by its speed relative to the average."""
    known = [endpoint.speed for endpoint in endpoints if endpoint.speed is not None]
    average = sum(known) / len(known) if known else 1.0
    least, most = average / SPEED_RATIO, average * SPEED_RATIO
    speeds = {endpoint.name: min(max(endpoint.speed or average, least), most) for endpoint in endpoints}
    total = sum(speeds.values())
    return {name: speed / total for name, speed in speeds.items()}


async def _keep_busy(load: _EndpointLoad, lost: list[ServerError]) -> None:
    """Send requests to one server until all are answered, or the server is lost: then its errors go into `lost`."""
    endpoint, dispatch = load.endpoint, load.dispatch
    calls: set[asyncio.Task[ServerError | None]] = set()
    failures = 0
    try:
        while dispatch.unanswered:
            if requests := load.take():
                calls.add(asyncio.create_task(_send(load, requests)))
                await asyncio.sleep(0)  # let the other servers take their requests
                continue
            dispatch.changed.clear()
            change = asyncio.create_task(dispatch.changed.wait())
            done, _ = await asyncio.wait(
                {*calls, change}, return_when=asyncio.FIRST_COMPLETED, timeout=dispatch.seconds_left
            )
            change.cancel()
            if not done and time.monotonic() > dispatch.deadline:
                problem = f"not all requests were answered within {dispatch.timeout:g} s"
                raise await _explained(ServerError(problem, url=endpoint.name, retryable=True), endpoint)
            errors = _errors_of(calls & done)
            failures = failures if errors or not calls & done else 0
            calls -= done
            if not errors:
                continue
            if calls:  # if the server is gone they fail soon; otherwise their completions are useful
                await asyncio.wait(calls)
            errors += _errors_of(calls)
            calls.clear()
            if not await _recovered(endpoint, dispatch, errors[-1], failures):
                lost += errors
                return
            failures += 1
    finally:
        dispatch.active.discard(endpoint.name)
        dispatch.changed.set()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def _errors_of(calls: Iterable[asyncio.Task[ServerError | None]]) -> list[ServerError]:
    """The errors that ended calls returned. Raises the first exception that one of them raised."""
    return [error for call in calls if (error := call.result()) is not None]


async def _explained(error: ServerError, endpoint: Endpoint) -> ServerError:
    """`error` with the reason, if the server did not answer because it is paused or asleep."""
    reason = await endpoint.why_stopped()
    problem = f"{error.problem}; {reason}" if reason else error.problem
    return ServerError(problem, url=endpoint.name, retryable=error.retryable)


async def _recovered(endpoint: Endpoint, dispatch: Dispatch, error: ServerError, failures: int) -> bool:
    """Wait, then tell whether a server that failed can get requests again."""
    busy = error.status in BUSY
    endpoint.lost = endpoint.lost or not busy
    pause = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
    await asyncio.sleep(min(pause, dispatch.seconds_left))
    return failures < 2 * ATTEMPTS and (busy or await endpoint.has_returned())


class _EndpointLoad:
    """The requests of one batch that one server has now."""

    def __init__(self, endpoint: Endpoint, dispatch: Dispatch, share: int) -> None:
        self.endpoint, self.dispatch = endpoint, dispatch
        self.outstanding = 0
        self.batches = "batch" in endpoint.features
        self._seeded = any(request.seed is not None for request in dispatch.batch.requests)
        self._share = share

    def take(self) -> list[Request]:
        """The requests for the next call; empty if the server has enough or none wait."""
        dispatch = self.dispatch
        alone = len(dispatch.active) <= 1
        # /v1/completions returns timing for one completion only, and takes one seed and one trace context per call.
        single = dispatch.one_by_one or (not self.batches and (dispatch.timing or self._seeded))
        limit = len(dispatch.batch.requests) if alone else self._share
        if single:
            limit = min(limit, CONCURRENCY)
        elif not alone:
            limit = min(limit, 2 * self.endpoint.max_num_seqs)
        room = min(limit - self.outstanding, len(dispatch.waiting), 1 if single else len(dispatch.waiting))
        # Many small calls cost more than one: wait until a quarter of the limit is free.
        if room < 1 or (not single and self.outstanding and room < min(len(dispatch.waiting), limit // 4)):
            return []
        taken = dispatch.take(room, self.endpoint.name)
        self.outstanding += len(taken)
        return taken

    async def answers(self, requests: Sequence[Request]) -> AsyncGenerator[Completion | tuple[Request, ServerError]]:
        """Send one call and yield its completions, and the errors of single requests."""
        batch, endpoint, left = self.dispatch.batch, self.endpoint, self.dispatch.seconds_left
        if self.batches:
            async with aclosing(batch_client.complete(endpoint.http, batch, requests, left)) as stream:
                async for answer in stream:
                    yield answer
        else:
            for answer in await openai_client.complete(endpoint.http, endpoint.model, batch, requests, left):
                yield answer


async def _send(load: _EndpointLoad, requests: list[Request]) -> ServerError | None:
    """Make one call. Returns the error of a server that may be lost; its unanswered requests are queued again."""
    dispatch, endpoint, start, tokens = load.dispatch, load.endpoint, time.monotonic(), 0
    unanswered = {request.key: request for request in requests}
    expected, aborts = endpoint.weight_version, endpoint.aborts
    failed: ServerError | None = None
    try:
        async with aclosing(load.answers(requests)) as answers:
            async for answer in answers:
                load.outstanding -= 1
                if isinstance(answer, Completion):
                    request = unanswered.pop(answer.key)
                    if was_restarted(answer.weight_version, expected):
                        if not endpoint.lost:
                            endpoint.mark_stale(answer.weight_version)
                        problem = "the server was restarted and holds other weights"
                    elif answer.finish_reason == "abort" and endpoint.aborts == aborts:
                        problem = "another client had the server abort a request, by a pause, a sleep or an abort"
                    else:
                        tokens += len(answer.token_ids)
                        dispatch.answer(answer)
                        continue
                    failed = ServerError(problem, url=endpoint.name, retryable=True)
                else:
                    request, failed = answer
                    del unanswered[request.key]
                dispatch.put_back([request], failed, endpoint.name)
        endpoint.record_speed(tokens, time.monotonic() - start)
        return failed
    except ServerError as error:
        if error is failed:  # a single request has used all its attempts
            raise
        load.outstanding -= len(unanswered)
        if error.status == 400 and load.batches:
            # The batch route answers each bad prompt by itself, so this is about the parameters of all.
            raise ValueError(error.server_message) from error
        if error.status not in REFUSALS:
            if error.status is None and time.monotonic() > dispatch.deadline:
                raise await _explained(error, endpoint) from error
            dispatch.put_back(list(unanswered.values()), error, endpoint.name)
            return error
        if len(requests) == 1:
            dispatch.answer(refused_by(requests[0], error))
        else:  # send them one by one, to find the request that is wrong
            dispatch.one_by_one = True
            dispatch.return_unsent(requests)
        return None
