"""Names for the shared memory of vLLM's tensor parallelism on a CPU.

vLLM (0.32) names it after the port of its own rendezvous. In the trainer's processes it has none, so every job had the
same name: what a crashed run left there stopped all later ones (`errno: 17`), and two jobs on a machine met.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ...distributed.rank_consensus import RankGroup

DIRECTORY = Path("/dev/shm")


def names_for(device_type: str, workers: int, ranks: Callable[[], RankGroup]) -> AbstractContextManager[None]:
    """`own_names` for an engine of several workers on a CPU; for others a block that changes nothing."""
    return own_names(ranks()) if device_type == "cpu" and workers > 1 else nullcontext()


@contextmanager
def own_names(ranks: RankGroup) -> Iterator[None]:
    """A block in which the ranks start an engine whose shared memory has names of this job's own.

    The names are gone after the block: all ranks have mapped the memory by then, and it lives as long as they do.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    owner: Any = cpu_communicator._CPUSHMDistributed
    make_name, job, made = owner.make_group_name, ranks.gather(secrets.token_hex(8))[0], set[str]()

    def named(communicator: Any) -> str:
        name = f"vgen-{job}-{make_name(communicator).replace('/', '')}"
        made.add(name)
        return name

    owner.make_group_name = staticmethod(named)
    try:
        yield
    finally:
        owner.make_group_name = staticmethod(make_name)
        for name in made:
            for rank in range(ranks.size):
                (DIRECTORY / f"{name}_{rank}").unlink(missing_ok=True)
