"""How much memory an engine uses on its device, and how much of it sleep mode frees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import WeightSyncError, error_to_dict
from ..profiling.device_timing import host_memory, torch_memory
from ..types import SleepReport


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory at one moment, in bytes: of one process and its device, or summed over several.

    A server sends the fields by their names (`WorkerMemory.vgen_memory`), so the names are part of its interface.
    """

    free: int = 0
    """Free memory of the device, by its driver."""
    in_use: int = 0
    """Used memory of the device, by all processes, without what this process's torch allocator holds.

    The trainer's own tensors are left out, because they may grow between two readings.
    """
    resident: int = 0
    """Host memory of this process."""
    awake: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tag (`weights`, `kv_cache`): device memory that sleep mode can free. Empty if vLLM keeps no list of it."""
    asleep: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tag: device memory that sleep mode has freed."""

    @classmethod
    def now(cls) -> MemoryReading:
        """Read the memory of this process and its CUDA device."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return cls(free, total - free - torch_memory()[1], host_memory(), *_bytes_by_tag())

    def __add__(self, other: MemoryReading) -> MemoryReading:
        return MemoryReading(
            self.free + other.free,
            self.in_use + other.in_use,
            self.resident + other.resident,
            _sum(self.awake, other.awake),
            _sum(self.asleep, other.asleep),
        )


class WorkerMemory:
    """Methods for a server's workers, by vLLM's `--worker-extension-cls`; `/collective_rpc` calls them."""

    def vgen_memory(self) -> dict[str, Any]:
        """The fields of a `MemoryReading`; empty without a CUDA device."""
        import torch

        return asdict(MemoryReading.now()) if torch.cuda.is_available() else {}

    def vgen_device(self) -> str:
        """The UUID of this worker's GPU; empty without CUDA."""
        import torch

        from ..weights.transports.cuda_ipc import uuid_of

        return uuid_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ""

    def vgen_weights(self) -> dict[str, Any]:
        """How this worker loaded its last weights, and why; empty if vgen's weight-transfer engine did not do it."""
        loaded = getattr(getattr(self, "weight_transfer_engine", None), "loaded", None)
        return loaded() if loaded is not None else {}

    def vgen_audit(self, forms: list[list[Any]], ties: dict[str, str]) -> dict[str, Any]:
        """Audit what this worker's loader would do with such tensors: `LoadAudit.report`, or the `error` that came.

        For weights that come by another way than vgen's weight-transfer engine, which audits by itself.
        """
        from ..weights.load.load_audit import audit_load
        from ..weights.transports.buckets import metadata_of_forms

        runner: Any = getattr(self, "model_runner")  # noqa: B009  vLLM's worker has it, which this is mixed into
        try:
            audit = audit_load(runner.get_model(), metadata_of_forms(forms), ties, "server")
            audit.require(ties, "server")
        except WeightSyncError as error:
            return {"error": error_to_dict(error)}
        return audit.report()


def sum_of_workers(workers: Iterable[Any]) -> MemoryReading | None:
    """The sum of what several workers answered to `vgen_memory`; None if one of them has no device."""
    total = MemoryReading()
    for worker in workers:
        if not worker:
            return None
        total += MemoryReading(**worker)
    return total


def sleep_report(before: MemoryReading, after: MemoryReading) -> SleepReport:
    """What a sleep between the two readings did."""
    freed = after.free - before.free
    return SleepReport(
        memory_freed=freed > 0,
        device_bytes=freed,
        host_bytes=after.resident - before.resident,
        expected=before.awake,
        device_in_use=after.in_use,
    )


def wake_report(readings: Sequence[MemoryReading], tags: Sequence[str]) -> SleepReport:
    """What waking up did, by a reading before it and one after it.

    With a further reading after each tag (`len(tags) + 1` in all) the report also has the memory of each tag.
    """
    before, after = readings[0], readings[-1]
    steps = zip(tags, readings[:-1], readings[1:], strict=True) if len(readings) == len(tags) + 1 else ()
    return SleepReport(
        memory_freed=True,
        device_bytes=before.free - after.free,
        host_bytes=before.resident - after.resident,
        expected={tag: left for tag, size in before.asleep.items() if (left := size - after.asleep.get(tag, 0))},
        taken={tag: earlier.free - later.free for tag, earlier, later in steps},
    )


def _bytes_by_tag() -> tuple[dict[str, int], dict[str, int]]:
    """Awake and sleeping bytes by tag, from vLLM's allocator for sleep mode (`vllm/device_allocator/cumem.py`)."""
    awake, asleep = dict[str, int](), dict[str, int]()
    try:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocations: list[Any] = list(CuMemAllocator.get_instance().pointer_to_data.values())
        for allocation in allocations:
            sizes = asleep if allocation.is_asleep else awake
            sizes[allocation.tag] = sizes.get(allocation.tag, 0) + allocation.handle[1]
    except (ImportError, AssertionError, AttributeError):
        return {}, {}
    return awake, asleep


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {tag: one.get(tag, 0) + other.get(tag, 0) for tag in (*one, *other)}
