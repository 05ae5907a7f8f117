"""Memory in the telemetry: what is in use, what a sleep frees, what a wake-up allocates, what leaks."""

from __future__ import annotations

from typing import Any

from ..profiling import ProfilingContext, semconv
from ..profiling.device_timing import memory
from ..types import SleepReport


def record_memory(profiling: ProfilingContext) -> dict[str, int]:
    """Record the memory in use on device and host. Returns the same as attributes, empty if profiling is off."""
    if not profiling.enabled:
        return {}
    bytes_in_use = memory()
    for instrument in (semconv.MEMORY_USED, semconv.MEMORY_RESIDENT):
        if instrument.name in bytes_in_use:
            profiling.record(instrument, bytes_in_use[instrument.name])
    return bytes_in_use


def memory_attributes(report: SleepReport) -> dict[str, Any]:
    """A report as attributes of its span; None for what the engine does not know."""
    return {
        semconv.MEMORY_FREED: report.memory_freed,
        semconv.DEVICE_BYTES: report.device_bytes,
        semconv.HOST_BYTES: report.host_bytes,
        semconv.MEMORY_EXPECTED: sum(report.expected.values()) if report.expected else None,
        semconv.WEIGHTS_EXPECTED: report.expected.get("weights"),
        semconv.KV_CACHE_EXPECTED: report.expected.get("kv_cache"),
        semconv.WEIGHTS_BYTES: report.taken.get("weights"),
        semconv.KV_CACHE_BYTES: report.taken.get("kv_cache"),
    }


class LeakTracker:
    """Device memory that a sleep leaves in use, compared with the first sleep of the same level."""

    def __init__(self, profiling: ProfilingContext) -> None:
        self._profiling = profiling
        self._baseline: dict[int, int] = {}
        self._recorded: dict[int, int] = {}

    def note(self, level: int, in_use: int | None) -> int | None:
        """Bytes in use beyond the first sleep of this level. The counter grows only by what exceeds all sleeps so far,
        so its total is the largest leak."""
        if in_use is None:
            return None
        leaked = in_use - self._baseline.setdefault(level, in_use)
        recorded = self._recorded.get(level, 0)
        growth = max(leaked - recorded, 0)
        self._recorded[level] = recorded + growth
        self._profiling.record(semconv.LEAKED_TOTAL, growth, **{semconv.SLEEP_LEVEL: level})
        return max(leaked, 0)
