"""Weights to servers on other GPUs or hosts: the trainer broadcasts each bucket to the workers of all servers.

The process group is torch's, but not its default group: NCCL between GPUs, gloo if one side has no GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..._addresses import address_for_all, own_address
from ...engine_protocol import Source
from ...errors import WeightSyncError
from .buckets import BUCKETS, Bucket, BucketTransport, aligned
from .cuda_ipc import uuid_of
from .rendezvous import Rendezvous, RendezvousStore
from .weight_transport import NEEDS_GPU, NEEDS_VGEN_SERVE, TransportEndpoint, TransportSettings, in_thread, source_gpu

Backend = Literal["nccl", "gloo"]
POLL_SECONDS = 0.0002
HOST = torch.device("cpu")


class CollectiveTransport(BucketTransport):
    """To servers with vgen's plugin: on other GPUs than the trainer's (`nccl`), or anywhere else (`gloo`).

    `client.init_weight_transfer_engine` must add `rank_offset` for each server: the rank of its first worker.
    """

    def __init__(self, settings: TransportSettings, backend: Backend) -> None:
        super().__init__(settings)
        self.name = self._backend = backend
        self.serves = f"servers with vgen's plugin on other {'GPUs' if backend == 'nccl' else 'hosts'}"
        self._group_member: GroupMember | None = None
        self._description: dict[str, Any] = {}
        """What a worker needs to know to join the group."""

    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        if "group_with_secret" not in endpoint.features:
            return NEEDS_VGEN_SERVE
        if self._backend == "gloo" or source is None:
            return None
        if (gpu := source_gpu(source)) is None:
            return f"{NEEDS_GPU}, as nccl needs it"
        if endpoint.device_type != "cuda":
            return "it is not on a GPU, as nccl needs it"
        # Two members of an NCCL group cannot share a GPU.
        return "it is on the trainer's own GPU" if uuid_of(gpu) in (endpoint.devices or ()) else None

    def close(self) -> None:
        super().close()
        if self._group_member is not None:
            self._group_member.close()
            self._group_member = None

    def _device_for(self, source: Source) -> torch.device | None:
        return source_gpu(source) if self._backend == "nccl" else None

    def _make_buckets(self) -> list[DeviceBucket]:
        return [DeviceBucket(self._settings.bucket_bytes, self._device or HOST) for _ in range(BUCKETS)]

    def _introduce(self, forms: dict[str, Any]) -> None:
        if self._group_member is not None:  # raises if an update is open there, or a worker has left the group
            self.client.init_weight_transfer_engine({"group": {**self._description, "joined": True}, **forms})
            return
        self.client.init_weight_transfer_engine({})  # raises if an update is open: such a server would not join
        address, timeout = address_for_all(url for url, *_ in self._members), self._settings.timeout
        size = 1 + sum(workers for _, workers, _ in self._members)
        with closing(Rendezvous(address, self._settings.port, size, timeout)) as rendezvous:
            self._description = {**rendezvous.description, "backend": self._backend}
            # Trainer and workers wait for each other.
            joined = in_thread(lambda: GroupMember(self._description, 0, self._device or HOST, address))
            self.client.init_weight_transfer_engine({"group": self._description, **forms})
            self._group_member = joined.result(timeout)

    def _update(self, bucket: DeviceBucket, last: bool) -> None:
        group = self._group_member
        assert group is not None
        if bucket.filled is not None:
            bucket.filled.synchronize()
        under_way = group.broadcast(bucket.memory[: bucket.used]) if bucket.used else None
        try:
            update = {"bytes": bucket.used, "tensors": bucket.tensors, "verify": self.verify, "last": last}
            self.client.update_weights(update)
            if under_way is not None:
                group.wait(under_way)
        except BaseException:
            group.close()  # the workers may not receive the broadcast
            raise


class GroupMember:
    """A member of a process group. A collective that takes longer than the group's timeout raises.

    `description` is what `Rendezvous` gives, and the group's backend. The trainer has rank 0.
    """

    def __init__(self, description: Mapping[str, Any], rank: int, device: torch.device, address: str) -> None:
        self._timeout, self._closed = float(description["timeout"]), False
        # torch's groups keep it for as long as they live, and ask it only while they connect.
        self._store = RendezvousStore(description, rank)
        with closing(self._store):
            connected = self._nccl if description["backend"] == "nccl" else self._gloo
            self._backend: Any = connected(rank, int(description["size"]), device, address)

    def _nccl(self, rank: int, size: int, device: torch.device, address: str) -> Any:
        options = dist.ProcessGroupNCCL.Options()  # pyright: ignore
        # `wait` ends a collective long before. At this limit torch's watchdog would end the whole process.
        options._timeout = timedelta(seconds=2 * self._timeout + 600)
        with _no_watchdog():
            backend = dist.ProcessGroupNCCL(self._store, rank, size, options)  # pyright: ignore
        # Connect now: the first broadcast would wait for the other members without a limit.
        backend.eager_connect_single_device(device)
        return backend

    def _gloo(self, rank: int, size: int, device: torch.device, address: str) -> Any:
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore
        options._timeout = timedelta(seconds=self._timeout)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]  # pyright: ignore
        return dist.ProcessGroupGloo(self._store, rank, size, options)  # pyright: ignore

    def broadcast(self, tensor: torch.Tensor) -> Future[None]:
        """Start to send `tensor` from rank 0, or to receive it. Pass the result to `wait`.

        This runs in a thread, because until NCCL has connected two members, its call blocks.
        """
        return in_thread(lambda: self._broadcast(tensor))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        collective = self._backend.broadcast([tensor], dist.BroadcastOptions())
        while not collective.is_completed() and not self._closed:
            time.sleep(POLL_SECONDS)
        if self._closed:
            raise RuntimeError("the group was closed")
        collective.wait()

    def wait(self, under_way: Future[None]) -> None:
        """Wait for a broadcast. If it fails or takes too long (`TimeoutError`), the group is closed."""
        try:
            under_way.result(self._timeout)
        except TimeoutError:
            self.close()
            raise TimeoutError(f"nothing was received within {self._timeout:g} s") from None
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group, and abort what is under way."""
        self._closed = True
        with suppress(Exception):
            self._backend.abort()


