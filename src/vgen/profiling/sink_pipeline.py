"""Between a context and each of its sinks: isolation from the sink's failures, a bounded queue, deadlines."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from .span_model import Sink

logger = logging.getLogger("vgen.telemetry")

MAX_QUEUE = 65_536
"""Records that may wait for a slow sink. Further ones are dropped and counted."""
MAX_FAILURES = 10
"""After so many exceptions in a row from one of its methods, a sink is switched off."""
POLL_SECONDS = 0.05
"""Between two looks into the queue; also the longest time between two calls of `on_idle`."""
WAKE_AT = 2048
"""Waiting records at which the worker is woken early. To signal it for each would cost more than the append."""
BATCH = 64
"""Records between two looks at the clock."""
_SWITCHED_OFF = "vgen: telemetry sink %s failed %d times in a row (%s) and is switched off; the work goes on without it"
_LOSSES = "vgen: telemetry closed with losses: records lost %s, sinks that failed to close within %.1f s: %s"


class Command:
    """A flush or close that waits for the worker."""

    def __init__(self, method: str, deadline: float) -> None:
        self.method, self.deadline = method, deadline
        self.done, self.succeeded = threading.Event(), False


class SinkOutlet:
    """One sink, and what protects the work from it.

    The context calls the sink's methods through what `callback` returns: that raises no `Exception`, and never waits
    for a sink that is not inline. A `BaseException` such as `KeyboardInterrupt` from an inline sink reaches the work;
    on a worker thread it counts as a failure. The worker thread calls `mute` when it starts, so that nothing the sink
    does there is recorded.
    """

    def __init__(self, sink: Sink, mute: Callable[[], object]) -> None:
        self.sink, self.name = sink, type(sink).__name__
        self.inline = bool(getattr(sink, "inline", False))
        self.off = False
        """Nothing is delivered any more: the sink failed too often, or is closed."""
        self._closed = False
        self._mute = mute
        self._queue: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._reset()
        if self._overrides("close") or self._overrides("flush"):
            self._ensure_worker()  # now: Python 3.12 starts no threads during interpreter shutdown

    def callback(self, method: str) -> Callable[..., Any] | None:
        """Return what calls `method` of the sink, at once or through the queue; None if the sink does not override it.

        `method` is `identify`, `on_start`, `on_end`, `on_measurement`, `on_step` or `on_observe`.
        """
        if not self._overrides(method):
            return None
        call = getattr(self.sink, method)
        if self.inline:
            owed = method == "on_end" and self._overrides("identify")
            return self._inline_callback(call, owed, is_record=method not in ("identify", "on_observe"))
        if method == "on_start":  # `span.attributes` may have changed when the worker comes to it
            return self._queued_callback(lambda span: call(span, span.inherited))
        if method == "on_observe":
            enqueue = self._queued_callback(lambda arguments: call(*arguments))
            return lambda *arguments: enqueue(arguments)
        return self._queued_callback(call)

    def lost(self) -> int:
        """Return how many records were not delivered, including those that the sink counts in its own `lost`."""
        # While the worker is busy, the records that the sink holds are not lost: it is asked again when it is idle.
        busy = not self.inline and self._worker is not None and not self._closed
        return self._dropped + (self._lost_by_sink if busy else self._ask_sink())

    def newly_lost(self) -> int:
        """Return how many records were lost since the last call."""
        lost = self.lost()
        if lost <= self._reported:
            return 0
        with self._lock:
            lost, self._reported = max(0, lost - self._reported), max(lost, self._reported)
        return lost

    def post(self, method: str, deadline: float) -> Command | None:
        """Let the worker deliver all accepted records, then flush or close the sink.

        `deadline` is on the clock of `time.monotonic`. Returns None if there is nothing to wait for.
        """
        if self._closed:
            return None
        if self._worker is None and (self._queue or self._overrides(method)):
            self._ensure_worker()
        if self._worker is None:
            if method == "close":
                self.abandon()
            return None
        command = Command(method, deadline)
        self._commands.append(command)
        self._wake.set()
        # The worker itself may be the caller, if a sink flushes its context or holds it last: it must not wait for
        # itself.
        return None if self._closed or threading.current_thread() is self._worker else command

    def abandon(self) -> None:
        """Stop delivering to the sink, closed or not. Waiting records count as lost."""
        self._closed = self.off = True
        self._dropped += len(self._queue) + self._delivering
        self._queue.clear()

    def after_fork(self) -> None:
        """In a forked child: waiting records belong to the parent process, which still has its worker."""
        if self._closed:
            return
        self._reset()
        if self._overrides("after_fork"):
            self._call_safely(self.sink.after_fork)
        if self.inline and (self._overrides("close") or self._overrides("flush")):
            self._ensure_worker()  # as in `__init__`; a sink with a queue gets its worker with the first record

    def _reset(self) -> None:
        self._queue.clear()
        self._dropped = self._lost_by_sink = self._reported = 0
        self._delivering = False
        self._failures: dict[Callable[..., object], int] = {}
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._lock = threading.RLock()
        self._worker: threading.Thread | None = None

    def _overrides(self, method: str) -> bool:
        implementation = getattr(type(self.sink), method, None)
        return implementation is not None and implementation is not getattr(Sink, method, None)

    def _inline_callback(self, call: Callable[..., Any], owed: bool, is_record: bool) -> Callable[..., Any]:
        """`owed`: an identity sink still gets `on_end` after it was switched off, if it got the start of that span:
        its backend's span is the current one and must be closed."""

        def call_inline(*arguments: Any) -> Any:
            if self.off and not (owed and arguments[0].handle is not None):
                self._dropped += is_record
                return None
            try:
                result = call(*arguments)
                if self._failures:
                    self._failures.pop(call, None)
                return result
            except Exception as error:
                self._dropped += is_record
                self._count_failure(call, error)
                return None

        return call_inline

    def _queued_callback(self, call: Callable[[Any], object]) -> Callable[[Any], None]:
        queue = self._queue

        def enqueue(record: Any, *_: Any) -> None:
            waiting = len(queue)
            if waiting >= MAX_QUEUE or self.off:
                self._dropped += 1
                return
            queue.append((call, record))
            if waiting == WAKE_AT:
                self._wake.set()
            elif not waiting and self._worker is None:
                self._ensure_worker()

        return enqueue

    def _count_failure(self, call: Callable[..., object], error: BaseException) -> None:
        with self._lock:
            self._failures[call] = self._failures.get(call, 0) + 1
            if self._failures[call] < MAX_FAILURES or self.off:
                return
            self.off = True
        # Only the error's type: its message may contain what the sink was about to send.
        logger.warning(_SWITCHED_OFF, self.name, MAX_FAILURES, type(error).__name__)

    def _ensure_worker(self) -> None:
        with self._lock:
            if self._worker is None and not self._closed:
                worker = threading.Thread(target=self._work, name=f"vgen-{self.name}", daemon=True)
                try:
                    worker.start()
                except RuntimeError:  # the interpreter is shutting down
                    return
                self._worker = worker

    def _work(self) -> None:
        self._mute()
        while not self._closed:
            self._wake.wait(None if self.inline else POLL_SECONDS)
            self._wake.clear()
            self._deliver_waiting()
            while self._commands and not self._closed:
                self._execute(self._commands.popleft())
        while self._commands:
            self._commands.popleft().done.set()

    def _execute(self, command: Command) -> None:
        self._deliver_waiting()
        if not self._closed:
            try:
                if command.method == "close" or not self.off:
                    if self._overrides(command.method):
                        getattr(self.sink, command.method)(max(0.0, command.deadline - time.monotonic()))
                    command.succeeded = True
            except BaseException:
                pass  # the caller sees it in `succeeded`; a failed flush does not switch the sink off
            self._lost_by_sink = self._ask_sink()
            if command.method == "close" and not self._closed:
                self.abandon()
        command.done.set()

    def _deliver_waiting(self) -> None:
        """Deliver the records that wait now. Later ones wait for the next time, or a flush would never end."""
        remaining = len(self._queue)
        while remaining and not self._closed:
            due = time.monotonic() + POLL_SECONDS
            while remaining and not self._closed and time.monotonic() < due:
                batch = min(remaining, BATCH)
                remaining -= batch
                self._deliver(batch)
            if self._overrides("on_idle") and not self.off:
                self._call_safely(self.sink.on_idle)
                self._lost_by_sink = self._ask_sink()

    def _deliver(self, count: int) -> None:
        queue, failures = self._queue, self._failures
        self._delivering = True
        for _ in range(count):
            try:
                call, record = queue.popleft()
            except IndexError:  # the sink was abandoned meanwhile
                break
            if self.off:
                self._dropped += 1
                continue
            try:
                call(record)
                if failures:
                    failures.pop(call, None)
            except BaseException as error:
                self._dropped += 1
                self._count_failure(call, error)
        self._delivering = False

    def _call_safely(self, call: Callable[[], object]) -> None:
        try:
            call()
            self._failures.pop(call, None)
        except BaseException as error:
            self._count_failure(call, error)

    def _ask_sink(self) -> int:
        try:
            return int(getattr(self.sink, "lost", 0))
        except Exception:
            return 0


def lost_records(outlets: Iterable[SinkOutlet]) -> dict[str, int]:
    """Return the records lost so far by sink class, without the sinks that lost none."""
    lost = Counter[str]()
    for outlet in outlets:
        lost[outlet.name] += outlet.lost()
    return dict(+lost)


def flush_or_close_all(method: str, outlets: tuple[SinkOutlet, ...], timeout: float) -> bool:
    """Flush or close all sinks, in parallel, within `timeout` seconds in all. False if one failed or was too late."""
    deadline = time.monotonic() + timeout
    posted = [(outlet, command) for outlet in outlets if (command := outlet.post(method, deadline)) is not None]
    in_time = [command.done.wait(max(0.0, deadline - time.monotonic())) for _, command in posted]
    failed = [o.name for (o, command), ended in zip(posted, in_time, strict=True) if not ended or not command.succeeded]
    if method == "close":
        for (outlet, _), ended in zip(posted, in_time, strict=True):
            if not ended:
                outlet.abandon()
        lost = lost_records(outlets)
        if lost or failed:
            logger.warning(_LOSSES, lost, timeout, failed)
    return not failed
