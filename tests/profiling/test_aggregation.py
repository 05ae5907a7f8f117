"""Aggregates: true to their accuracy, merged exactly, whatever the values are."""

from __future__ import annotations

import json
import math
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.profiling import Instrument, ProfilingContext
from vgen.profiling.aggregation import ACCURACY, Histogram, Row

HISTOGRAM = Instrument("h", "histogram", "s")
COUNTER = Instrument("c", "counter")
GAUGE = Instrument("g", "gauge")
QUANTILES = [n / 20 for n in range(21)]

durations = st.floats(1e-7, 1e4)
usual = (
    durations | st.floats(-1e9, 1e9) | st.integers(-(2**40), 2**40) | st.sampled_from([math.nan, math.inf, -math.inf])
)
anything = st.floats() | st.integers(-(2**70), 2**70)


def of(values: list[float]) -> Histogram:
    made = Histogram()
    made.extend(values)
    return made


@given(st.lists(durations, min_size=1, max_size=200), st.sampled_from(QUANTILES))
def test_quantiles_are_within_the_accuracy(values: list[float], q: float):
    exact = sorted(values)[math.floor(q * (len(values) - 1))]
    assert of(values).quantile(q) == pytest.approx(exact, rel=ACCURACY * 1.0001)


of_ranks = st.lists(st.lists(usual, max_size=60), min_size=1, max_size=5) | st.lists(
    st.lists(anything, max_size=4), max_size=3
)


@given(of_ranks)
@settings(max_examples=60, deadline=None)
def test_merging_ranks_is_exactly_the_sketch_of_all_values(ranks: list[list[float]]):
    """By way of JSON, in any grouping: not near it, the same."""
    everything = of([value for values in ranks for value in values])
    merged = Row()
    for values in ranks:
        row = Row()
        row.record(HISTOGRAM, values) if values else None
        merged.merge(Row.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))))
    found = merged.histogram("h") or Histogram()
    assert (found.count, found.nonfinite) == (everything.count, everything.nonfinite)
    assert (found.minimum, found.maximum) == (everything.minimum, everything.maximum)
    for q in QUANTILES:
        one, other = found.quantile(q), everything.quantile(q)
        assert one == other or (math.isnan(one) and math.isnan(other))
    if abs(everything.total) < 1e300 and max(map(abs, (0.0, everything.minimum, everything.maximum))) < 1e300:
        scale = max((abs(v) for values in ranks for v in values if math.isfinite(v)), default=0.0)
        assert found.total == pytest.approx(everything.total, rel=1e-12, abs=scale * 1e-12)


@pytest.mark.slow
@given(of_ranks)
@settings(max_examples=200, deadline=None)
def test_merging_many_ranks_is_exactly_the_sketch_of_all_values(ranks: list[list[float]]):
    test_merging_ranks_is_exactly_the_sketch_of_all_values.hypothesis.inner_test(ranks)


def test_merging_is_no_average_of_percentiles():
    fast, slow = of([0.01] * 990), of([10.0] * 10)
    fast.merge(slow)
    assert fast.quantile(0.5) == pytest.approx(0.01, rel=ACCURACY)
    assert fast.quantile(0.999) == pytest.approx(10.0, rel=ACCURACY)


@given(st.lists(usual, max_size=30) | st.lists(anything, max_size=4))
@settings(deadline=None)
def test_no_value_breaks_a_summary(values: list[float]):
    row = Row()
    for instrument in (HISTOGRAM, COUNTER, GAUGE):
        for value in values:
            row.record(instrument, (value,))
    summary = row.summary()
    odd = sum(not math.isfinite(value) for value in values)
    assert summary.get("h.nonfinite", 0) == summary.get("c.nonfinite", 0) == odd
    assert summary.get("h.count", 0) == len(values) - odd
    assert not math.isnan(summary.get("c", 0.0))
    json.dumps(row.to_dict(), allow_nan=False)


