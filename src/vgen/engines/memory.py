"""How much memory there is, and how much of it vLLM means to give back, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..profiling.device import resident


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory at one moment, in bytes."""

    free: int
    """Of the device, by its driver."""
    in_use: int
    """Of the device, by all processes, without what torch's allocator holds in this one: a trainer may grow."""
    resident: int
    """Of the host, by this process."""

    @classmethod
    def now(cls) -> Reading:
        free, total = torch.cuda.mem_get_info()
        return cls(free, total - free - torch.cuda.memory_reserved(), resident())


def pooled(*, asleep: bool) -> dict[str, int]:
    """Bytes by tag of what is on vLLM's list for sleep mode, and is asleep or not; empty where it keeps none."""
    try:
        from vllm.device_allocator.cumem import CuMemAllocator

        allocations: list[Any] = list(CuMemAllocator.get_instance().pointer_to_data.values())
        found: dict[str, int] = {}
        for each in allocations:
            if each.is_asleep == asleep:
                found[each.tag] = found.get(each.tag, 0) + each.handle[1]
        return found
    except (ImportError, AssertionError, AttributeError):
        return {}
