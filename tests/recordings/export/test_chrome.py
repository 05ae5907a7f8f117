"""Chrome's trace events, read back by what their format says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.recordings.export.chrome import tracks
from vgen.recordings.reader.run import SpanRecord


def test_chrome_reloaded(exported, spans):
    whole = exported("chrome")
    events = whole["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(spans) == 2 * 9
    begin = min(span.start_ns for span in spans.values())
    for event in slices:
        span = spans[event["args"]["span_id"]]
        assert event["name"] == span.name
        assert event["ts"] == pytest.approx((span.start_ns - begin) / 1e3)
        if span.end_ns is not None:
            assert event["dur"] == pytest.approx((span.end_ns - span.start_ns) / 1e3)
        else:
            assert event["args"]["unended"] is True
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"rank 0 on host0", "rank 1 on host1"}
    assert len({event["pid"] for event in events}) == 2
    assert [event["name"] for event in events if event["ph"] == "i"] == ["exception"] * 2
    # Perfetto's rule: on a track, slices lie within each other or apart
    for track in {(event["pid"], event["tid"]) for event in slices}:
        stack: list[float] = []
        for event in sorted(
            (one for one in slices if (one["pid"], one["tid"]) == track), key=lambda one: (one["ts"], -one["dur"])
        ):
            while stack and stack[-1] <= event["ts"] + 1e-6:
                stack.pop()
            assert not stack or event["ts"] + event["dur"] <= stack[-1] + 1e-6, event
            stack.append(event["ts"] + event["dur"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(-1, 5)), max_size=25))
def test_slices_of_a_track_never_cross(parts):
    spans: list[SpanRecord] = []
    for index, (start, length, parent) in enumerate(sorted(parts)):
        above = f"{parent}" if 0 <= parent < index else None
        spans.append(SpanRecord("x", "t", f"{index}", above, start, start + length, {}))
    by_track: dict[int, list[SpanRecord]] = {}
    for span, number in zip(spans, tracks(spans, 100), strict=True):
        by_track.setdefault(number, []).append(span)
    for track in by_track.values():
        for index, first in enumerate(track):
            for second in track[index + 1 :]:
                assert second.start_ns >= (first.end_ns or 0) or (second.end_ns or 0) <= (first.end_ns or 0)


def test_ten_thousand_requests_at_once_take_seconds_not_minutes(tmp_path):
    spans = [SpanRecord("x", "t", f"{index}", "p", 0, 100 + index, {}) for index in range(10_000)]
    assert len(set(tracks(spans, 0))) == 10_000
    one_by_one = [SpanRecord("x", "t", f"{index}", None, index, index + 1, {}) for index in range(10_000)]
    assert set(tracks(one_by_one, 0)) == {0}
