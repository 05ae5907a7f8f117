"""The life of an engine: its states, who may use it now, sleep and wake-up, pause and resume, close."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from ..engine_protocol import Engine, EngineState, PartlyAwake, PauseMode, StateMachine
from ..errors import EngineError, EngineStateError, VgenError
from ..profiling import DeviceTimer, ProfilingContext, Span, semconv
from ..types import SleepReport
from .memory_telemetry import LeakTracker, memory_attributes, record_memory
from .stalls import StallWatch, WatchedCall

TAGS = ("weights", "kv_cache")
"""The two kinds of memory that `sleep` frees and `wake_up` allocates, under vLLM's names."""
SYNC_SECONDS = 600.0
"""How long a generation waits for a weight sync in progress."""

_engine_numbers = itertools.count()


class PhaseTrace:
    """The `engine_protocol.SyncTrace` of a profiling context. Work on the device is timed as well."""

    def __init__(self, profiling: ProfilingContext, device: DeviceTimer, span: Span, watched: WatchedCall) -> None:
        self._profiling, self._device, self._span, self._watched = profiling, device, span, watched
        self.attributes: dict[str, Any] = {}
        """What `set` was called with: the span keeps nothing where profiling is off."""

    @contextmanager
    def phase(self, name: str, /) -> Generator[Span]:
        with (
            self._profiling.span(f"{semconv.WEIGHT_SYNC}.{name}") as span,
            self._watched.within(span),
            self._device.of(span),
        ):
            yield span

    def set(self, attributes: Mapping[str, Any], /) -> None:
        self.attributes |= attributes
        self._span.set(attributes)


