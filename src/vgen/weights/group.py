"""Weights to servers on other devices or hosts: each bucket is broadcast in a group of the trainer and all workers.

The collectives are torch's own, without its default group: NCCL between CUDA devices, gloo where one side is a CPU.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..engines.base import BUCKET_BYTES
from ..errors import WeightSyncError
from .buckets import BUCKETS, Bucket, BucketTransfer, WeightSyncClient, aligned

Backend = Literal["nccl", "gloo"]
POLL_SECONDS = 0.0002


class Group:
    """A member of a group. Rank 0 is the trainer; every collective ends within `timeout` seconds, or raises."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        backend: Backend,
        *,
        device: torch.device,
        address: str,
        timeout: float,
    ) -> None:
        self._timeout, self._closed = timeout, False
        self._backend: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()  # pyright: ignore
            # Ended by ourselves: after this torch's watchdog would end the whole process.
            options._timeout = timedelta(seconds=2 * timeout + 600)
            with _no_watchdog():
                self._backend = dist.ProcessGroupNCCL(store, rank, size, options)  # pyright: ignore
            # Now, while all members are at it: the first broadcast would wait for them without a limit.
            self._backend.eager_connect_single_device(device)
        else:
            options = dist.ProcessGroupGloo._Options()  # pyright: ignore
            options._timeout = timedelta(seconds=timeout)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]  # pyright: ignore
            self._backend = dist.ProcessGroupGloo(store, rank, size, options)  # pyright: ignore

    def broadcast(self, tensor: torch.Tensor) -> Future[None]:
        """Start to send `tensor` from rank 0, or to receive it; to be given to `wait`.

        In a thread of its own: while NCCL has yet to connect two members, its call waits for the other one.
        """
        done: Future[None] = Future()
        Thread(target=self._broadcast, args=(tensor, done), daemon=True).start()
        return done

    def _broadcast(self, tensor: torch.Tensor, done: Future[None]) -> None:
        try:
            work = self._backend.broadcast([tensor], dist.BroadcastOptions())
            while not work.is_completed() and not self._closed:
                time.sleep(POLL_SECONDS)
            if self._closed:
                raise RuntimeError("the group was left")
            work.wait()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def wait(self, under_way: Future[None]) -> None:
        """Until it has arrived. Raises what went wrong, `TimeoutError` among it, and closes the group then."""
        try:
            under_way.result(self._timeout)
        except TimeoutError:
            self.close()
            raise TimeoutError(f"nothing came within {self._timeout:g} s") from None
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Leave it. Whatever is under way is given up."""
        self._closed = True
        with suppress(Exception):
            self._backend.abort()


class GroupTransfer(BucketTransfer):
    """A `BucketTransfer` by collectives. `workers` has how many workers each server has, by its address.

    `client.init_weight_transfer_engine` must give each server its own `rank_offset`: its first worker's rank.
    """

    def __init__(
        self,
        client: WeightSyncClient,
        *,
        workers: Mapping[str, int],
        device: torch.device,
        backend: Backend,
        bucket_bytes: int = BUCKET_BYTES,
        port: int = 0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(client, bucket_bytes=bucket_bytes)
        self._address = own_address(next(iter(workers)))
        self._size = 1 + sum(workers.values())
        self._device, self._port, self._timeout = device, port, timeout
        self._backend: Backend = backend
        self._store: Any = None
        self._group: Group | None = None
        self._groups = 0

    def close(self) -> None:
        super().close()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _make(self) -> list[_Bucket]:
        if self._store is None:
            wait = timedelta(seconds=self._timeout)
            self._store = TCPStore(self._address, self._port, None, True, wait, wait_for_workers=False)
        return [_Bucket(self._bytes, self._device, self._backend) for _ in range(BUCKETS)]

    def _introduce(self, forms: dict[str, Any]) -> None:
        if self._group is not None:  # that no update is open there, and that they have not left it
            self.client.init_weight_transfer_engine({"group": {**self._described(), "joined": True}, **forms})
            return
        self.client.init_weight_transfer_engine({})  # raises where an update was left open: nobody would join then
        self._groups += 1
        joined: Future[Group] = Future()
        # Both sides wait for the other. Where a server refuses, nobody waits for this thread.
        Thread(target=self._join, args=(joined,), daemon=True).start()
        self.client.init_weight_transfer_engine({"group": self._described(), **forms})
        self._group = joined.result(self._timeout)

    def _join(self, joined: Future[Group]) -> None:
        try:
            place = _meeting_place(self._described())
            own: dict[str, Any] = dict(device=self._device, address=self._address, timeout=self._timeout)
            joined.set_result(Group(place, 0, self._size, self._backend, **own))
        except Exception as error:
            joined.set_exception(error)

    def _described(self) -> dict[str, Any]:
        return {
            "address": self._address,
            "port": self._store.port,
            "name": str(self._groups),
            "size": self._size,
            "backend": self._backend,
            "timeout": self._timeout,
        }

    def _update(self, bucket: _Bucket, last: bool) -> None:
        group = self._group
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
            group.close()  # nobody may receive it
            raise


class _Bucket(Bucket):
    """Memory on the trainer's device, or on the host."""

    def __init__(self, capacity: int, device: torch.device, backend: Backend) -> None:
        self._device = device if backend == "nccl" else torch.device("cpu")
        self.memory = torch.empty(aligned(capacity), dtype=torch.uint8, device=self._device)
        self.filled: Any = torch.cuda.Event() if self.memory.is_cuda else None
        super().__init__()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        super().add(name, tensor)
        if self.filled is not None:
            self.filled.record()

    def take(self, offset: int, size: int, name: str) -> torch.Tensor:
        if offset + size > self.memory.numel():
            grown = torch.empty(aligned(offset + size), dtype=torch.uint8, device=self._device)
            grown[:offset] = self.memory[:offset]
            self.memory = grown
        return self.memory[offset : offset + size]

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


