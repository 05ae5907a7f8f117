"""What the device did and what memory is taken, without ever waiting for the device.

torch is not imported here: without it in the process, or without a CUDA device in use, there is nothing
to time and no device memory to read, and what cannot be read is absent, not zero.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from . import names
from .context import ProfilingContext
from .records import Span

_PAGE = os.sysconf("SC_PAGE_SIZE")


class DeviceTimer:
    """Times what a span launched on the current CUDA stream, by events that are read later.

    The seconds become a value of `vgen.device.time`, labelled with the span's name and carrying its id,
    once the device has passed the second event: looked for whenever the timer is used, when a step ends,
    and by `resolve`. A step's row holds what was resolved by its end.

        timer = DeviceTimer(profiling)
        with profiling.span("update") as span, timer.of(span):
            optimizer.step()
    """

    def __init__(self, profiling: ProfilingContext) -> None:
        self._profiling = profiling
        self._pending: deque[tuple[Span, Any, Any]] = deque()
        profiling.observe(names.DEVICE_PENDING, self.resolve)

    @contextmanager
    def of(self, span: Span) -> Generator[None]:
        """Time the block on the device and lay the time to `span`. Without a CUDA device it does nothing."""
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
        """Record what the device has finished; returns how many spans it still works on. Never waits."""
        while self._pending and self._pending[0][2].query():
            span, start, end = self._pending.popleft()
            labels = {names.TIMED_SPAN: span.name, names.TIMED_SPAN_ID: span.span_id}
            self._profiling.record(names.DEVICE_TIME, start.elapsed_time(end) / 1e3, **labels)
        return float(len(self._pending))


def memory() -> dict[str, int]:
    """What is taken now, in bytes, as span attributes: of the device by its driver and by torch, and of the host."""
    found: dict[str, int] = {}
    cuda = _cuda()
    if cuda is not None:
        free, total = cuda.mem_get_info()
        found[names.DEVICE_FREE], found[names.DEVICE_USED] = free, total - free
        found[names.ALLOCATED], found[names.RESERVED_MEMORY] = torchs()
    try:
        found[names.HOST_RESIDENT] = resident()
        available = _read("/proc/meminfo").partition(b"MemAvailable:")[2]
        found[names.HOST_AVAILABLE] = int(available.split()[0]) * 1024
    except (OSError, IndexError):
        pass  # not Linux
    return found


def torchs() -> tuple[int, int]:
    """What torch's allocator has given out of the current CUDA device's memory, and what it holds, in bytes."""
    # `memory_allocated` and `memory_reserved` each spell out hundreds of statistics.
    found = sys.modules["torch"].cuda.memory_stats_as_nested_dict()
    return found["allocated_bytes"]["all"]["current"], found["reserved_bytes"]["all"]["current"]


def resident() -> int:
    """Host memory of this process, in bytes. `OSError` where the system does not say."""
    return int(_read("/proc/self/statm").split()[1]) * _PAGE


def _read(name: str) -> bytes:
    # A third of what `Path.read_text` takes, and it lies within spans of a few milliseconds.
    file = os.open(name, os.O_RDONLY)
    try:
        return os.read(file, 512)
    finally:
        os.close(file)


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
