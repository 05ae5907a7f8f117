"""Detects calls that make no progress, and reports each stall while it lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..profiling import ProfilingContext, Span, semconv

STALL_SECONDS = 60.0
"""After how long without progress a call has stalled, by default."""

_log = logging.getLogger(__name__)


class WatchedCall:
    """A call in progress. Whoever sees it make progress calls `progressed`, from any thread."""

    __slots__ = ("_watch", "call", "progress_ns", "resting", "root", "span", "stall")

    def __init__(self, watch: StallWatch, call: str, span: Span) -> None:
        self._watch, self.call, self.root = watch, call, span
        self.span = span
        """The innermost open span."""
        self.stall: Span | None = None
        self.resting = False
        """Whether the call waits for something other than the engine: its caller, or another rank."""
        self.progress_ns = time.monotonic_ns()

    def progressed(self) -> None:
        """Note that a token, a completion or a phase arrived."""
        self.progress_ns = time.monotonic_ns()
        if self.stall is not None:
            self._watch.end_stall(self)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Time spent in the block is no stall."""
        self.resting = True
        try:
            yield
        finally:
            self.progressed()
            self.resting = False

    @contextmanager
    def within(self, span: Span) -> Iterator[None]:
        """`span` is the innermost open span in the block. Its start and its end count as progress."""
        outer, self.span = self.span, span
        self.progressed()
        try:
            yield
        finally:
            self.span = outer
            self.progressed()


class StallWatch:
    """Watches calls from a thread that starts with the first call. If profiling is off, nothing is watched.

    The thread keeps this object and the profiling context alive until `close`.

    While a stall lasts there is a warning with the open spans, a gauge, and an open span `vgen.stall`, which a JSONL
    record has at once. When it is over, the call's span gets an event. Of nested calls on one thread, only the
    innermost is watched.
    """

    def __init__(self, profiling: ProfilingContext, gauges: ProfilingContext, seconds: float | None) -> None:
        self._profiling, self._gauges = profiling, gauges
        self._seconds = seconds if profiling.enabled and seconds else 0.0
        self._calls: dict[int, WatchedCall] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self._seconds:
            gauges.observe(semconv.STALLED, self.stalled_seconds)

    @contextmanager
    def watching(self, call: str, span: Span, *, generator: bool = False) -> Iterator[WatchedCall]:
        """Watch the block, which is a call with the span `span`. A `generator` may move from thread to thread."""
        watched = WatchedCall(self, call, span)
        if not self._seconds:
            yield watched
            return
        key = id(watched) if generator else threading.get_ident()
        outer = self._calls.get(key)
        if outer is not None:
            outer.progressed()
        self._calls[key] = watched
        self._ensure_thread()
        try:
            yield watched
        finally:
            if outer is None:
                del self._calls[key]
            else:
                outer.progressed()
                self._calls[key] = outer
            self.end_stall(watched)

    def stalled_seconds(self) -> float:
        """Seconds without progress of the call that has been stalled longest; 0 if no call has stalled."""
        now = time.monotonic_ns()
        return max(((now - call.progress_ns) / 1e9 for call in tuple(self._calls.values()) if call.stall), default=0.0)

    def end_stall(self, watched: WatchedCall) -> None:
        """End the call's stall, if there is one: the call made progress, or ended."""
        with self._lock:
            stall, watched.stall = watched.stall, None
        if stall is None:
            return
        self._profiling.finish(stall)
        attributes = {semconv.STALLED_CALL: watched.call, semconv.STALL_SECONDS: stall.duration}
        watched.root.event(semconv.STALL_OVER, attributes)
        self._gauges.record(semconv.STALLED, self.stalled_seconds())

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def _check(self) -> None:
        """Report each call that has stalled since the last check."""
        for watched in tuple(self._calls.values()):
            idle_seconds = (time.monotonic_ns() - watched.progress_ns) / 1e9
            if idle_seconds < self._seconds or watched.resting or watched.stall is not None:
                continue
            with self._lock:
                if watched not in self._calls.values() or watched.stall is not None:
                    continue
                spans = _open_spans(watched.span)
                attributes = {semconv.STALLED_CALL: watched.call, semconv.OPEN_SPANS: [name for name, _ in spans]}
                start_ns = watched.progress_ns
                watched.stall = self._profiling.detached(
                    semconv.STALL, attributes, parent=watched.root, start_ns=start_ns
                )
            self._gauges.record(semconv.STALLED, idle_seconds)
            self._gauges.record(semconv.STALLS, 1)
            shown = " > ".join(f"{name} ({seconds:.1f} s)" for name, seconds in spans)
            _log.warning("vgen: %s has made no progress for %.1f s; open spans: %s", watched.call, idle_seconds, shown)
            if watched.progress_ns != start_ns:
                # Progress came while the stall was being set up, and `progressed` saw no stall that it could end.
                self.end_stall(watched)

    def _ensure_thread(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._stop.is_set():
                    self._thread = threading.Thread(target=self._run, name="vgen-stall", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(min(self._seconds / 10, 1.0)):
            self._check()


def _open_spans(span: Span | None) -> list[tuple[str, float]]:
    """The open spans of this process from the outermost to `span`: name and age in seconds."""
    now, spans = time.monotonic_ns(), list[tuple[str, float]]()
    while span is not None:
        if span.end_ns is None:
            spans.append((span.name, (now - span.start_ns) / 1e9))
        span = span.parent
    return spans[::-1]