class Receiver:
    """A worker's side: the bytes of one bucket after the other."""

    def __init__(self, described: Mapping[str, Any], rank: int, device: torch.device) -> None:
        self.name = (described["address"], described["port"], described["name"])
        backend: Backend = "nccl" if described["backend"] == "nccl" else "gloo"
        try:
            own: dict[str, Any] = dict(device=device, timeout=float(described["timeout"]))
            own["address"] = own_address(f"tcp://{described['address']}:{described['port']}")
            self._group = Group(_meeting_place(described), rank, int(described["size"]), backend, **own)
        except Exception as error:
            raise WeightSyncError(
                f"it cannot join the trainer at {described['address']}:{described['port']} ({error})",
                phase="transfer",
                receiver="server",
            ) from error
        self._memory = torch.empty(0, dtype=torch.uint8, device=device if backend == "nccl" else "cpu")

    def receive(self, size: int) -> torch.Tensor:
        """The next `size` bytes that the trainer sends. They are good until the next call."""
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._memory.device)
        received = self._memory[:size]
        if size:
            try:
                self._group.wait(self._group.broadcast(received))
            except Exception as error:
                self.close()
                raise WeightSyncError(
                    f"the trainer's bucket did not arrive ({error})", phase="transfer", receiver="server"
                ) from error
        return received

    def close(self) -> None:
        self._group.close()


def _meeting_place(described: Mapping[str, Any]) -> Any:
    """Where the members of a group find each other, by a connection of its own: one that waits serves nobody else."""
    wait = timedelta(seconds=float(described["timeout"]))
    store = TCPStore(described["address"], int(described["port"]), None, False, wait)
    return PrefixStore(described["name"], store)


def own_address(url: str) -> str:
    """The address of this host's that whoever listens at `url` can reach it by."""
    found = urlsplit(url)
    port = found.port or (443 if found.scheme == "https" else 80)
    family, kind, _, _, address = socket.getaddrinfo(found.hostname, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # a datagram socket connects without a word to anyone
        probe.connect(address)
        return probe.getsockname()[0]


@contextmanager
def _no_watchdog():
    """Within it a group is made whose failure is ours to handle: torch's would end the trainer."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
