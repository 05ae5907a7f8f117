"""Weights to a server on this host: written into memory that both map, while HTTP carries only where they lie."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from ..engines.base import BUCKET_BYTES
from ..errors import WeightSyncError

BACKEND = "vgen_shm"
"""The name in vLLM's weight-transfer registry."""
DIRECTORY_VARIABLE = "VGEN_SHARED_MEMORY_DIR"
BUCKETS = 2
"""One is filled while the other is loaded."""
ALIGNMENT = 64
STALE_SECONDS = 60.0
"""How old a file must be before it is looked at as one that a dead trainer has left."""
LEFT_OPEN = "an earlier weight update was left open"
"""What a worker says of an update whose trainer is gone."""


class WeightSyncClient(Protocol):
    """vLLM's own protocol for whoever drives a weight update; it is structural, and this repeats it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class SharedMemoryTransfer:
    """Sends a model, again and again, to a server on this host that runs vgen's plugin.

        transfer = SharedMemoryTransfer(client)
        transfer.send(source, version="step-7")  # any re-iterable of (name, tensor)

    The server must be paused meanwhile, and its caches reset afterwards. Two buckets of `bucket_bytes` are filled
    and loaded in turn; a larger tensor gets a bucket of its size. Their memory is kept for the next `send` until
    `close`, and goes with this process however that ends.
    """

    def __init__(
        self, client: WeightSyncClient, *, bucket_bytes: int = BUCKET_BYTES, directory: str | Path | None = None
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self.client = client
        """May be replaced by another that reaches the same server."""
        self._bytes = bucket_bytes
        self._directory = Path(directory) if directory is not None else shared_directory()
        self._buckets: list[_Bucket] = []
        self.copy_seconds = 0.0
        """Of the last `send`: spent on writing tensors into the buckets."""
        self.load_seconds = 0.0
        """Of the last `send`: spent on waiting for the server."""
        self.buckets_sent = 0

    def send(self, source: Iterable[tuple[str, torch.Tensor]], version: str | None = None) -> None:
        """Replace all of the server's weights and give them `version`. Raises `WeightSyncError`.

        After an error the server has its old layers with perhaps mixed content, and a later `send` may bring it back.
        """
        self.stream(source)
        self.finish(version)

    def stream(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The first half of `send`: all weights are there, and loaded but for what the last call does."""
        self.copy_seconds = self.load_seconds = 0.0
        self.buckets_sent = 0
        with self._closing():
            self._open()
            self.client.start_weight_update()
            try:
                with ThreadPoolExecutor(1, "vgen-shm") as sender:
                    self._stream(source, sender)
            except BaseException:
                self._abort()
                raise

    def finish(self, version: str | None = None) -> None:
        """The second half: the weights are put to use, under `version`."""
        with self._closing():
            start = time.monotonic()
            self.client.finish_weight_update(version)
            self.load_seconds += time.monotonic() - start

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Close after any error, which becomes a `WeightSyncError`."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, WeightSyncError) or not isinstance(error, Exception):
                raise
            raise as_sync_error(error) from error

    def close(self) -> None:
        """Give the memory back."""
        for bucket in self._buckets:
            bucket.close()
        self._buckets.clear()

    def _open(self) -> None:
        """Make sure that the server has mapped the buckets, and that nobody's update is half done there."""
        if self._buckets:
            try:
                self._introduce()
                return
            except Exception:  # it was started anew, or has met another trainer since
                self.close()
        make_directory(self._directory)
        self._buckets = [_Bucket(self._directory, self._bytes) for _ in range(BUCKETS)]
        self._introduce()

    def _introduce(self) -> None:
        paths = {"paths": [bucket.path for bucket in self._buckets]}
        try:
            self.client.init_weight_transfer_engine(paths)
        except Exception as error:
            if LEFT_OPEN not in str(error):
                raise
            self._abort()
            self.client.init_weight_transfer_engine(paths)
        for bucket in self._buckets:
            bucket.unlink()

    def _stream(self, source: Iterable[tuple[str, torch.Tensor]], sender: ThreadPoolExecutor) -> None:
        filling, loading = self._buckets
        under_way: Future[None] | None = None
        for name, tensor in source:
            if filling.tensors and filling.used + tensor.numel() * tensor.element_size() > self._bytes:
                self._wait(under_way)
                under_way = sender.submit(self._update, filling, False)
                filling, loading = loading, filling
                filling.clear()
            start = time.monotonic()
            filling.add(name, tensor)
            self.copy_seconds += time.monotonic() - start
        self._wait(under_way)
        self._wait(sender.submit(self._update, filling, True))
        filling.clear()
        loading.clear()

    def _wait(self, under_way: Future[None] | None) -> None:
        if under_way is not None:
            start = time.monotonic()
            under_way.result()
            self.load_seconds += time.monotonic() - start

    def _update(self, bucket: _Bucket, last: bool) -> None:
        self.client.update_weights({"path": bucket.path, "tensors": bucket.tensors, "last": last})
        self.buckets_sent += 1

    def _abort(self) -> None:
        """End the update that is under way. The server answers with errors: that it was given up, and is over."""
        with suppress(Exception):
            self.client.update_weights({"abort": True})
        with suppress(Exception):
            self.client.finish_weight_update()


class _Bucket:
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
        self.clear()

    def clear(self) -> None:
        self.used = 0
        self.tensors: list[tuple[str, str, list[int], int]] = []
        """Name, dtype, shape and offset of each."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        offset, size = self.used, tensor.numel() * tensor.element_size()
        if size:
            self._take(offset + size, name)
            place = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset)
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        self.tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset))
        self.used = offset + aligned(size)

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


def aligned(size: int) -> int:
    """`size` rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


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


def as_sync_error(error: Exception, *, phase: str = "transfer", receiver: str = "server") -> WeightSyncError:
    """The worker's own words where it is the one that failed, else the client's, which happened in `phase`."""
    text = str(error) or type(error).__name__
    text = text.partition("', please check the stack trace above")[0]  # what vLLM's executor adds
    said = re.search(
        r"weight sync failed in phase '(\w+)' of server(?: at parameter '([^']*)')?: (.*)", text, re.DOTALL
    )
    if said is None:
        return WeightSyncError(text, phase=phase, receiver=receiver)
    return WeightSyncError(said[3], phase=said[1], parameter=said[2], receiver=receiver)
