"""The life of an engine: its states, who may use it now, sleep and wake-up, pause and resume, close."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ..arguments import number, shown
from ..engine_protocol import Engine, EngineState, PartlyAwake, PauseMode, StateMachine
from ..errors import ArgumentError, EngineError, EngineStateError, VgenError
from ..profiling import DeviceTimer, ProfilingContext, Span, semconv
from ..types import SleepReport
from .engine_use import EngineUse
from .memory_telemetry import LeakTracker, memory_attributes, record_memory
from .stalls import StallWatch, WatchedCall

TAGS = ("weights", "kv_cache")
"""The two kinds of memory that `sleep` frees and `wake_up` allocates, under vLLM's names."""
LONGEST_WAIT = 1e6
"""The most seconds that a caller may have `sleep` wait."""

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
    """Guards an engine's state and traces every change of it. A call that does not fit raises `EngineStateError`."""

    def __init__(
        self, engine: Engine, profiling: ProfilingContext, *, stale: bool, sleep_mode: bool, stall_seconds: float | None
    ) -> None:
        self._engine, self._profiling, self._sleep_mode = engine, profiling, sleep_mode
        self.weights_stale = stale
        """Whether the engine lacks the trainer's weights, so that they must be synced before the next generation."""
        self._device_timer = DeviceTimer(profiling)
        self._asleep, self._level = set[str](), 0
        self.states = StateMachine()
        self._use = EngineUse(self.states, concurrent=engine.concurrent)
        self.exclusive, self.generating = self._use.exclusive, self._use.generating
        self.exclusive_within_generation = self._use.exclusive_within_generation
        self.states.move("construction", EngineState.AWAKE)
        gauges = _observe(self.states, profiling)
        self._leaks = LeakTracker(profiling)
        self.watch = StallWatch(profiling, gauges, stall_seconds)
        weakref.finalize(self, self.watch.close)

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

    def sleep(self, level: int, wait_seconds: float | None) -> SleepReport:
        """See `Generation.sleep`."""
        if level not in (1, 2):
            raise ArgumentError("level", f"must be 1 or 2, got {shown(level)}")
        rule = f"a number of seconds from 0 to {LONGEST_WAIT:g}, or None"
        wait_seconds = number("wait_seconds", wait_seconds or 0, lambda value: 0 <= value <= LONGEST_WAIT, rule)
        if self.states.state is not EngineState.SYNCING:  # a sync of another thread will end
            self.states.require("sleep", EngineState.AWAKE)
        with self._use.alone("sleep", wait_seconds):
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
                raise ArgumentError("tags", f"must be among {', '.join(TAGS)}, got {shown(tag)}")
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
        if self.states.state is EngineState.CLOSED or self._use.inherited:
            return  # a forked child has nothing to close: the engine is its parent's
        if not self._engine.concurrent:
            self._use.refuse_within_generation("close")
        with self._use.busy, self.watched_span("close", semconv.ENGINE_CLOSE):
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
