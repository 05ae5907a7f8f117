"""An engine's states as telemetry."""

from __future__ import annotations

import itertools
from functools import partial

from ..engines.base import EngineState, StateMachine
from ..profiling import ProfilingContext, names

_engines = itertools.count()


def gauges_of(states: StateMachine, profiling: ProfilingContext) -> ProfilingContext:
    """Observe the state and its age, and note every transition from now on; returns the context for engine gauges.

    The gauges are asked, not told: whoever scrapes them reads what is true then, also while nothing happens.
    """
    gauges = profiling.bind({names.ENGINE_NUMBER: next(_engines)})
    gauges.observe(names.ENGINE_STATE, states.number)
    gauges.observe(names.ENGINE_STATE_AGE, states.age)
    states.moved = partial(_note, gauges)
    return gauges


def _note(gauges: ProfilingContext, was: EngineState, now: EngineState) -> None:
    """On the open span; and as a value, for records that are read and not scraped."""
    if (span := gauges.current_span()) is not None:
        span.event(names.STATE_CHANGED, {names.STATE_FROM: str(was), names.STATE: str(now)})
    gauges.record(names.ENGINE_STATE, names.STATES.index(now))
