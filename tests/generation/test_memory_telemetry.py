"""Memory that a sleep frees, a wake-up allocates, and a leak."""

from __future__ import annotations

from vgen.profiling import semconv
from vgen.types import SleepReport

GIB = 1 << 30


def test_memory_given_back_and_taken_is_counted(generation, sink):
    for _ in range(2):
        generation.sleep(2)
        generation.wake_up(["weights"])
        generation.wake_up(["kv_cache"])
    freed = [m for m in sink.measurements if m.instrument is semconv.SLEEP_FREED]
    assert [m.values for m in freed] == [(1 << 20,)] * 2
    assert freed[0].attributes[semconv.SLEEP_LEVEL] == 2
    taken = [m.values[0] for m in sink.measurements if m.instrument is semconv.WAKE_TAKEN]
    assert len(taken) == 4
    assert min(taken) > 0
    resident = [m.values[0] for m in sink.measurements if m.instrument is semconv.MEMORY_RESIDENT]
    assert len(resident) == 6
    assert min(resident) > 1e6


def test_sleep_and_wake_say_what_was_expected_and_what_came_by_tag(generation, engine, sink):
    engine.reports["sleep"] = SleepReport(
        memory_freed=True,
        device_bytes=5 * GIB,
        host_bytes=2 * GIB,
        expected={"weights": 2 * GIB, "kv_cache": 3 * GIB},
        device_in_use=GIB,
    )
    engine.reports["wake_up"] = SleepReport(
        memory_freed=True, device_bytes=2 * GIB, host_bytes=GIB, expected={"weights": 2 * GIB}, taken={"weights": GIB}
    )
    generation.sleep(1)
    generation.wake_up(["weights"])
    slept, woke = sink.named(semconv.SLEEP)[0].attributes, sink.named(semconv.WAKE_UP)[0].attributes
    assert slept[semconv.SLEEP_LEVEL] == woke[semconv.SLEEP_LEVEL] == 1
    assert (slept[semconv.DEVICE_BYTES], slept[semconv.MEMORY_EXPECTED]) == (5 * GIB, 5 * GIB)
    assert (slept[semconv.WEIGHTS_EXPECTED], slept[semconv.KV_CACHE_EXPECTED]) == (2 * GIB, 3 * GIB)
    assert (slept[semconv.HOST_BYTES], slept[semconv.LEAKED]) == (2 * GIB, 0)
    assert woke[semconv.WAKE_TAGS] == ["weights"]
    assert (woke[semconv.WEIGHTS_BYTES], woke[semconv.WEIGHTS_EXPECTED]) == (GIB, 2 * GIB)
    assert woke[semconv.HOST_BYTES] == GIB
    assert semconv.KV_CACHE_BYTES not in woke
    assert semconv.KV_CACHE_EXPECTED not in woke


def test_an_engine_that_frees_nothing_says_that_and_no_bytes(generation, engine, sink):
    engine.reports |= {call: SleepReport(memory_freed=False) for call in ("sleep", "wake_up")}
    generation.sleep()
    generation.wake_up()
    for span in (*sink.named(semconv.SLEEP), *sink.named(semconv.WAKE_UP)):
        assert span.attributes[semconv.MEMORY_FREED] is False
        assert not {semconv.DEVICE_BYTES, semconv.MEMORY_EXPECTED, semconv.HOST_BYTES, semconv.LEAKED} & set(
            span.attributes
        )
    assert not [m for m in sink.measurements if m.instrument is semconv.LEAKED_TOTAL]


def test_what_later_sleeps_leave_in_use_is_a_leak_of_their_level(generation, engine, sink):
    for level, in_use in ((1, 1000), (2, 400), (1, 1000), (1, 1600), (1, 1200), (2, 400), (1, 1900), (2, 350)):
        engine.reports["sleep"] = SleepReport(memory_freed=True, device_in_use=in_use)
        generation.sleep(level)
        generation.wake_up()
    assert [span.attributes[semconv.LEAKED] for span in sink.named(semconv.SLEEP)] == [0, 0, 0, 600, 200, 0, 900, 0]
    leaked = [m for m in sink.measurements if m.instrument is semconv.LEAKED_TOTAL]
    assert [sum(m.values[0] for m in leaked if m.attributes[semconv.SLEEP_LEVEL] == n) for n in (1, 2)] == [900, 0]
