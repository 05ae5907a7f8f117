"""Weight syncs as telemetry: the phases of one that is under way, and which of the last made a rollout's weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ..profiling import ProfilingContext, Span, names
from ..profiling.device import DeviceTimer
from ..profiling.records import Link
from ..types import Completions
from .stall import Work

KNOWN_SYNCS = 16
"""How many of the last syncs rollouts may still point at."""


class Syncs:
    """The spans of the last syncs, by the version that each has brought."""

    def __init__(self) -> None:
        self._made: dict[str, Link] = {}

    def __len__(self) -> int:
        return len(self._made)

    def add(self, span: Span, version: str) -> None:
        """`span` has brought `version`."""
        self._made.pop(version, None)
        self._made[version] = Link(span.trace_id, span.span_id, {names.WEIGHT_VERSION: version})
        if len(self._made) > KNOWN_SYNCS:
            del self._made[next(iter(self._made))]

    def link(self, span: Span, version: str) -> None:
        """Have a rollout's span point at the sync that made its weights, where this process did that."""
        if (made := self._made.get(version)) is not None:
            span.link(made, **made.attributes)

    def link_later(self, span: Span, version: str, result: Completions) -> None:
        """The same for weights other than `version` that came while it was in flight."""
        later = {name for completion in result for name, _, _ in completion.weight_versions or ()} - {version}
        for other in sorted(later):
            self.link(span, other)


class PhaseTrace:
    """`engines.base.SyncTrace` over a profiling context; the phases' work on the device is timed too."""

    def __init__(self, profiling: ProfilingContext, device: DeviceTimer, span: Span, work: Work) -> None:
        self._profiling, self._device, self._span, self._work = profiling, device, span, work

    @contextmanager
    def phase(self, name: str, /) -> Generator[Span]:
        with (
            self._profiling.span(f"{names.WEIGHT_SYNC}.{name}") as span,
            self._work.within(span),
            self._device.of(span),
        ):
            yield span

    def set(self, attributes: Mapping[str, Any], /) -> None:
        self._span.set(attributes)
