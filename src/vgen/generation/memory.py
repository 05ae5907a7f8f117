"""What sleeping gives back and waking takes, as telemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..profiling import ProfilingContext, names
from ..types import SleepReport

_EXPECTED = {"weights": names.WEIGHTS_EXPECTED, "kv_cache": names.KV_CACHE_EXPECTED}
_TAKEN = {"weights": names.WEIGHTS_BYTES, "kv_cache": names.KV_CACHE_BYTES}


def memory_attributes(report: SleepReport) -> dict[str, Any]:
    """What a report says, as attributes of its span; what is not known is None."""
    return {
        names.MEMORY_FREED: report.memory_freed,
        names.DEVICE_BYTES: report.device_bytes,
        names.HOST_BYTES: report.host_bytes,
        names.MEMORY_EXPECTED: sum(report.expected.values()) if report.expected else None,
        **_named(_EXPECTED, report.expected),
        **_named(_TAKEN, report.taken),
    }


def _named(attributes: Mapping[str, str], values: Mapping[str, int]) -> dict[str, int | None]:
    return {attribute: values.get(tag) for tag, attribute in attributes.items()}


class Leaks:
    """Device memory that a sleep leaves in use, compared with the first sleep of the same level."""

    def __init__(self, profiling: ProfilingContext) -> None:
        self._profiling = profiling
        self._first: dict[int, int] = {}
        self._most: dict[int, int] = {}

    def note(self, level: int, in_use: int | None) -> int | None:
        """Bytes `in_use` beyond those after the first sleep; the counter has the most that they ever were."""
        if in_use is None:
            return None
        leaked = in_use - self._first.setdefault(level, in_use)
        more = max(leaked - self._most.get(level, 0), 0)
        self._most[level] = self._most.get(level, 0) + more
        self._profiling.record(names.LEAKED_TOTAL, more, **{names.SLEEP_LEVEL: level})
        return max(leaked, 0)
