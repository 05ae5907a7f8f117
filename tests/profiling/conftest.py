"""What the profiling tests share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from vgen.profiling import ProfilingContext, Sink, sink_pipeline
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


class Waits(list[float]):
    """How many seconds `flush` and `close` were ready to wait, one number for each sink that they waited for.

    A deadline is kept if a sink that hangs is waited for first and the sum is within it. This does not depend on what
    else the machine does.
    """

    meanwhile: Callable[[], object] = staticmethod(lambda: None)
    """Called at the beginning of each wait."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[bool] = []
        """Whether the sink had done what it was waited for."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()

    class Noted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            waits.meanwhile()
            waits.ended.append(super().wait(timeout))
            return waits.ended[-1]

    class Command(sink_pipeline.Command):
        def __init__(self, method: str, deadline: float) -> None:
            super().__init__(method, deadline)
            self.done = Noted()

    monkeypatch.setattr(sink_pipeline, "Command", Command)
    return waits
