"""When requests ran, and the slowest of them."""

from __future__ import annotations

import random

import pytest
from helpers.handmade import BEGIN, Writer, ns

from vgen.profiling import semconv
from vgen.recordings.reader.recording import Recording
from vgen.recordings.reader.requests import SLOWEST


def test_the_slowest_are_those_of_a_plain_sort(tmp_path):
    dice, writer, everything = random.Random(3), Writer(tmp_path), []
    for number in (1, 2):
        step = writer.step(number, 100 * number, 100 * number + 90)
        seconds = [dice.uniform(0, 10) for _ in range(40)]
        everything += seconds
        requests = [(100 * number, 100 * number + took) for took in seconds]
        writer.generate(step, 100 * number, 100 * number + 80, requests, spans=40)
    recording = Recording(tmp_path)
    assert recording.requests.spans == 80
    shown = [slow.seconds for slow in recording.requests.slowest()]
    assert shown == pytest.approx(sorted(everything, reverse=True)[:SLOWEST])
    rows = [row for row in range(len(recording.name)) if recording.span_name(row) == semconv.STEP]
    for row, seconds in zip(rows, (everything[:40], everything[40:]), strict=True):
        of_step = [slow.seconds for slow in recording.requests.slowest_of(recording.key(row))]
        assert of_step == pytest.approx(sorted(seconds, reverse=True)[:SLOWEST])


@pytest.mark.parametrize("call_first", [True, False])
def test_times_come_from_the_start_of_the_call_whenever_its_span_comes(tmp_path, call_first):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    attributes = {semconv.ENGINE_CALL.replace(".", "__"): "ab" * 8, semconv.SERVER.replace(".", "__"): "http://a"}

    def call():
        writer.span(semconv.ENGINE_GENERATE, 2, 9, under=step, span_id="ab" * 8)

    if call_first:
        call()
    writer.measure(semconv.REQUEST_START, [0.5, 1.0], under=step, **attributes)
    writer.measure(semconv.REQUEST_E2E, [3.0, 4.0], under=step, **attributes)
    if not call_first:
        call()
    (times,) = Recording(tmp_path).requests.times.values()
    assert list(times.starts) == [BEGIN + ns(2.5), BEGIN + ns(3)]
    assert list(times.ends) == [BEGIN + ns(5.5), BEGIN + ns(7)]
    last, histogram = times.servers["http://a"]
    assert (last, histogram.count) == (BEGIN + ns(7), 2)


def test_starts_without_seconds_and_numbers_that_do_not_match_give_no_times(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    call = {semconv.ENGINE_CALL.replace(".", "__"): "ab" * 8}
    writer.span(semconv.ENGINE_GENERATE, 2, 9, under=step, span_id="ab" * 8)
    writer.measure(semconv.REQUEST_START, [0.5], under=step, **call)
    writer.measure(semconv.REQUEST_E2E, [3.0, 4.0], under=step, **call)
    writer.measure(semconv.REQUEST_START, [0.5], under=step, **call)
    assert Recording(tmp_path).requests.times == {}


def test_times_of_a_clock_that_is_put_right_move_together(tmp_path):
    writer = Writer(tmp_path)
    step = writer.step(1, 0, 10)
    writer.generate(step, 2, 9, [(3.0, 5.0)], server="http://a")
    recording = Recording(tmp_path)
    ((trace, _), number), times = next(iter(recording.requests.times.items()))
    recording.requests.shift(number, {trace: ns(7)})
    recording.requests.shift(number + 1, {trace: ns(100)})
    recording.requests.shift(number, {trace + 1: ns(100)})
    assert (list(times.starts), list(times.ends)) == ([BEGIN + ns(10)], [BEGIN + ns(12)])
    assert times.servers["http://a"][0] == BEGIN + ns(12)
