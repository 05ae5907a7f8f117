"""A model on its way to servers in two buckets: one is filled while the other is loaded."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from ..errors import WeightSyncError
from .recorder import Metadata
from .spoil import said_of

BUCKETS = 2
ALIGNMENT = 64
LEFT_OPEN = "an earlier weight update was left open"
"""What a worker says of an update whose trainer is gone."""
Described = tuple[str, str, list[int], int]
"""Name, dtype, shape and offset of a tensor in a bucket."""
Form = tuple[str, str, list[int]]
"""Name, dtype and shape of a tensor that will come."""


FORMS = ("forms", "forms_name")
"""What an introduction says of the tensors that will come."""


class WeightSyncClient(Protocol):
    """vLLM's own protocol for whoever drives a weight update; it is structural, and this repeats it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Bucket(ABC):
    """Memory that a server can load from, as far as it is filled."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.used = 0
        self.tensors: list[Described] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        offset, size = self.used, tensor.numel() * tensor.element_size()
        if size:
            _copy(self.take(offset, size, name), tensor.detach(), size)
        self.tensors.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset))
        self.used = offset + aligned(size)

    @abstractmethod
    def take(self, offset: int, size: int, name: str) -> torch.Tensor:
        """So many of its bytes, for the tensor `name`; it grows where it must."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


class BucketTransfer(ABC):
    """Sends a model, again and again, to servers that run vgen's plugin. What its buckets are, a subclass says.

        transfer.send(source, version="step-7")  # any re-iterable of (name, tensor)

    The servers must be paused meanwhile, and their caches reset afterwards. Two buckets of `bucket_bytes` are filled
    and loaded in turn; a larger tensor gets a bucket of its size. Their memory is kept for the next `send` until
    `close`.
    """

    def __init__(self, client: WeightSyncClient, *, bucket_bytes: int) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self.client = client
        """May be replaced by another that reaches the same servers."""
        self.verify = False
        """Whether servers that copy by their record compare every destination with its source."""
        self._bytes = bucket_bytes
        self._buckets: Sequence[Any] = ()
        self._metadata: Metadata | None = None
        self._forms = forms_of(None)
        """Of the last source, made of its metadata."""
        self._told = ""
        """The name of the forms that the servers know."""
        self.copy_seconds = 0.0
        """Of the last `send`: spent on writing tensors into the buckets."""
        self.load_seconds = 0.0
        """Of the last `send`: spent on waiting for the servers."""
        self.buckets_sent = 0

    def send(self, source: Iterable[tuple[str, torch.Tensor]], version: str | None = None) -> None:
        """Replace all of the servers' weights and give them `version`. Raises `WeightSyncError`.

        After an error a server has its old layers with perhaps mixed content, and a later `send` may bring it back.
        """
        self.stream(source)
        self.finish(version)

    def stream(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The first half of `send`: all weights are there, and loaded but for what the last call does."""
        self.copy_seconds = self.load_seconds = 0.0
        self.buckets_sent = 0
        with self._closing():
            if (metadata := said_of(source)) != self._metadata:
                self._metadata, self._forms = metadata, forms_of(metadata)
            self._open(self._forms)
            self.client.start_weight_update()
            try:
                with ThreadPoolExecutor(1, "vgen-weights") as sender:
                    self._stream(source, sender)
            except BaseException:
                abort_update(self.client)
                raise

    def finish(self, version: str | None = None) -> None:
        """The second half: the weights are put to use, under `version`."""
        with self._closing():
            start = time.monotonic()
            self.client.finish_weight_update(version)
            self.load_seconds += time.monotonic() - start

    def close(self) -> None:
        """Give the memory back."""
        for bucket in self._buckets:
            bucket.close()
        self._buckets, self._told = (), ""

    @abstractmethod
    def _make(self) -> Sequence[Bucket]:
        """Two new buckets."""

    @abstractmethod
    def _introduce(self, forms: dict[str, Any]) -> None:
        """Make the buckets known to the servers, and in the same call the `forms` of what will come in them.

        Raises where an update is under way there, or they are unknown.
        """

    @abstractmethod
    def _update(self, bucket: Any, last: bool) -> None:
        """Have the servers load a bucket, in a thread of its own."""

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

    def _open(self, forms: dict[str, Any]) -> None:
        """Make sure that the servers know the buckets, and that nobody's update is half done there."""
        if self._buckets:
            try:
                self._introduce({"forms_name": forms["forms_name"]} if forms["forms_name"] == self._told else forms)
                self._told = forms["forms_name"]
                return
            except Exception:  # one was started anew, or has met another trainer since
                self.close()
        self._buckets = self._make()
        try:
            self._introduce(forms)
        except Exception as error:
            if LEFT_OPEN not in str(error):
                raise
            abort_update(self.client)
            self._introduce(forms)
        self._told = forms["forms_name"]

    def _stream(self, source: Iterable[tuple[str, torch.Tensor]], sender: ThreadPoolExecutor) -> None:
        filling, loading = self._buckets
        under_way: Future[None] | None = None
        for name, tensor in source:
            if filling.tensors and filling.used + tensor.numel() * tensor.element_size() > self._bytes:
                self._wait(under_way)
                under_way = sender.submit(self._send, filling, False)
                filling, loading = loading, filling
                filling.clear()
            start = time.monotonic()
            filling.add(name, tensor)
            self.copy_seconds += time.monotonic() - start
        self._wait(under_way)
        self._wait(sender.submit(self._send, filling, True))
        filling.clear()
        loading.clear()

    def _wait(self, under_way: Future[None] | None) -> None:
        if under_way is not None:
            start = time.monotonic()
            under_way.result()
            self.load_seconds += time.monotonic() - start

    def _send(self, bucket: Bucket, last: bool) -> None:
        self._update(bucket, last)
        self.buckets_sent += 1


def forms_of(metadata: Metadata | None) -> dict[str, Any]:
    """What a server is told of a source before its tensors come, and a name for that; no name where it says nothing."""
    if metadata is None:
        return {"forms_name": ""}
    forms: list[Form] = [(name, str(dtype).removeprefix("torch."), list(shape)) for name, shape, dtype in metadata]
    return {"forms_name": hashlib.sha256(json.dumps(forms).encode()).hexdigest()[:16], "forms": forms}


def _copy(place: torch.Tensor, tensor: torch.Tensor, size: int) -> None:
    """Write `tensor` into as many bytes.

    On a host by one thread: torch's own copy has a thread on each core, where a server that loads on the same cores
    makes all of them wait for the slowest. Seen on two cores: 2 GB in 1.9 s, and in 0.18 s by one thread.
    """
    if place.device.type == tensor.device.type == "cpu" and tensor.is_contiguous():
        ctypes.memmove(place.data_ptr(), tensor.data_ptr(), size)
    else:
        place = place.view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=place.is_cuda)


def abort_update(client: WeightSyncClient) -> None:
    """End the update that is under way. The servers answer with errors: that it was given up, and is over."""
    with suppress(Exception):
        client.update_weights({"abort": True})
    with suppress(Exception):
        client.finish_weight_update()


def aligned(size: int) -> int:
    """`size` rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


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
