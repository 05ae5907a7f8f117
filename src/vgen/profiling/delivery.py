"""Between the context and one sink: isolation, the bounded queue, deadlines."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from .records import Sink

logger = logging.getLogger("vgen.telemetry")

MAX_QUEUE = 65_536
"""Records that may wait for a slow sink. What comes on top is dropped and counted."""
MAX_FAILURES = 10
"""Exceptions in a row after which a sink is switched off."""
POLL = 0.05
"""Seconds between two looks into the queue. The caller never signals: that would cost it more than the append."""


class Outlet:
    """One sink with what shields the work from it.

    `start`, `end`, `measure` and `step` are what the context calls. They never raise and, for a sink
    that is not inline, never wait. A method that the sink does not override is None here.
    """

    def __init__(self, sink: Sink, max_queue: int = MAX_QUEUE) -> None:
        self.sink = sink
        self.inline = bool(getattr(sink, "inline", False))
        self.dropped = 0
        self.failures = 0
        self.disabled = False
        self.identify = self._door("identify")
        self.start = self._door("on_start")
        self.end = self._door("on_end")
        self.measure = self._door("on_measurement")
        self.step = self._door("on_step")
        self.observe = self._door("on_observe")
        self._max_queue = max_queue
        self._queue: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._closed = False
        self._begin()
        os.register_at_fork(after_in_child=_after_fork(weakref.ref(self)))
        if self._implements("close") or self._implements("flush"):
            self._ensure_worker()  # now: Python 3.12 and newer start no thread once the interpreter is on its way out

    def post(self, command: str, deadline: float) -> threading.Event | None:
        """Have the worker deliver all that was accepted, then flush or close the sink; the event says when it has.

        `deadline` is on `time.monotonic`'s clock. None when there is nothing to wait for.
        """
        if self._closed:
            return None
        self._ensure_worker()
        if self._worker is None:
            self.dropped += len(self._queue)
            return None
        done = threading.Event()
        self._commands.append((command, deadline, done))
        self._wake.set()
        return done

    def abandon(self) -> None:
        """Let go of a sink that did not close in time. What still waits is counted as dropped."""
        self._closed = True
        self.dropped += len(self._queue)

    def _implements(self, method: str) -> bool:
        own = getattr(type(self.sink), method, None)
        return own is not None and own is not getattr(Sink, method, None)

    def _door(self, method: str) -> Callable[..., Any] | None:
        if not self._implements(method):
            return None
        call = getattr(self.sink, method)
        return self._inline_door(call) if self.inline else self._queued_door(call)

    def _inline_door(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def pass_on(*arguments: Any) -> Any:
            if self.disabled:
                return None
            try:
                result = call(*arguments)
            except Exception as error:
                self._failed(error)
                return None
            if self.failures:
                self.failures = 0
            return result

        return pass_on

    def _queued_door(self, call: Callable[..., object]) -> Callable[..., None]:
        def enqueue(*arguments: Any) -> None:
            queue = self._queue
            waiting = len(queue)
            if waiting >= self._max_queue or self.disabled or self._closed:
                self.dropped += 1
                return
            queue.append((call, arguments))
            if not waiting and self._worker is None:
                self._ensure_worker()

        return enqueue

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures < MAX_FAILURES or self.disabled:
            return
        self.disabled = True
        # The error's type alone: its message may hold what a sink was about to send.
        logger.warning(
            "vgen: telemetry sink %s failed %d times in a row (%s) and is switched off; the work goes on without it",
            type(self.sink).__name__,
            self.failures,
            type(error).__name__,
        )

    def _begin(self) -> None:
        self._queue.clear()
        self._wake = threading.Event()
        self._commands: deque[tuple[str, float, threading.Event]] = deque()
        self._worker: threading.Thread | None = None
        self._started = threading.Lock()

    def _ensure_worker(self) -> None:
        with self._started:
            if self._worker is None and not self._closed:
                worker = threading.Thread(target=self._work, name=f"vgen-{type(self.sink).__name__}", daemon=True)
                try:
                    worker.start()
                except RuntimeError:  # the interpreter is shutting down
                    return
                self._worker = worker

    def _work(self) -> None:
        while True:
            self._wake.wait(POLL if not self.inline else None)
            self._wake.clear()
            self._drain()
            while self._commands:
                name, deadline, done = self._commands.popleft()
                self._drain()
                self._guarded(getattr(self.sink, name), max(0.0, deadline - time.monotonic()))
                done.set()
                if name == "close":
                    self._closed = True
                    return
            if self._closed:
                return

    def _drain(self) -> None:
        queue, worked = self._queue, False
        while queue:
            call, arguments = queue.popleft()
            worked = True
            if self.disabled:
                self.dropped += 1
            else:
                self._guarded(call, *arguments)
        if worked and self._implements("on_idle"):
            self._guarded(self.sink.on_idle)

    def _guarded(self, call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
            self.failures = 0
        except Exception as error:
            self._failed(error)

    def after_fork(self) -> None:
        """In a forked child: what was waiting belongs to the parent, which still has its worker."""
        self.dropped = 0
        self._begin()
        forked = getattr(self.sink, "after_fork", None)
        if forked is not None:
            self._guarded(forked)


def _after_fork(reference: weakref.ref[Outlet]) -> Callable[[], None]:
    def run() -> None:
        outlet = reference()
        if outlet is not None:
            outlet.after_fork()

    return run


def tell_all(command: str, outlets: tuple[Outlet, ...], timeout: float) -> bool:
    """Flush or close every sink, side by side, within `timeout` seconds in all. False when one did not make it."""
    deadline = time.monotonic() + timeout
    waits = [(outlet, outlet.post(command, deadline)) for outlet in outlets]
    late = [o for o, done in waits if done is not None and not done.wait(max(0.0, deadline - time.monotonic()))]
    if command == "close":
        for outlet in late:
            outlet.abandon()
        dropped = {type(outlet.sink).__name__: outlet.dropped for outlet in outlets if outlet.dropped}
        if dropped or late:
            logger.warning(
                "vgen: telemetry closed with losses: records dropped %s, sinks that did not close in %.1f s: %s",
                dropped,
                timeout,
                [type(outlet.sink).__name__ for outlet in late],
            )
    return not late
