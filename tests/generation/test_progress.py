"""The progress bar of a long call."""

from __future__ import annotations

import io
import sys

import pytest

from vgen.generation import progress
from vgen.generation.progress import progress_bar


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_it_counts_completions_and_tokens_and_ends_with_the_call(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    # Not in a fixture: pytest sets it again before the test.
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    with progress_bar(3, enabled=True) as done:
        done(10)
        done(10)
    shown = stderr.getvalue()
    assert "2/3" in shown
    assert "tokens/s" in shown
    assert "\x1b[?25h" in shown[-20:]  # the cursor is shown again


def test_a_short_call_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    with progress_bar(1, enabled=True) as done:
        done(10)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_shown_where_there_is_no_terminal_or_nobody_asked(monkeypatch, enabled):
    terminal = io.StringIO() if enabled else Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with progress_bar(1, enabled=enabled) as done:
        done(10)
    assert terminal.getvalue() == ""
