"""Device time of spans, and memory readings, without ever waiting for the device.

This module does not import torch. If torch is not loaded, or no CUDA device is in use, nothing is timed and no device
memory is read; what cannot be read is absent, not zero.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from . import semconv
from .context import ProfilingContext
from .span_model import Span

_PAGE = os.sysconf("SC_PAGE_SIZE")


class DeviceTimer:
    """Times the work that a span launches on the current CUDA stream, by CUDA events that are read later.

    The seconds become a value of the histogram `vgen.device.time`, with the name and ID of the span, after the device
    has passed the second event. The timer looks for it whenever it is used, at the end of each step, and in
    `resolve`. A step's row contains the times that were resolved by its end.

        timer = DeviceTimer(profiling)
        with profiling.span("update") as span, timer.of(span):
            optimizer.step()
    """

    def __init__(self, profiling: ProfilingContext) -> None:
        self._profiling = profiling
        self._pending: deque[tuple[Span, Any, Any]] = deque()
        profiling.observe(semconv.DEVICE_PENDING, self.resolve)

    @contextmanager
    def of(self, span: Span) -> Generator[None]:
        """Time the block on the device, for `span`. No effect without a CUDA device."""
        cuda = _cuda() if self._profiling.enabled else None
        if cuda is None:
            yield
            return
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((span, start, end))
            self.resolve()

    def resolve(self) -> float:
        """Record the spans that the device has finished, and return how many are still pending. Never waits."""
        while self._pending and self._pending[0][2].query():
            span, start, end = self._pending.popleft()
            labels = {semconv.TIMED_SPAN: span.name, semconv.TIMED_SPAN_ID: span.span_id}
            self._profiling.record(semconv.DEVICE_TIME, start.elapsed_time(end) / 1e3, **labels)
        return float(len(self._pending))


def memory() -> dict[str, int]:
    """Return the memory in use now, in bytes, as span attributes: of the device and of the host."""
    readings: dict[str, int] = {}
    cuda = _cuda()
    if cuda is not None:
        free, total = cuda.mem_get_info()
        readings[semconv.DEVICE_FREE], readings[semconv.DEVICE_USED] = free, total - free
        readings[semconv.ALLOCATED], readings[semconv.RESERVED_MEMORY] = torch_memory()
    try:
        readings[semconv.HOST_RESIDENT] = host_memory()
        available = _read("/proc/meminfo").partition(b"MemAvailable:")[2]
        readings[semconv.HOST_AVAILABLE] = int(available.split()[0]) * 1024
    except (OSError, IndexError):
        pass  # not Linux
    return readings


def torch_memory() -> tuple[int, int]:
    """Return what torch's allocator has allocated and reserved on the current CUDA device, in bytes."""
    # Once: `memory_allocated` and `memory_reserved` each build a dict of hundreds of statistics.
    stats = sys.modules["torch"].cuda.memory_stats_as_nested_dict()
    return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]


def host_memory() -> int:
    """Return the resident host memory of this process, in bytes.

    Raises:
        OSError: The system has no `/proc`.
    """
    return int(_read("/proc/self/statm").split()[1]) * _PAGE


def _read(name: str) -> bytes:
    # A third of the time of `Path.read_text`: callers read memory within spans of a few milliseconds.
    file = os.open(name, os.O_RDONLY)
    try:
        return os.read(file, 512)
    finally:
        os.close(file)


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
