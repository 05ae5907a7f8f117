"""A span's own methods: what may be added while it is open, and its times."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from vgen.profiling import ProfilingContext


def test_a_span_that_has_ended_does_not_change(profiling: ProfilingContext):
    with profiling.span("x") as span:
        pass
    span.set(a=1).event("e").link(span)
    assert (span.attributes, span.events, span.links) == ({}, (), ())


def test_times_are_monotonic_and_anchored_to_the_wall_clock(profiling: ProfilingContext):
    before, start = time.time_ns(), time.perf_counter()
    with profiling.span("outer") as outer, profiling.span("inner") as inner:
        time.sleep(0.01)
    took, after = time.perf_counter() - start, time.time_ns()
    assert 0.01 <= inner.duration <= outer.duration <= took
    assert outer.offset_ns == inner.offset_ns
    assert before - 1_000_000 <= outer.start_unix_ns <= outer.end_unix_ns <= after + 1_000_000


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
