"""The error of a source that cannot provide the trainer's weights."""

from __future__ import annotations

from ...errors import WeightSyncError


def gather_error(problem: str, parameter: str | None = None) -> WeightSyncError:
    """The error to raise when the trainer's side fails, with the parameter or module path that it concerns."""
    return WeightSyncError(problem, phase="gather", parameter=parameter, receiver="trainer")
