"""What every transport of weights provides, and what it needs from the servers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch

from ...engine_protocol import BUCKET_BYTES, Source, SyncTrace, Transport
from ...errors import WeightSyncError
from ...profiling import Span, semconv
from ..load.random_weights import RandomWeights
from .sync_errors import as_sync_error

T = TypeVar("T")
NamedTensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]

NEEDS_VGEN_SERVE = "start it with `vgen serve`"
NEEDS_GPU = "the trainer's model is not on a GPU"


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """What the user chose for all transports."""

    bucket_bytes: int = BUCKET_BYTES
    """Size of each of the two buckets that weights travel in."""
    folder: str | None = None
    """A folder that the trainer and the servers share, for checkpoints; by default the system's temporary folder."""
    port: int = 0
    """Where the trainer listens for the members of a process group; 0 for any free port."""
    timeout: float = 600.0
    """Seconds in which every member of a process group must answer."""


class TransportEndpoint(Protocol):
    """What a transport needs to know of a server."""

    features: frozenset[str]
    """Of `vgen serve`; empty on a stock vLLM server."""
    device_type: str
    devices: frozenset[str] | None
    """UUIDs of the GPUs of its workers; None if they were not asked for."""
    host: str
    """Identifies the server's machine, as `this_host` does; empty if unknown."""
    workers: int
    backend: str | None
    """Which of vLLM's own weight-transfer engines a stock server was started with."""
    restarts: int
    """How often the server was restarted."""

    @property
    def name(self) -> str: ...

    @property
    def stock(self) -> bool:
        """Whether the server runs vLLM alone, without vgen."""
        ...


class WeightSyncClient(Protocol):
    """vLLM's protocol for whoever drives a weight update. It is structural, so it is repeated here without vLLM."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class EndpointGroup(WeightSyncClient, Protocol):
    """Several servers that get the same weights by the same transport. Each method calls all of them at once."""

    @property
    def endpoints(self) -> Sequence[TransportEndpoint]: ...

    def update_in_one_call(
        self, update_info: Any, weight_version: str | None, init_info: dict[str, Any] | None = None
    ) -> None:
        """A whole weight update, from its start to its finish."""
        ...

    def reload_checkpoint(self, folder: str) -> None: ...

    def set_version(self, weight_version: str) -> None: ...

    def record_seconds(self, span: Span, method: str) -> None:
        """Set on `span` how long the servers took for all calls of `method`: minimum, median and maximum."""
        ...


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What one sync sends."""

    source: Source
    version: str
    trace: SyncTrace
    random: RandomWeights | None = None
    """Sent before the source, so that a weight that the engine fails to replace is noticed."""
    verify: bool = False
    """Whether servers that copy by a record compare every destination with its source."""


class TransportUnavailable(Exception):
    """A transport that supports a server cannot be opened to it now. The text says why."""


class WeightTransport(ABC):
    """A way for weights to reach servers.

    The caller opens a transport before every sync, pauses the servers, and sends. Their caches must be reset
    afterwards.
    """

    name: Transport
    serves: str
    """Which servers it is for, as the reason why it was chosen."""
    on_request = False
    """Whether it is used only if the user asks for it by name."""
    reloads: ClassVar[bool] = False
    """Whether the servers load the weights by vLLM's own reload, and not by vgen's engine in their workers."""

    @abstractmethod
    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        """Why it cannot bring the weights of `source` to this server, and what to do; None if it can.

        If `source` is None, only what depends on the server alone is checked.
        """

    def open(self, group: EndpointGroup, source: Source) -> None:
        """Prepare to send `source` to these servers. Raises `TransportUnavailable`."""
        self._group = group

    @contextmanager
    def prepared(self, update: WeightUpdate) -> Generator[None]:
        """A block around pause and `send`. What need not wait for the pause is done on entry."""
        yield

    @abstractmethod
    def send(self, update: WeightUpdate) -> None:
        """Replace all weights of the servers, in phases of `update.trace`. Raises `WeightSyncError`."""

    def close(self) -> None:  # noqa: B027  (not every transport keeps something)
        """Free what is kept for the next sync."""


class StreamTransport(WeightTransport):
    """A transport that streams tensors. What it makes for a set of servers is kept while they are the same."""

    client: WeightSyncClient
    """The servers. `open` sets it."""
    verify = False
    """Whether servers that copy by a record compare every destination with its source."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._device: torch.device | None = None
        self._members: tuple[tuple[str, int, int], ...] = ()
        """Name, number of workers and restarts of each server."""

    def open(self, group: EndpointGroup, source: Source) -> None:
        super().open(group, source)
        # A restarted server of vgen's refuses the next update; a stock one would wait for the trainer to connect again.
        members = tuple((each.name, each.workers, each.restarts if each.stock else 0) for each in group.endpoints)
        device = self._device_for(source)
        if (device, members) != (self._device, self._members):
            self.close()
            self._device, self._members = device, members
        self.client = group

    def send(self, update: WeightUpdate) -> None:
        self.verify = update.verify
        with update.trace.phase("transfer") as span:
            if update.random is not None:
                self.replace_weights(update.random, update.version)
            self.stream(update.source)
            span.set({semconv.GATHER_SECONDS: update.source.seconds, **self.measured()})
            self._group.record_seconds(span, "update_weights")
        with update.trace.phase("load") as span:
            self.finish(update.version)
            self._group.record_seconds(span, "finish_weight_update")

    def replace_weights(self, source: NamedTensors, version: str | None = None) -> None:
        """Replace all weights of the servers and set their version. Raises `WeightSyncError`.

        After an error, a server has its old layers with old or mixed content. A later update can repair it.
        """
        self.stream(source)
        self.finish(version)

    @abstractmethod
    def stream(self, source: NamedTensors) -> None:
        """The first half of `replace_weights`: the servers receive and load all weights."""

    def finish(self, version: str | None = None) -> None:
        """The second half of `replace_weights`: the servers start to use the weights, under `version`."""
        with self._close_on_error():
            self.client.finish_weight_update(version)

    @abstractmethod
    def measured(self) -> dict[str, Any]:
        """Attributes of the last `stream`, for its span."""

    @contextmanager
    def _close_on_error(self) -> Generator[None]:
        """Close after any error. An `Exception` is raised as a `WeightSyncError`."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, WeightSyncError) or not isinstance(error, Exception):
                raise
            raise as_sync_error(error) from error

    def _device_for(self, source: Source) -> torch.device | None:
        """The GPU that the transport is bound to, if it is bound to one."""
        return None


def in_thread(function: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
    """Run `function` in a thread of its own. The result is in the future, unless somebody else sets that first.

    An executor would not do: the process could not end while a call waits for servers that never come.
    """
    result: Future[T] = Future() if future is None else future

    def run() -> None:
        with suppress(InvalidStateError):
            try:
                result.set_result(function())
            except Exception as error:
                result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result


def source_gpu(source: Source) -> torch.device | None:
    """The GPU that the trainer's model is on; None if it is not on a GPU, or there is no model."""
    model = source.model
    device = next((parameter.device for parameter in model.parameters()), None) if model is not None else None
    return device if device is not None and device.type == "cuda" else None
