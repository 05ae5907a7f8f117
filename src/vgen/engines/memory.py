"""How much memory an engine has on its device, and how much of it sleep mode gives back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..profiling.device import resident, torchs
from ..types import SleepReport


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory at one moment, in bytes: of one process and its device, or of several together."""

    free: int = 0
    """Of the device, by its driver."""
    in_use: int = 0
    """Of the device, by all processes, without what torch's allocator holds in this one: a trainer may grow."""
    resident: int = 0
    """Of the host, by this process."""
    awake: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tag what is on vLLM's list for sleep mode and awake; empty where vLLM keeps none."""
    asleep: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def now(cls) -> Reading:
        """Of this process and its CUDA device."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return cls(free, total - free - torchs()[1], resident(), *_pools())

    def __add__(self, other: Reading) -> Reading:
        return Reading(
            self.free + other.free,
            self.in_use + other.in_use,
            self.resident + other.resident,
            _sum(self.awake, other.awake),
            _sum(self.asleep, other.asleep),
        )


class WorkerMemory:
    """Gives a server's workers methods for `/collective_rpc`, as vLLM's `--worker-extension-cls`."""

    def vgen_memory(self) -> dict[str, Any]:
        """The fields of a `Reading`; empty without a CUDA device."""
        import torch

        return asdict(Reading.now()) if torch.cuda.is_available() else {}

    def vgen_device(self) -> str:
        """Which GPU this worker has; empty without CUDA."""
        import torch

        from ..weights.resident import uuid_of

        return uuid_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ""

    def vgen_weights(self) -> dict[str, Any]:
        """How this worker's weights were last loaded, and why; empty where vgen's engine did not."""
        loaded = getattr(getattr(self, "weight_transfer_engine", None), "loaded", None)
        return loaded() if loaded is not None else {}


def reading_of(workers: Iterable[Any]) -> Reading | None:
    """All that `vgen_memory` of several workers says together; None where one has no device."""
    total = Reading()
    for worker in workers:
        if not worker:
            return None
        total += Reading(**worker)
    return total


def slept(before: Reading, after: Reading) -> SleepReport:
    """What falling asleep between two readings has done."""
    freed = after.free - before.free
    return SleepReport(
        memory_freed=freed > 0,
        device_bytes=freed,
        host_bytes=after.resident - before.resident,
        expected=before.awake,
        device_in_use=after.in_use,
    )


def woken(readings: Sequence[Reading], tags: Sequence[str]) -> SleepReport:
    """What waking has done. With a reading before it and one after each of `tags`, also what each has taken."""
    before, after = readings[0], readings[-1]
    steps = zip(tags, readings[:-1], readings[1:], strict=True) if len(readings) == len(tags) + 1 else ()
    return SleepReport(
        memory_freed=True,
        device_bytes=before.free - after.free,
        host_bytes=before.resident - after.resident,
        expected={tag: left for tag, size in before.asleep.items() if (left := size - after.asleep.get(tag, 0))},
        taken={tag: earlier.free - later.free for tag, earlier, later in steps},
    )


def _pools() -> tuple[dict[str, int], dict[str, int]]:
    awake, asleep = dict[str, int](), dict[str, int]()
    try:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocations: list[Any] = list(CuMemAllocator.get_instance().pointer_to_data.values())
        for each in allocations:
            pool = asleep if each.is_asleep else awake
            pool[each.tag] = pool.get(each.tag, 0) + each.handle[1]
    except (ImportError, AssertionError, AttributeError):
        return {}, {}
    return awake, asleep


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {tag: one.get(tag, 0) + other.get(tag, 0) for tag in (*one, *other)}
