"""Says that work does not go on, while it does not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..profiling import ProfilingContext, Span, names

STALL_SECONDS = 60.0
"""How long nothing may come before that is said, by default."""

_log = logging.getLogger(__name__)


class Work:
    """A call that is at work. Whoever sees that it goes on calls `moved`, from any thread."""

    __slots__ = ("_watch", "call", "moved_ns", "resting", "root", "span", "stall")

    def __init__(self, watch: StallWatch, call: str, span: Span) -> None:
        self._watch, self.call, self.root = watch, call, span
        self.span = span
        """The innermost that is open."""
        self.stall: Span | None = None
        self.resting = False
        """It waits for what is not the engine's: a caller that has a completion in hand, another rank."""
        self.moved_ns = time.monotonic_ns()

    def moved(self) -> None:
        """A token, a completion or a phase has come."""
        self.moved_ns = time.monotonic_ns()
        if self.stall is not None:
            self._watch.over(self)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """What takes time within is no stall."""
        self.resting = True
        try:
            yield
        finally:
            self.moved()
            self.resting = False

    @contextmanager
    def within(self, span: Span) -> Iterator[None]:
        """`span` is the innermost that is open; its start and end are signs of life."""
        outer, self.span = self.span, span
        self.moved()
        try:
            yield
        finally:
            self.span = outer
            self.moved()


class StallWatch:
    """Watches calls by one thread of its own, which begins with the first; none where profiling is off.

    The thread keeps it, and the profiling context, until `close`.

    A stall is shown while it lasts: by a warning with the open spans, a gauge, and an open span `vgen.stall`, which
    the JSONL record has at once. When it is over its call's span has an event. Of calls within each other on one
    thread the innermost is watched.
    """

    def __init__(self, profiling: ProfilingContext, gauges: ProfilingContext, seconds: float | None) -> None:
        self._profiling, self._gauges = profiling, gauges
        self._seconds = seconds if profiling.enabled and seconds else 0.0
        self._works: dict[int, Work] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self._seconds:
            gauges.observe(names.STALLED, self.stalled)

    @contextmanager
    def watching(self, call: str, span: Span, *, generator: bool = False) -> Iterator[Work]:
        """Watch what is done within; `span` is that call's. A `generator` is no thread's own."""
        work = Work(self, call, span)
        if not self._seconds:
            yield work
            return
        key = id(work) if generator else threading.get_ident()
        outer = self._works.get(key)
        if outer is not None:
            outer.moved()
        self._works[key] = work
        self._ensure_thread()
        try:
            yield work
        finally:
            if outer is None:
                del self._works[key]
            else:
                outer.moved()
                self._works[key] = outer
            self.over(work)

    def stalled(self) -> float:
        """Seconds without any progress, of the call that has stalled for longest; 0 while all is well."""
        now = time.monotonic_ns()
        return max(((now - work.moved_ns) / 1e9 for work in tuple(self._works.values()) if work.stall), default=0.0)

    def over(self, work: Work) -> None:
        """The work goes on, or has ended."""
        with self._lock:
            stall, work.stall = work.stall, None
        if stall is None:
            return
        self._profiling.finish(stall)
        own = {names.STALLED_CALL: work.call, names.STALL_SECONDS: stall.duration}
        work.root.event(names.STALL_OVER, own)
        self._gauges.record(names.STALLED, self.stalled())

    def close(self) -> None:
        """End the thread."""
        self._stop.set()

    def look(self) -> None:
        """Say of each call whether it has stalled since the last look."""
        for work in tuple(self._works.values()):
            idle = (time.monotonic_ns() - work.moved_ns) / 1e9
            if idle < self._seconds or work.resting or work.stall is not None:
                continue
            with self._lock:
                if work not in self._works.values() or work.stall is not None:
                    continue
                open_spans = _open(work.span)
                own = {names.STALLED_CALL: work.call, names.OPEN_SPANS: [name for name, _ in open_spans]}
                began = work.moved_ns
                work.stall = self._profiling.detached(names.STALL, own, parent=work.root, start_ns=began)
            self._gauges.record(names.STALLED, idle)
            self._gauges.record(names.STALLS, 1)
            spans = " > ".join(f"{name} ({seconds:.1f} s)" for name, seconds in open_spans)
            _log.warning("vgen: %s has made no progress for %.1f s; open spans: %s", work.call, idle, spans)
            if work.moved_ns != began:  # it went on just now, and had no stall to end yet
                self.over(work)

    def _ensure_thread(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._stop.is_set():
                    self._thread = threading.Thread(target=self._run, name="vgen-stall", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(min(self._seconds / 10, 1.0)):
            self.look()


def _open(span: Span | None) -> list[tuple[str, float]]:
    """The open spans of this process from the outermost to `span`, with their ages in seconds."""
    now, found = time.monotonic_ns(), list[tuple[str, float]]()
    while span is not None:
        if span.end_ns is None:
            found.append((span.name, (now - span.start_ns) / 1e9))
        span = span.parent
    return found[::-1]
