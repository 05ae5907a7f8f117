"""A span's own methods: what may be added while it is open, and its times."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from helpers.clock import Clock

from vgen.profiling import ProfilingContext


def test_a_span_that_has_ended_does_not_change(profiling: ProfilingContext):
    with profiling.span("x") as span:
        pass
    span.set(a=1).event("e").link(span)
    assert (span.attributes, span.events, span.links) == ({}, (), ())


def test_times_are_monotonic_and_anchored_once_to_the_wall_clock(profiling: ProfilingContext, monkeypatch):
    clock, wall = Clock(monkeypatch), 10**18
    monkeypatch.setattr(time, "time_ns", lambda: wall)
    with profiling.span("outer") as outer:
        clock.advance(0.25)
        wall -= 3600 * 10**9  # it is set back by an hour
        with profiling.span("inner") as inner:
            clock.advance(0.5)
    assert (inner.duration, outer.duration) == (0.5, 0.75)
    assert (outer.start_unix_ns, outer.end_unix_ns) == (10**18, 10**18 + 750_000_000)
    assert (inner.start_unix_ns, inner.offset_ns) == (10**18 + 250_000_000, outer.offset_ns)


def test_a_parents_attributes_may_be_set_from_many_threads(profiling: ProfilingContext):
    def work(worker: int) -> None:
        for n in range(200):
            outer.set({f"{worker}.{n}": n}).event("e").link(outer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool, profiling.span("outer") as outer:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(outer.attributes) == len(outer.events) == len(outer.links) == 800