class DeviceBucket(Bucket):
    """Memory on the trainer's GPU for NCCL, or on the host for gloo."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self.memory = torch.empty(aligned(capacity), dtype=torch.uint8, device=self._device)
        self.filled: Any = torch.cuda.Event() if self.memory.is_cuda else None
        super().__init__()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        super().add(name, tensor)
        if self.filled is not None:
            self.filled.record()

    def memory_at(self, offset: int, size: int, name: str) -> torch.Tensor:
        if offset + size > self.memory.numel():
            grown = torch.empty(aligned(offset + size), dtype=torch.uint8, device=self._device)
            grown[:offset] = self.memory[:offset]
            self.memory = grown
        return self.memory[offset : offset + size]

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


class GroupReceiver:
    """A worker's side of a `CollectiveTransport`: receives one bucket after the other."""

    def __init__(self, description: Mapping[str, Any], rank: int, device: torch.device) -> None:
        host = description["address"]
        trainer = f"[{host}]:{description['port']}" if ":" in host else f"{host}:{description['port']}"
        self.name = description["secret"]
        try:
            self._group = GroupMember(description, rank, device, own_address(f"tcp://{trainer}"))
        except Exception as error:
            problem = f"the worker cannot join the trainer at {trainer} ({error})"
            raise WeightSyncError(problem, phase="transfer", receiver="server") from error
        on_device = description["backend"] == "nccl"
        self._memory = torch.empty(0, dtype=torch.uint8, device=device if on_device else "cpu")

    def receive(self, size: int) -> torch.Tensor:
        """The next `size` bytes that the trainer sends, valid until the next call."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._memory.device)
        received = self._memory[:size]
        if size:
            try:
                self._group.wait(self._group.broadcast(received))
            except Exception as error:
                self.close()
                problem = f"the trainer's bucket did not arrive ({error})"
                raise WeightSyncError(problem, phase="transfer", receiver="server") from error
        return received

    def close(self) -> None:
        self._group.close()


@contextmanager
def _no_watchdog():
    """A block in which an NCCL group is made without torch's error handling and heartbeat, which end the process."""
    off = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ[name] for name in off if name in os.environ}
    os.environ.update(off)
    try:
        yield
    finally:
        for name in off.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
