"""Figures as records, and the same figures read back from the JSON of a report."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from helpers.handmade import usual_run

from vgen.recordings.report.figure_types import RunFigures, SleepCycle, from_json
from vgen.recordings.report.figures import summarize


def test_a_run_comes_back_from_its_json(tmp_path):
    figures = summarize(usual_run(tmp_path))
    assert figures.steps[0].tail is not None
    assert from_json(RunFigures, json.loads(json.dumps(asdict(figures)))) == figures


def test_of_another_version_unknown_keys_are_ignored_and_missing_ones_take_the_default():
    cycle = SleepCycle(1, "rank 0", 1, 0.5, 100, None, None, wake_seconds=2.0)
    known = {key: value for key, value in asdict(cycle).items() if key != "taken_bytes"}
    assert from_json(SleepCycle, {**known, "later": 1}) == cycle


@pytest.mark.parametrize("value", [[], [1], "steps", 7, {"steps": 7}, {"steps": [1]}, {"total": {"phases": []}}])
def test_anything_else_is_refused(value: object):
    with pytest.raises((TypeError, AttributeError)):
        from_json(RunFigures, value)
