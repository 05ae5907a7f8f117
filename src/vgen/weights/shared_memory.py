"""Weights to a server on this host: written into memory that both map, while HTTP carries only where they lie."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..engines.base import BUCKET_BYTES
from ..errors import WeightSyncError
from .buckets import BUCKETS, Bucket, BucketTransfer, WeightSyncClient

BACKEND = "vgen_shm"
"""The name in vLLM's weight-transfer registry."""
DIRECTORY_VARIABLE = "VGEN_SHARED_MEMORY_DIR"
STALE_SECONDS = 60.0
"""How old a file must be before it is looked at as one that a dead trainer has left."""


class SharedMemoryTransfer(BucketTransfer):
    """A `BucketTransfer` to servers on this host, on any device, by files in shared memory.

    They have a name only until the servers have opened them, and go with this process however that ends.
    """

    def __init__(
        self, client: WeightSyncClient, *, bucket_bytes: int = BUCKET_BYTES, directory: str | Path | None = None
    ) -> None:
        super().__init__(client, bucket_bytes=bucket_bytes)
        self._directory = Path(directory) if directory is not None else shared_directory()

    def _make(self) -> list[_Bucket]:
        make_directory(self._directory)
        return [_Bucket(self._directory, self._bytes) for _ in range(BUCKETS)]

    def _introduce(self, forms: dict[str, Any]) -> None:
        self.client.init_weight_transfer_engine({"paths": [bucket.path for bucket in self._buckets], **forms})
        for bucket in self._buckets:
            bucket.unlink()

    def _update(self, bucket: _Bucket, last: bool) -> None:
        update = {"path": bucket.path, "tensors": bucket.tensors, "verify": self.verify, "last": last}
        self.client.update_weights(update)


class _Bucket(Bucket):
    """A file in memory that two processes map. It has a name only until the server has opened it.

    Room for `capacity` bytes is mapped, and memory taken as it is written to.
    """

    def __init__(self, directory: Path, capacity: int) -> None:
        self.path = str(directory / secrets.token_hex(16))
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # for `sweep`: its owner lives
        self._linked = True
        self._capacity = self._taken = 0
        self._grow(capacity)
        super().__init__()

    def take(self, offset: int, size: int, name: str) -> torch.Tensor:
        self._take(offset + size, name)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset)

    def unlink(self) -> None:
        if self._linked:
            self._linked = False
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def close(self) -> None:
        """Let go of it; what is still mapped somewhere stays until it is let go of there."""
        self.unlink()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def _take(self, end: int, name: str) -> None:
        if end > self._capacity:
            self._grow(end)
        if end > self._taken:
            try:
                # Written to without it, a full file system ends the process with SIGBUS.
                os.posix_fallocate(self._file, self._taken, end - self._taken)
            except OSError as error:
                raise WeightSyncError(
                    f"{os.path.dirname(self.path)} has no room for it ({error.strerror}): "
                    "choose a smaller bucket_bytes or another directory, or give the container a larger /dev/shm",
                    phase="transfer",
                    parameter=name,
                    receiver="shared memory",
                ) from error
            self._taken = end

    def _grow(self, capacity: int) -> None:
        os.ftruncate(self._file, capacity)
        self._map = mmap.mmap(self._file, capacity)
        self._capacity = capacity


def shared_directory() -> Path:
    """Where trainer and server meet unless told otherwise: `VGEN_SHARED_MEMORY_DIR`, else a folder in /dev/shm."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or f"/dev/shm/vgen-{os.getuid()}")


def make_directory(directory: Path) -> None:
    """Make sure that it is there and this user's own, and clear it of what dead trainers have left."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WeightSyncError(
            f"{directory} is not a directory of this user's own", phase="transfer", receiver="shared memory"
        )
    for entry in directory.iterdir():
        with suppress(OSError):
            if time.time() - entry.lstat().st_mtime > STALE_SECONDS:
                file = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner lives
                    entry.unlink()
                finally:
                    os.close(file)
