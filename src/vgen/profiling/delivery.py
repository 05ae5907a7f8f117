"""Between the context and one sink: isolation, the bounded queue, deadlines."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .records import Sink

logger = logging.getLogger("vgen.telemetry")

MAX_QUEUE = 65_536
"""Records that may wait for a slow sink. What comes on top is dropped and counted."""
MAX_FAILURES = 10
"""Exceptions in a row, from one of its methods, after which a sink is switched off."""
POLL = 0.05
"""Seconds between two looks into the queue, and at most between two calls of `on_idle`."""
ALARM = 2048
"""Records that wait when the worker is woken before its time. A signal for each would cost more than the append."""
BATCH = 64
"""Records between two looks at the clock."""


class Command:
    """A flush or close on its way to the worker."""

    def __init__(self, name: str, deadline: float) -> None:
        self.name, self.deadline = name, deadline
        self.done, self.well = threading.Event(), False


class Outlet:
    """One sink with what shields the work from it.

    `identify`, `start`, `end`, `measure`, `step` and `observe` are what the context calls. They raise no
    `Exception` and, for a sink that is not inline, never wait. What is no `Exception` (a Ctrl-C, a signal
    handler's exit) goes on to the work from an inline sink, and ends nothing on a worker. A method that
    the sink does not override is None here. `mute` is called on the worker thread as it starts.
    """

    def __init__(self, sink: Sink, mute: Callable[[], object]) -> None:
        self.sink, self.name = sink, type(sink).__name__
        self.inline = bool(getattr(sink, "inline", False))
        self.off = False
        """Nothing is delivered any more: it failed too often, or is closed."""
        self._closed = False
        self._mute = mute
        self._queue: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._begin()
        self.identify = self._door("identify")
        self.start = self._door("on_start")
        self.end = self._door("on_end")
        self.measure = self._door("on_measurement")
        self.step = self._door("on_step")
        self.observe = self._door("on_observe")
        if self._implements("close") or self._implements("flush"):
            self._ensure_worker()  # now: Python 3.12 and newer start no thread once the interpreter is on its way out

    def lost(self) -> int:
        """Records that were not delivered, or that the sink says it could not hand on."""
        # While the worker is at it, what the sink has in its hands is not lost: it is asked when it has run idle.
        busy = not self.inline and self._worker is not None and not self._closed
        return self._dropped + (self._sinks_loss if busy else self._ask())

    def newly_lost(self) -> int:
        """Those of `lost` that no earlier call has told of."""
        lost = self.lost()
        if lost <= self._told:
            return 0
        with self._lock:
            lost, self._told = max(0, lost - self._told), max(lost, self._told)
        return lost

    def post(self, name: str, deadline: float) -> Command | None:
        """Have the worker deliver all that was accepted, then flush or close the sink.

        `deadline` is on `time.monotonic`'s clock. None when there is nothing to wait for.
        """
        if self._closed:
            return None
        if self._worker is None and (self._queue or self._implements(name)):
            self._ensure_worker()
        if self._worker is None:
            if name == "close":
                self.abandon()
            return None
        command = Command(name, deadline)
        self._commands.append(command)
        self._wake.set()
        # A sink may flush the context that calls it, and the worker may be the last to hold it: no waiting for itself.
        return None if self._closed or threading.current_thread() is self._worker else command

    def abandon(self) -> None:
        """Let go of a sink, closed or not. What still waits is counted as lost."""
        self._closed = self.off = True
        self._dropped += len(self._queue) + self._delivering
        self._queue.clear()

    def after_fork(self) -> None:
        """In a forked child: what was waiting belongs to the parent, which still has its worker."""
        if self._closed:
            return
        self._begin()
        if self._implements("after_fork"):
            self._guarded(self.sink.after_fork)
        if self.inline and (self._implements("close") or self._implements("flush")):
            self._ensure_worker()  # as in the constructor; behind a queue the first record does it

    def _begin(self) -> None:
        self._queue.clear()
        self._dropped = self._sinks_loss = self._told = 0
        self._delivering = False
        self._failures: dict[Callable[..., object], int] = {}
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._lock = threading.RLock()
        self._worker: threading.Thread | None = None

    def _implements(self, method: str) -> bool:
        own = getattr(type(self.sink), method, None)
        return own is not None and own is not getattr(Sink, method, None)

    def _door(self, method: str) -> Callable[..., Any] | None:
        if not self._implements(method):
            return None
        call = getattr(self.sink, method)
        if not self.inline:
            if method == "on_start":
                return self._queued_door(lambda span: call(span, span.inherited))
            if method == "on_observe":
                enqueue = self._queued_door(lambda arguments: call(*arguments))
                return lambda *arguments: enqueue(arguments)
            return self._queued_door(call)
        owed = method == "on_end" and self._implements("identify")
        return self._inline_door(call, owed, record=method not in ("identify", "on_observe"))

    def _inline_door(self, call: Callable[..., Any], owed: bool, record: bool) -> Callable[..., Any]:
        def pass_on(*arguments: Any) -> Any:
            if self.off and not (owed and arguments[0].handle is not None):
                self._dropped += record
                return None
            try:
                result = call(*arguments)
                if self._failures:
                    self._failures.pop(call, None)
                return result
            except Exception as error:
                self._dropped += record
                self._failed(call, error)
                return None

        return pass_on

    def _queued_door(self, call: Callable[[Any], object]) -> Callable[[Any], None]:
        queue = self._queue

        def enqueue(record: Any, *_: Any) -> None:
            waiting = len(queue)
            if waiting >= MAX_QUEUE or self.off:
                self._dropped += 1
                return
            queue.append((call, record))
            if waiting == ALARM:
                self._wake.set()
            elif not waiting and self._worker is None:
                self._ensure_worker()

        return enqueue

    def _failed(self, call: Callable[..., object], error: BaseException) -> None:
        with self._lock:
            self._failures[call] = self._failures.get(call, 0) + 1
            if self._failures[call] < MAX_FAILURES or self.off:
                return
            self.off = True
        # The error's type alone: its message may hold what a sink was about to send.
        logger.warning(
            "vgen: telemetry sink %s failed %d times in a row (%s) and is switched off; the work goes on without it",
            self.name,
            MAX_FAILURES,
            type(error).__name__,
        )

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
            self._wake.wait(None if self.inline else POLL)
            self._wake.clear()
            self._deliver()
            while self._commands and not self._closed:
                self._obey(self._commands.popleft())
        while self._commands:
            self._commands.popleft().done.set()

    def _obey(self, command: Command) -> None:
        self._deliver()
        if not self._closed:
            try:
                if command.name == "close" or not self.off:
                    if self._implements(command.name):
                        getattr(self.sink, command.name)(max(0.0, command.deadline - time.monotonic()))
                    command.well = True
            except BaseException:
                pass  # whoever gave the command is told; a sink that may yet recover is not switched off for it
            self._sinks_loss = self._ask()
            if command.name == "close" and not self._closed:
                self.abandon()
        command.done.set()

    def _deliver(self) -> None:
        """Hand over what waits now; what comes meanwhile is for the next time, or a flush would never end."""
        queue, rest = self._queue, len(self._queue)
        if not rest:
            return
        while rest and not self._closed:
            due = time.monotonic() + POLL
            while rest and not self._closed and time.monotonic() < due:
                batch = min(rest, BATCH)
                rest -= batch
                self._hand_over(queue, batch)
            if self._implements("on_idle") and not self.off:
                self._guarded(self.sink.on_idle)
                self._sinks_loss = self._ask()

    def _hand_over(self, queue: deque[tuple[Callable[[Any], object], Any]], count: int) -> None:
        failures = self._failures
        self._delivering = True
        for _ in range(count):
            try:
                call, record = queue.popleft()
            except IndexError:  # abandoned meanwhile
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
                self._failed(call, error)
        self._delivering = False

    def _guarded(self, call: Callable[..., object], *arguments: Any) -> bool:
        try:
            call(*arguments)
            self._failures.pop(call, None)
            return True
        except BaseException as error:
            self._failed(call, error)
            return False

    def _ask(self) -> int:
        try:
            return int(getattr(self.sink, "lost", 0))
        except Exception:
            return 0


def losses(outlets: Iterable[Outlet]) -> dict[str, int]:
    """Records lost so far, by sink class."""
    found: dict[str, int] = {}
    for outlet in outlets:
        if lost := outlet.lost():
            found[outlet.name] = found.get(outlet.name, 0) + lost
    return found


def tell_all(name: str, outlets: tuple[Outlet, ...], timeout: float) -> bool:
    """Flush or close every sink, side by side, within `timeout` seconds in all. False when one failed or was late."""
    deadline = time.monotonic() + timeout
    commands = [(outlet, outlet.post(name, deadline)) for outlet in outlets]
    waited = [(o, c, c.done.wait(max(0.0, deadline - time.monotonic()))) for o, c in commands if c is not None]
    failed = [outlet.name for outlet, command, in_time in waited if not in_time or not command.well]
    if name == "close":
        for outlet, _, in_time in waited:
            if not in_time:
                outlet.abandon()
        lost = losses(outlets)
        if lost or failed:
            logger.warning(
                "vgen: telemetry closed with losses: records lost %s, sinks that failed to close within %.1f s: %s",
                lost,
                timeout,
                failed,
            )
    return not failed