class Lifecycle:
    """Guards an engine's state and traces every change of it.

    With an engine in this process one call runs at a time. A concurrent engine (servers) generates for any number of
    threads; all other calls still run one at a time. A call that cannot run now raises `EngineStateError`.
    """

    def __init__(
        self, engine: Engine, profiling: ProfilingContext, *, stale: bool, sleep_mode: bool, stall_seconds: float | None
    ) -> None:
        self._engine, self._profiling, self._sleep_mode = engine, profiling, sleep_mode
        self.weights_stale = stale
        """Whether the engine lacks the trainer's weights, so that they must be synced before the next generation."""
        self._device_timer = DeviceTimer(profiling)
        self._busy, self._process = threading.Lock(), os.getpid()
        self._generating: tuple[str, int] | None = None
        """The generation that has reserved the engine: its call, and the thread that began it."""
        self._asleep, self._level = set[str](), 0
        self.states = StateMachine()
        self.states.move("construction", EngineState.AWAKE)
        gauges = _observe(self.states, profiling)
        self._leaks = LeakTracker(profiling)
        self.watch = StallWatch(profiling, gauges, stall_seconds)
        weakref.finalize(self, self.watch.close)

    @contextmanager
    def exclusive(self, call: str) -> Iterator[None]:
        """Reserve the engine for a call that is not a generation. Raises `EngineStateError` if it is in use."""
        self._refuse_in_child(call)
        if not self._busy.acquire(blocking=False):
            raise self._in_use(call)
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def generating(self, call: str) -> Iterator[None]:
        """Reserve the awake engine for a generation.

        A concurrent engine is shared with other generations; this waits for a weight sync in progress. Any other
        engine is reserved for this thread alone; this waits for another thread's generation, and raises
        `EngineStateError` for a second one of the same thread, which would wait for itself.
        """
        self._refuse_in_child(call)
        if self._engine.concurrent:
            self.states.wait_while(EngineState.SYNCING, SYNC_SECONDS)
            self.states.require(call, EngineState.AWAKE)
            yield
            return
        self._refuse_within_generation(call)
        with self._busy:
            self._generating = call, threading.get_ident()
            try:
                self.states.require(call, EngineState.AWAKE)
                yield
            finally:
                self._generating = None

    def _refuse_in_child(self, call: str) -> None:
        """Raise `EngineStateError` in a forked child, which has neither the engine's threads nor its device."""
        if os.getpid() != self._process:
            hint = "a forked child cannot use it: construct it in the child, or start the process by spawn"
            raise EngineStateError(call, "in the process that constructed it", hint)

    def _in_use(self, call: str) -> EngineStateError:
        """The error of a call that finds the engine reserved: it says by what, and what must end first."""
        generation, thread = self._generating or ("", 0)
        where = "this thread" if thread == threading.get_ident() else "another thread"
        if generation == "stream":
            hint = "finish the stream's iterator, or call its close(), first"
            return EngineStateError(call, f"held by a stream that {where} has open", hint)
        if thread == threading.get_ident():
            return EngineStateError(call, "generating in this thread", "call it after generate() has returned")
        return EngineStateError(call, "at work in another thread", "wait for that call to return")

    def _refuse_within_generation(self, call: str) -> None:
        """Raise `EngineStateError` if this thread's own generation has reserved the engine: waiting would not end."""
        if self._generating is not None and self._generating[1] == threading.get_ident():
            raise self._in_use(call)

    def exclusive_within_generation(self) -> AbstractContextManager[object]:
        """Exclude other threads from a part of a generation. Without a concurrent engine they are excluded already."""
        return self._busy if self._engine.concurrent else nullcontext()

    @contextmanager
    def failing_when_broken(self, call: str) -> Iterator[None]:
        """Mark the engine as failed if the block raises `EngineError`.

        This holds for an engine in this process. A concurrent engine marks its servers one by one, because the others
        may still work.
        """
        try:
            yield
        except EngineError as error:
            if not self._engine.concurrent:
                self.states.fail(call, str(error))
            raise

    def syncing(self) -> AbstractContextManager[None]:
        """Be in the state `syncing` in the block, then in the state from before; `failed` if the block raises."""
        return self.states.during("sync_weights", EngineState.SYNCING, *self._resting_state())

    def _resting_state(self) -> tuple[EngineState, str]:
        """The engine's state, with its detail, when no call changes it."""
        if self._asleep:
            return EngineState.ASLEEP, f"level {self._level}"
        return EngineState.PAUSED if self.states.state is EngineState.PAUSED else EngineState.AWAKE, ""

    def require_weights_awake(self, call: str) -> None:
        """Raise `EngineStateError` if the memory for the weights is asleep."""
        if "weights" in self._asleep:
            raise EngineStateError(call, self.states.describe(), "call wake_up(['weights']) first")

    @contextmanager
    def watched_span(
        self, call: str, name: str, attributes: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Span, WatchedCall]]:
        """A span for the block, which is watched for stalls as the call named `call`."""
        with self._profiling.span(name, attributes) as span, self.watch.watching(call, span) as watched:
            yield span, watched

    def phase_trace(self, span: Span, watched: WatchedCall) -> PhaseTrace:
        """Records the phases of a sync or verification as children of `span`."""
        return PhaseTrace(self._profiling, self._device_timer, span, watched)

    def sleep(self, level: int) -> SleepReport:
        """See `Generation.sleep`."""
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        with self.exclusive("sleep"):
            self.states.require("sleep", EngineState.AWAKE)
            if not self._sleep_mode:
                # vLLM itself would report success and free nothing.
                raise EngineStateError("sleep", "awake", "construct with enable_sleep_mode=True")
            attributes = {semconv.SLEEP_LEVEL: level}
            with self.watched_span("sleep", semconv.SLEEP, attributes) as (span, _):
                self._level, start = level, time.monotonic()
                with self._failing("sleep"):
                    self.states.move("sleep", EngineState.ASLEEP, f"level {level}")
                    report = self._engine.sleep(level)
                self._asleep = set(TAGS)
                self.weights_stale = self.weights_stale or (level == 2 and report.memory_freed)
                report = replace(report, seconds=time.monotonic() - start)
                leaked = {semconv.LEAKED: self._leaks.note(level, report.device_in_use)}
                span.set({**memory_attributes(report), **leaked, **record_memory(self._profiling)})
                self._profiling.record(semconv.SLEEP_FREED, max(report.device_bytes or 0, 0), **attributes)
        return report

    def wake_up(self, tags: Sequence[str] | None) -> SleepReport:
        """See `Generation.wake_up`."""
        for tag in tags or ():
            if tag not in TAGS:
                raise ValueError(f"tags must be among {', '.join(TAGS)}, got {tag!r}")
        with self.exclusive("wake_up"):
            self.states.require("wake_up", EngineState.ASLEEP)
            start = time.monotonic()
            woken = [tag for tag in TAGS if tag in (tags or TAGS)]
            attributes = {semconv.WAKE_TAGS: woken, semconv.SLEEP_LEVEL: self._level}
            with self.watched_span("wake_up", semconv.WAKE_UP, attributes) as (span, watched):
                report = self._wake(woken)
                with self._failing("wake_up"):
                    if not self._asleep:
                        self._engine.verify_deferred(self.phase_trace(span, watched))
                self.states.move("wake_up", *self._resting_state())
                report = replace(report, seconds=time.monotonic() - start)
                restored = {semconv.RESTORED: self.weights_stale or None}
                span.set({**memory_attributes(report), **restored, **record_memory(self._profiling)})
                self._profiling.record(semconv.WAKE_TAKEN, max(report.device_bytes or 0, 0))
        return report

    def _wake(self, tags: Sequence[str]) -> SleepReport:
        """Wake these tags. After an error those that have not woken are asleep, and waking may be tried again.

        vLLM goes on where it stopped: it knows of each allocation whether it is asleep.
        """
        self.states.move("wake_up", EngineState.WAKING, f"level {self._level}")
        try:
            report = self._engine.wake_up(tags)
        except BaseException as error:
            self._asleep -= set(error.woken if isinstance(error, PartlyAwake) else ())
            self.states.restore(EngineState.ASLEEP, f"level {self._level}")
            if isinstance(error, EngineStateError) or not isinstance(error, Exception):
                raise
            reason = str(error) if isinstance(error, PartlyAwake | VgenError) else f"{type(error).__name__}: {error}"
            raise EngineError(
                f"wake_up failed, still asleep: {', '.join(sorted(self._asleep))} ({reason}). Free memory and call "
                "wake_up() again. If the same error comes with enough memory, close() the engine and construct another"
            ) from error
        self._asleep -= set(tags)
        return report

    def pause(self, mode: PauseMode) -> None:
        """See `Generation.pause`."""
        with self.exclusive("pause"):
            self.states.require("pause", EngineState.AWAKE)
            with self.watched_span("pause", semconv.PAUSE, {semconv.PAUSE_MODE: mode}), self._failing("pause"):
                self._engine.pause(mode)
                self.states.move("pause", EngineState.PAUSED)

    def resume(self) -> None:
        """See `Generation.resume`."""
        with self.exclusive("resume"):
            self.states.require("resume", EngineState.PAUSED)
            with self.watched_span("resume", semconv.RESUME) as (span, watched), self._failing("resume"):
                self._engine.resume()
                self._engine.verify_deferred(self.phase_trace(span, watched))
                self.states.move("resume", EngineState.AWAKE)

    def close(self) -> None:
        """Wait for the call in progress, then close the engine. A second call does nothing.

        Raises `EngineStateError` within a generation of the same thread.
        """
        if self.states.state is EngineState.CLOSED or os.getpid() != self._process:
            return  # a forked child has nothing to close: the engine is its parent's
        self._refuse_within_generation("close")
        with self._busy, self.watched_span("close", semconv.ENGINE_CLOSE):
            self.states.move("close", EngineState.CLOSED)
            self._engine.close()
        self.watch.close()

    @contextmanager
    def _failing(self, call: str) -> Iterator[None]:
        """Mark the engine as failed if the block raises, except for `EngineStateError`.

        With `EngineStateError` the engine says that it refused the call and changed nothing.
        """
        before = self.states.state, self.states.detail
        try:
            yield
        except EngineStateError:
            self.states.restore(*before)
            raise
        except BaseException as error:
            self.states.fail(call, f"{call} raised {type(error).__name__}")
            if isinstance(error, VgenError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"the engine failed in {call}: {type(error).__name__}") from error


def _observe(states: StateMachine, profiling: ProfilingContext) -> ProfilingContext:
    """Export the state and its age as gauges, and record each transition. Returns the context for engine gauges.

    The gauges are callbacks: a scrape reads what is true at that moment, also while nothing happens.
    """
    gauges = profiling.bind({semconv.ENGINE_NUMBER: next(_engine_numbers)})
    gauges.observe(semconv.ENGINE_STATE, states.number)
    gauges.observe(semconv.ENGINE_STATE_AGE, states.age)
    states.on_transition = partial(_record_transition, gauges)
    return gauges


def _record_transition(gauges: ProfilingContext, old: EngineState, new: EngineState) -> None:
    """Add an event to the open span, and a measurement for sinks that nobody scrapes."""
    if (span := gauges.current_span()) is not None:
        span.event(semconv.STATE_CHANGED, {semconv.STATE_FROM: str(old), semconv.STATE: str(new)})
    gauges.record(semconv.ENGINE_STATE, semconv.STATES.index(new))
