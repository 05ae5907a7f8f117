"""A worker's error as text, and back."""

from __future__ import annotations

import json

import pytest

from vgen import WeightSyncError
from vgen.weights.transports.sync_errors import UPDATE_OPEN, as_sync_error, to_text


@pytest.mark.parametrize("problem", ["plain", 'it\'s "quoted"', "two\nlines \\ {} 'x', please check", "größer", ""])
@pytest.mark.parametrize("around", ["%s", "500: Worker failed with error '%s', please check the stack trace above"])
def test_every_field_comes_back_from_anywhere_in_a_text(problem, around):
    error = WeightSyncError(problem, phase="load", parameter="a.b", receiver="server", reason=UPDATE_OPEN)
    text = around % to_text(error)
    through_http = json.loads(json.dumps({"error": {"message": text}}))["error"]["message"]
    read = as_sync_error(RuntimeError(through_http), receiver="http://a:8000")
    assert (read.problem, read.phase, read.parameter, read.reason) == (problem, "load", "a.b", UPDATE_OPEN)
    assert read.receiver == "http://a:8000"
    assert "\n" not in to_text(error)


def test_a_long_problem_is_cut_so_that_the_text_fits_in_an_answer_that_is_cut():
    text = to_text(WeightSyncError("x" * 5000, phase="load", parameter="a.b", receiver="server"))
    read = as_sync_error(RuntimeError(f"500: {text}"[:2000]))
    assert read.parameter == "a.b"
    assert len(read.problem) > 1000


def test_any_other_text_is_an_error_of_the_callers_phase():
    read = as_sync_error(ValueError("no marker"), phase="load", receiver="a")
    assert (read.problem, read.phase, read.parameter, read.reason) == ("no marker", "load", None, None)
    assert as_sync_error(EOFError()).problem == "EOFError"
    cut = to_text(WeightSyncError("cut in the middle", phase="verify", receiver="server"))[:-5]
    assert as_sync_error(RuntimeError(cut)).phase == "transfer"


def test_a_sync_error_is_itself():
    error = WeightSyncError("x", phase="gather")
    assert as_sync_error(error, phase="load") is error
