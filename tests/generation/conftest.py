"""A generation object around an engine without a model. The real engine is in tests/real."""

from __future__ import annotations

import pytest
from helpers.sources import SmallSource

from vgen import Generation, ProfilingContext
from vgen.testing import FakeEngine, MemorySink


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def profiling(sink: MemorySink) -> ProfilingContext:
    return ProfilingContext([sink])


@pytest.fixture
def generation(engine: FakeEngine, profiling: ProfilingContext) -> Generation:
    return Generation(engine, SmallSource(), profiling=profiling)