def test_values_at_the_ends_of_floats_range():
    huge, tiny = 1.7976931348623157e308, 5e-324
    for value in (huge, -huge, tiny, -tiny, 0.0, 2.2250738585072014e-308):
        histogram = of([value] * 3)
        assert [histogram.quantile(q) for q in (0, 0.5, 1)] == [value] * 3
    summary = of([huge] * 10).summary("h")
    assert summary["h.sum"] == math.inf


def test_a_summarys_percentiles_are_those_that_their_names_say():
    summary = of([float(n) for n in range(1, 10_001)]).summary("h")
    for percent in (50, 90, 99):
        assert summary[f"h.p{percent}"] == pytest.approx(percent * 100, rel=ACCURACY * 1.1)


def test_nothing_was_measured():
    assert Row().summary() == {}
    assert math.isnan(Histogram().quantile(0.5))
    assert Row.from_dict(Row().to_dict()).summary() == {}


def test_rows_merge_whole():
    """Histograms and counters of all, the later gauge; what was merged in stays as it was."""
    rows = [Row(), Row()]
    for n, row in enumerate(rows, start=1):
        row.add("work", n / 10)
        row.record(COUNTER, (n, n))
        row.record(GAUGE, (n,))
        row.close()
    total = Row()
    for row in rows:
        total.merge(row)
        total.merge(Row.from_dict(row.to_dict()))
    summary = total.summary()
    assert (summary["c"], summary["g"], summary["work.duration.count"]) == (12, 2, 4)
    assert (summary["work.duration.min"], summary["work.duration.max"]) == (0.1, 0.2)
    assert rows[0].summary()["c"] == 2


def test_a_steps_row_travels_as_plain_json():
    profiling = ProfilingContext()
    with profiling.step(1) as step:
        profiling.record(GAUGE, math.nan)
        profiling.record_many(HISTOGRAM, [0.5, 1.5, math.inf])
    received = Row.from_dict(json.loads(json.dumps(step.row.to_dict(), allow_nan=False))).summary()
    sent = step.summary()
    assert received.keys() == sent.keys()
    assert all(received[k] == sent[k] or math.isnan(sent[k]) for k in sent)
    assert profiling.run.to_dict()["histograms"]["h"]["count"] == 2


def test_sketches_of_another_accuracy_are_refused():
    with pytest.raises(ValueError, match="accuracy"):
        Row.from_dict({**Row().to_dict(), "accuracy": 0.01})


def test_rows_may_be_merged_both_ways_at_once_and_into_themselves():
    one, other = Row(), Row()
    one.record(COUNTER, (1,))
    one.merge(one)
    assert one.summary()["c"] == 2
    threads = [
        threading.Thread(target=lambda a=a, b=b: [a.merge(b) for _ in range(200)], daemon=True)
        for a, b in ((one, other), (other, one))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_no_value_is_lost_between_threads():
    row, each = Row(), 20_000

    def work() -> None:
        for _ in range(each):
            row.add("x", 1.0)
            row.record(COUNTER, (1,))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        row.summary()
        threads[0].join(0.001)  # a moment for the others
    assert row.summary()["c"] == row.summary()["x.duration.count"] == 4 * each


def test_a_signal_handler_may_measure_while_its_thread_is_summing_up():
    row = Row()
    handled = own = 0

    def handle(*_: object) -> None:
        nonlocal handled
        handled += 1
        row.record(COUNTER, (1,))
        row.record(HISTOGRAM, (1.0,))
        row.summary()

    row.summary()
    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        while handled <= 200 and own < 500_000:
            own += 1
            row.record(COUNTER, (1,))
            row.record(HISTOGRAM, (1.0, 2.0))
            row.summary()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled > 200
    assert row.summary()["c"] == handled + own
    assert row.summary()["h.count"] == handled + 2 * own


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.5], [0.25, 0.5, 1.0], [-1.0, -0.5, 0.0], [-2.0, 0.0, 2.0], [1.0, 1.0]])
def test_small_values_zeros_and_negative_ones_are_all_in_the_percentiles(values: list[float]):
    made = of(values)
    for place, value in enumerate(values):
        assert made.quantile(place / (len(values) - 1)) == pytest.approx(value, rel=ACCURACY * 1.1)
    again = Histogram.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict()
    assert made.to_dict()["zeros"] == values.count(0)
