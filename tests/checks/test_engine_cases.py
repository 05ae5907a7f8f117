"""The cases of engines with other options and architectures."""

from __future__ import annotations

from vgen.checks.engine_cases import ENGINE_CASES

CASES = {case.name: case for case in ENGINE_CASES}


def test_the_table():
    assert len(CASES) == len(ENGINE_CASES)
    assert sum("CUDA" in case.needs for case in ENGINE_CASES) >= 15
    for case in ENGINE_CASES:
        assert case.summary.endswith(".")
