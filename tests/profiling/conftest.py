"""What the profiling tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vgen.profiling import ProfilingContext, Sink
from vgen.profiling.sinks.memory import MemorySink


@pytest.fixture
def memory() -> MemorySink:
    return MemorySink()


@pytest.fixture
def profiling(memory: MemorySink) -> Iterator[ProfilingContext]:
    """A context whose records are in `memory`."""
    with ProfilingContext([memory]) as made:
        yield made


@pytest.fixture
def contexts() -> Iterator[Callable[..., ProfilingContext]]:
    """Makes contexts over sinks that may misbehave, and lets go of them afterwards without waiting."""
    made: list[ProfilingContext] = []

    def make(*sinks: Sink, **more: object) -> ProfilingContext:
        made.append(ProfilingContext(sinks, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for context in made:
        context.close(0.1)
