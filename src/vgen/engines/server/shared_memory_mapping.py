"""A trainer's buckets in shared memory, as a server's worker maps and reads them.

A trainer's description of a bucket is not trusted: only plain files in one directory are opened, and no tensor may
reach beyond its bucket.
"""

from __future__ import annotations

import functools
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod

import torch

from ...errors import WeightSyncError
from ...weights.transports.buckets import BUCKETS, BucketEntry, dtype_of, malformed
from ...weights.transports.shared_memory import shared_directory


class SharedMemoryMappings:
    """The files of the last trainer. The files of an earlier one are unmapped when new ones come."""

    def __init__(self) -> None:
        self.open = functools.lru_cache(BUCKETS)(MappedFile)
        """The file at a path, opened at the first call: later the trainer has removed its name."""
        self.close = self.open.cache_clear


class MappedFile:
    """A trainer's file. It is mapped again when it has grown."""

    def __init__(self, path: str) -> None:
        allowed = shared_directory()
        if os.path.realpath(os.path.dirname(path)) != os.path.realpath(allowed):
            raise _refused(f"this server opens files only in {allowed} (--shared-memory-dir)")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _refused(
                f"this server cannot open the trainer's shared memory in {allowed} ({error.strerror}): "
                "is it on the same host, with the same /dev/shm and the same user?"
            ) from error
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise _refused("shared memory must be a plain file")
        self._map: mmap.mmap | None = None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            with suppress(OSError):
                os.close(self._file)

    def memory(self) -> torch.Tensor:
        """All bytes of the file."""
        size = os.fstat(self._file).st_size
        if size and (self._map is None or len(self._map) < size):
            self._map = mmap.mmap(self._file, size)
        if not size or self._map is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size)


def tensors_in(memory: torch.Tensor, entries: Sequence[BucketEntry]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a bucket, as a view of the bucket's memory. Raises `WeightSyncError` if one does not fit in it."""
    for name, kind, shape, offset in entries:
        dtype = dtype_of(kind, name)
        if min([offset, *shape], default=0) < 0:
            raise malformed(f"shape {shape}, offset {offset}", name)
        size = prod(shape) * dtype.itemsize
        if offset + size > memory.numel():
            raise malformed(f"it ends beyond the {memory.numel()} bytes of its bucket", name)
        if size == 0:
            yield name, torch.empty(shape, dtype=dtype)
        else:
            yield name, memory[offset : offset + size].view(dtype).view(shape)


def _refused(problem: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="load", receiver="server")
