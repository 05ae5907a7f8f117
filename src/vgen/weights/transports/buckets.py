"""Weights in two buckets: one is filled while the servers load the other."""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from ...engine_protocol import TensorMetadata
from ...errors import WeightSyncError
from ...profiling import semconv
from ..source.module_source import source_of
from .sync_errors import UPDATE_OPEN, as_sync_error
from .weight_transport import NamedTensors, StreamTransport, TransportSettings, WeightSyncClient

BUCKETS = 2
ALIGNMENT = 64
BucketEntry = tuple[str, str, list[int], int]
"""Name, dtype, shape and offset of a tensor in a bucket."""
TensorForm = tuple[str, str, list[int]]
"""Name, dtype and shape of a tensor that will come."""
FORMS, FORMS_NAME, TIES = "forms", "forms_name", "ties"
"""Keys of `init_info`: the forms of all tensors that will come, and a name for them, which later syncs send alone."""


class Bucket(ABC):
    """Memory that tensors are written into one after the other, and that a server can load from."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.used = 0
        self.tensors: list[BucketEntry] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        offset, size = self.used, tensor.numel() * tensor.element_size()
        if size:
            _copy(self.memory_at(offset, size, name), tensor.detach(), size)
        self.tensors.append((name, dtype_name(tensor.dtype), list(tensor.shape), offset))
        self.used = offset + aligned(size)

    @abstractmethod
    def memory_at(self, offset: int, size: int, name: str) -> torch.Tensor:
        """`size` bytes from `offset`, for the tensor `name`. The bucket grows if it is too small."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory."""


class BucketTransport(StreamTransport):
    """A transport in buckets, to servers that run vgen's plugin. A subclass decides what a bucket is.

    Two buckets of `bucket_bytes` are filled and loaded in turn; a larger tensor gets a bucket of its own size. The
    buckets are reused until `close`.
    """

    def __init__(self, settings: TransportSettings) -> None:
        super().__init__(settings)
        if settings.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {settings.bucket_bytes}")
        self._buckets: Sequence[Any] = ()
        self._announced: tuple[TensorMetadata | None, Mapping[str, str]] = (None, {})
        self._forms = forms_of(*self._announced)
        self._known_forms = ""
        """The name of the forms that the servers know."""
        self.copy_seconds = 0.0
        """Of the last update: spent on writing tensors into buckets."""
        self.buckets_sent = 0

    def stream(self, source: NamedTensors) -> None:
        self.copy_seconds, self.buckets_sent = 0.0, 0
        with self._close_on_error():
            described = source_of(source)
            if (announced := (described.metadata(), described.ties())) != self._announced:
                self._announced, self._forms = announced, forms_of(*announced)
            self._introduce_buckets()
            self.client.start_weight_update()
            try:
                with ThreadPoolExecutor(1, "vgen-weights") as sender:
                    self._fill_and_send(source, sender)
            except BaseException:
                abort_update(self.client)
                raise

    def measured(self) -> dict[str, Any]:
        return {semconv.COPY_SECONDS: self.copy_seconds, semconv.BUCKETS: self.buckets_sent}

    def close(self) -> None:
        for bucket in self._buckets:
            bucket.close()
        self._buckets, self._known_forms = (), ""

    @abstractmethod
    def _make_buckets(self) -> Sequence[Bucket]:
        """Make two buckets."""

    @abstractmethod
    def _introduce(self, forms: dict[str, Any]) -> None:
        """Tell the servers of the buckets, and of the forms of the tensors, in one call.

        Raises if an update is open at a server, or a server does not know the buckets any more.
        """

    @abstractmethod
    def _update(self, bucket: Any, last: bool) -> None:
        """Have the servers load a bucket. Runs in the thread that sends."""

    def _introduce_buckets(self) -> None:
        """Make sure that the servers know the buckets, and that no other update is open there."""
        forms = self._forms
        if self._buckets:
            try:
                known = forms[FORMS_NAME] == self._known_forms
                self._introduce({FORMS_NAME: forms[FORMS_NAME]} if known else forms)
                self._known_forms = forms[FORMS_NAME]
                return
            except Exception:  # a server was restarted, or another trainer has used it since
                self.close()
        self._buckets = self._make_buckets()
        try:
            self._introduce(forms)
        except Exception as error:
            if as_sync_error(error).reason != UPDATE_OPEN:
                raise
            abort_update(self.client)
            self._introduce(forms)
        self._known_forms = forms[FORMS_NAME]

    def _fill_and_send(self, source: NamedTensors, sender: ThreadPoolExecutor) -> None:
        filling, loading = self._buckets
        under_way = sender.submit(lambda: None)  # the first bucket waits for nothing
        for name, tensor in source:
            if filling.tensors and filling.used + tensor.numel() * tensor.element_size() > self._settings.bucket_bytes:
                under_way.result()
                under_way = sender.submit(self._send_bucket, filling, False)
                filling, loading = loading, filling
                filling.clear()
            start = time.monotonic()
            filling.add(name, tensor)
            self.copy_seconds += time.monotonic() - start
        under_way.result()
        sender.submit(self._send_bucket, filling, True).result()
        filling.clear()
        loading.clear()

    def _send_bucket(self, bucket: Bucket, last: bool) -> None:
        self._update(bucket, last)
        self.buckets_sent += 1


def forms_of(metadata: TensorMetadata | None, ties: Mapping[str, str]) -> dict[str, Any]:
    """What `init_info` says of the tensors that will come; an empty name if the source cannot say it beforehand."""
    if metadata is None:
        return {FORMS_NAME: ""}
    forms: list[TensorForm] = [(name, dtype_name(dtype), list(shape)) for name, shape, dtype in metadata]
    name = hashlib.sha256(json.dumps([forms, dict(ties)]).encode()).hexdigest()[:16]
    return {FORMS_NAME: name, FORMS: forms, TIES: dict(ties)}


def metadata_of_forms(forms: Iterable[Sequence[Any]]) -> TensorMetadata:
    """What a trainer has said of the tensors that will come. Raises `WeightSyncError`."""
    return [(name, tuple(shape), dtype_of(kind, name)) for name, kind, shape in forms]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str, parameter: str) -> torch.dtype:
    """The dtype of this name. Raises `WeightSyncError` for what a trainer must not send."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise malformed(f"dtype {name!r}", parameter)
    return dtype


def malformed(problem: str, parameter: str) -> WeightSyncError:
    """A worker's error about a tensor that is not what the trainer's description of it says."""
    return WeightSyncError(problem, phase="load", parameter=parameter, receiver="server")


def _copy(memory: torch.Tensor, tensor: torch.Tensor, size: int) -> None:
    """Write `tensor` into `size` bytes.

    On the host this uses one thread. torch's own copy starts one on each core, and if a server loads on the same
    cores, all of them wait for the slowest. Measured on two cores: 2 GB in 1.9 s by torch, in 0.18 s by one thread.
    """
    if memory.device.type == tensor.device.type == "cpu" and tensor.is_contiguous():
        ctypes.memmove(memory.data_ptr(), tensor.data_ptr(), size)
    else:
        memory = memory.view(tensor.dtype).view(tensor.shape)
        memory.copy_(tensor, non_blocking=memory.is_cuda)


def abort_update(client: WeightSyncClient) -> None:
    """End the update that is open. The servers answer both calls with errors, which are expected."""
    with suppress(Exception):
        client.update_weights({"abort": True})
    with suppress(Exception):
        client.finish_weight_update()


def aligned(size: int) -> int:
    """`size` rounded up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT
