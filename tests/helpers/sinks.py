"""Sinks for tests: one as a user would write it, and ones that misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vgen.profiling import Measurement, Sink, Span, Step
from vgen.profiling.measurement import Attributes

RECORDS = ("on_start", "on_end", "on_measurement", "on_step")
COMMANDS = ("flush", "close")


class Recorder(Sink):
    """A sink as a user writes one: it overrides everything, has a queue, and notes each call."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.threads: set[int] = set()

    def _note(self, what: str, name: str = "") -> None:
        self.told.append((what, name))
        self.threads.add(threading.get_ident())

    def on_start(self, span: Span, attributes: Attributes) -> None:
        self._note("start", span.name)

    def on_end(self, span: Span) -> None:
        self._note("end", span.name)

    def on_measurement(self, measurement: Measurement) -> None:
        self._note("measurement", measurement.instrument.name)

    def on_step(self, step: Step) -> None:
        self._note("step", str(step.number))

    def on_idle(self) -> None:
        self._note("idle")

    def flush(self, timeout: float) -> None:
        self._note("flush")

    def close(self, timeout: float) -> None:
        self._note("close")

    def records(self) -> list[tuple[str, str]]:
        return [told for told in self.told if told[0] not in ("idle", "flush", "close")]


def faulty(method: str, fault: Callable[[], object], *, inline: bool = False) -> Sink:
    """Make a sink that keeps the names of ended spans, and whose `method` calls `fault` instead of doing its work."""

    def broken(self: Any, *_: object) -> None:
        fault()

    def on_end(self: Any, span: Span) -> None:
        self.ended.append(span.name)

    kind = type("Faulty", (Sink,), {"on_end": on_end, method: broken, "inline": inline})
    made: Any = kind()
    made.ended = []
    return made


class Gate:
    """Blocks its caller until it is opened, or a minute has passed."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self._open.wait(60)

    def open(self) -> None:
        self._open.set()
