"""How many ran at once, and the tail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgen.recordings.report.tail import Curve, Tails, merged

SECOND = 10**9
requests = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=20)


@given(requests, st.integers(0, 60), st.integers(1, 30))
def test_the_curve_is_what_counting_gives(found, begin, length):
    stretches = [(start, start + took) for start, took in found]
    curve = Curve([start for start, _ in stretches], [end for _, end in stretches])
    running = [sum(start <= at < end for start, end in stretches) for at in range(100)]
    assert curve.mean(begin, begin + length) == pytest.approx(sum(running[begin : begin + length]) / length)
    assert curve.peak() == max(running)
    bins = curve.bins(0, 60, 6)
    assert bins == pytest.approx([sum(running[at : at + 10]) / 10 for at in range(0, 60, 10)])


def tail_of(ends: list[float], end: float | None = None):
    starts = [0] * len(ends)
    until = int((end if end is not None else max(ends)) * SECOND)
    return Tails(starts, [int(one * SECOND) for one in ends], [(0, until)]).tail()


def test_three_in_a_hundred_that_take_41_percent():
    found = tail_of([5.9] * 97 + [10.0] * 3)
    assert found is not None
    assert (found.last, found.sequences, found.seconds) == (3, 100, pytest.approx(4.1))
    assert found.running == pytest.approx(3.0)
    assert found.mean == pytest.approx((97 * 5.9 + 30) / 10)
    assert found.sentence == (
        "the last 3 % of sequences took 41 % of generation (4.10 of 10.00 s), 3.0 running on average where 100 had run"
    )


def test_of_few_sequences_the_number_is_said():
    found = tail_of([1.0] * 31 + [10.0])
    assert found is not None
    assert found.sentence.startswith("the last 1 of 32 sequences took 90 % of generation (9.00 of 10.00 s)")


def test_sequences_that_end_together_are_no_tail():
    for ends in ([10.0] * 50, [index / 5 for index in range(1, 51)]):
        found = tail_of(ends)
        assert found is not None
        assert not found.long
        assert found.sentence.startswith("no long tail: the last 10 % of sequences took ")


def test_calls_one_after_the_other_each_have_their_tail():
    starts = [0] * 10 + [100 * SECOND] * 10
    ends = [SECOND] * 9 + [4 * SECOND] + [101 * SECOND] * 9 + [106 * SECOND]
    found = Tails(starts, ends, [(0, 4 * SECOND), (100 * SECOND, 106 * SECOND)]).tail()
    assert found is not None
    assert (found.last, found.seconds, found.generation_seconds) == (2, pytest.approx(8), pytest.approx(10))
    # added up from two steps it is the same
    whole = Tails(starts[:10], ends[:10], [(0, 4 * SECOND)])
    whole.add(Tails(starts[10:], ends[10:], [(100 * SECOND, 106 * SECOND)]))
    assert whole.tail() == found


def test_one_sequence_or_none():
    assert Tails().tail() is None
    found = tail_of([3.0])
    assert found is not None
    assert not found.long


def test_merged():
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
