"""Weights to a server on this host: the trainer writes them into memory that both map, and HTTP carries the offsets."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..._addresses import this_host
from ...engine_protocol import Source
from ...errors import WeightSyncError
from .buckets import BUCKETS, Bucket, BucketTransport
from .weight_transport import NEEDS_VGEN_SERVE, TransportEndpoint, TransportSettings

BACKEND = "vgen_shm"
"""The name of vgen's engine in vLLM's weight-transfer registry."""
DIRECTORY_VARIABLE = "VGEN_SHARED_MEMORY_DIR"
STALE_SECONDS = 60.0
"""How old a file must be before it may be removed as one that a dead trainer has left."""
_PREFIX = "vgen-bucket-"
_BUCKET = re.compile(re.escape(_PREFIX) + "[0-9a-f]{32}")
"""The name of a bucket's file. A directory that the user names may hold other files, which are not vgen's."""


class SharedMemoryTransport(BucketTransport):
    """To servers with vgen's plugin on the trainer's host, on any device. Its buckets are files in shared memory.

    A file has a name only until the servers have opened it, so it disappears with this process, however that ends.
    """

    name, serves = "shared_memory", "servers with vgen's plugin on this host"

    def __init__(self, settings: TransportSettings, *, directory: str | Path | None = None) -> None:
        super().__init__(settings)
        self._directory = Path(directory) if directory is not None else shared_directory()

    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        if "shared_memory" not in endpoint.features:
            return NEEDS_VGEN_SERVE
        # A server of an older vgen, without any of these, does not say which host it is on.
        if {"group", "group_with_secret"} & endpoint.features and endpoint.host != this_host():
            return "it is on another host than the trainer"
        return None

    def _make_buckets(self) -> list[SharedMemoryBucket]:
        make_directory(self._directory)
        return [SharedMemoryBucket(self._directory, self._settings.bucket_bytes) for _ in range(BUCKETS)]

    def _introduce(self, forms: dict[str, Any]) -> None:
        self.client.init_weight_transfer_engine({"paths": [bucket.path for bucket in self._buckets], **forms})
        for bucket in self._buckets:
            bucket.unlink()

    def _update(self, bucket: SharedMemoryBucket, last: bool) -> None:
        update = {"path": bucket.path, "tensors": bucket.tensors, "verify": self.verify, "last": last}
        self.client.update_weights(update)


class SharedMemoryBucket(Bucket):
    """A file that two processes map. `capacity` bytes are mapped; memory is taken only when it is written to."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self.path = str(directory / f"{_PREFIX}{secrets.token_hex(16)}")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # tells `make_directory` of other trainers that its owner is alive
        self._linked = True
        self._capacity = self._allocated = 0
        self._grow(capacity)
        super().__init__()

    def memory_at(self, offset: int, size: int, name: str) -> torch.Tensor:
        self._allocate(offset + size, name)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset)

    def unlink(self) -> None:
        """Remove the file's name."""
        if self._linked:
            self._linked = False
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def close(self) -> None:
        """Close the file. Its memory is freed once no process maps it."""
        self.unlink()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def _allocate(self, end: int, name: str) -> None:
        if end > self._capacity:
            self._grow(end)
        if end > self._allocated:
            try:
                # Without this, a write to a full file system would end the process with SIGBUS.
                os.posix_fallocate(self._file, self._allocated, end - self._allocated)
            except OSError as error:
                fix = "choose a smaller bucket_bytes or another directory, or give the container a larger /dev/shm"
                problem = f"{os.path.dirname(self.path)} has no room for it ({error.strerror}): {fix}"
                raise _transfer_error(problem, name) from error
            self._allocated = end

    def _grow(self, capacity: int) -> None:
        os.ftruncate(self._file, capacity)
        self._map = mmap.mmap(self._file, capacity)
        self._capacity = capacity


def shared_directory() -> Path:
    """The directory that trainer and servers share: `VGEN_SHARED_MEMORY_DIR`, or a folder in /dev/shm by default."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or default_directory())


def default_directory() -> Path:
    """The directory that vgen makes for itself where the user names none."""
    return Path(f"/dev/shm/vgen-{os.getuid()}")


def make_directory(directory: Path) -> None:
    """Make the directory, check that it belongs to this user, and remove buckets that dead trainers have left.

    The default directory must be as vgen makes it. One that the user names may be shared with others: the user has
    chosen it, and vgen removes only files that are named as its own.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise _transfer_error(f"{directory} must be a directory that this user owns, not a link or another user's")
    if directory == default_directory() and stat.S_IMODE(status.st_mode) & 0o077:
        fix = f"remove it, or name a directory of your choice in {DIRECTORY_VARIABLE}"
        raise _transfer_error(f"vgen did not make {directory}: other users may enter it; {fix}")
    for entry in directory.iterdir():
        if not _BUCKET.fullmatch(entry.name):
            continue
        with suppress(OSError):
            found = entry.lstat()
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > STALE_SECONDS:
                file = os.open(entry, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner is alive
                    entry.unlink()
                finally:
                    os.close(file)


def _transfer_error(problem: str, parameter: str | None = None) -> WeightSyncError:
    return WeightSyncError(problem, phase="transfer", parameter=parameter, receiver="shared memory")
