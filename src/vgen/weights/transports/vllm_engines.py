"""Weights to stock vLLM servers, through vLLM's own NCCL and CUDA IPC engines.

The server must be started with `--weight-transfer-config '{"backend": "nccl"}'`, or `"ipc"`. The trainer uses vLLM's
engine too, so vLLM must be installed there. vLLM's engines wait without a limit; vgen ends their waits.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from math import prod
from typing import Any, Literal

import torch

from ..._addresses import address_for_all, free_port
from ...engine_protocol import Source
from ...errors import WeightSyncError
from ...profiling import semconv
from ..source.module_source import metadata_of, source_of
from .sync_errors import as_sync_error
from .weight_transport import (
    NEEDS_GPU,
    EndpointGroup,
    NamedTensors,
    StreamTransport,
    TransportEndpoint,
    TransportSettings,
    TransportUnavailable,
    in_thread,
    source_gpu,
)

Backend = Literal["nccl", "ipc"]
OLDEST_NCCL = "2.29.7"
"""The oldest NCCL that vLLM 0.32 accepts."""


def available() -> bool:
    """Whether vLLM is installed in this environment."""
    return find_spec("vllm") is not None


class VllmTransport(StreamTransport):
    """To stock servers that were started with vLLM's engine `backend`.

    IPC must be asked for, because it is insecure: the server unpickles what it receives over HTTP.

    Both sides of vLLM's NCCL engine wait for exactly the tensors that were announced. So if the source fails, zeros are
    sent in place of the remaining tensors, and the error is raised at the end. If a server fails, the trainer's
    communicator is aborted. A stock server that waits in NCCL at that moment must be restarted, unlike a server of
    `vgen serve`.

    `client.init_weight_transfer_engine` must set `rank_offset` for each server: the rank of its first worker.
    """

    serves = "servers with vLLM's own NCCL engine"
    reloads = True

    def __init__(self, settings: TransportSettings, backend: Backend) -> None:
        super().__init__(settings)
        self.name = backend
        self._backend: Backend = backend
        self.on_request = backend == "ipc"
        self.buckets_sent: int | None = None
        self._engine: Any = None

    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        if endpoint.features and self._backend == "ipc":
            return "`resident` takes its place on a server that `vgen serve` has started"
        if endpoint.features or endpoint.backend != self._backend:
            return f'start it with --weight-transfer-config \'{{"backend": "{self._backend}"}}\''
        if source is None:
            return None if available() else "install vLLM beside the trainer, because the trainer uses vLLM's engine"
        return f"{NEEDS_GPU}, as {self._backend} needs it" if source_gpu(source) is None else None

    def open(self, group: EndpointGroup, source: Source) -> None:
        if not available():
            raise TransportUnavailable("vLLM is not installed beside the trainer")
        if self._backend == "nccl":
            find_nccl()
        super().open(group, source)

    def measured(self) -> dict[str, Any]:
        return {semconv.BUCKETS: self.buckets_sent}

    def stream(self, source: NamedTensors) -> None:
        self.buckets_sent = 0 if self._backend == "ipc" else None
        device = self._device
        assert device is not None, "open() first"
        on_gpu = device.type == "cuda"
        with self._close_on_error(), torch.cuda.device(device) if on_gpu else nullcontext():
            announced = AnnouncedSource(source, device)
            engine = self._connected_engine()
            if on_gpu:
                torch.cuda.current_stream().synchronize()  # vLLM's engine reads the weights on other streams
            engine.source = announced
            if self._backend == "ipc":  # every bucket has this size, and vLLM refuses a tensor that is larger
                engine.packed_buffer_size_bytes = max(self._settings.bucket_bytes, announced.largest)
            try:
                engine.send_weights()
            finally:
                engine.source = None
            announced.raise_error()

    def close(self) -> None:
        """Disconnect, also during a transfer: whatever waits on the device for the servers is aborted."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with suppress(Exception):
                engine.shutdown()

    @contextmanager
    def _close_on_error(self) -> Generator[None]:
        """After any error, also end the update at the servers."""
        with super()._close_on_error():
            try:
                yield
            except BaseException:
                self.close()
                with suppress(Exception):
                    self.client.finish_weight_update()
                raise

    def _device_for(self, source: Source) -> torch.device | None:
        return source_gpu(source)

    def _connected_engine(self) -> Any:
        """The trainer's side of vLLM's engine, once the servers have connected to it."""
        if self._engine is None:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and self._backend == "ipc":
                # Only one rank drives the update, but vLLM's engine would wait for all ranks.
                problem = "vLLM's own IPC engine works only for a trainer of one rank; use servers of `vgen serve`"
                raise WeightSyncError(problem, phase="transfer", receiver="server")
            connected: Future[Any] = Future()
            in_thread(lambda: self._connect(VllmEngineClient(self, connected)), connected)
            try:
                self._engine = connected.result(self._settings.timeout)
            except TimeoutError:
                raise self.not_connected(TimeoutError(f"not within {self._settings.timeout:g} s")) from None
        return self._engine

    def not_connected(self, error: Exception) -> WeightSyncError:
        """What to raise if `error` has kept trainer and servers from connecting."""
        cause = as_sync_error(error)
        problem = f"vLLM's {self._backend} engines did not connect: {cause.problem}"
        if self._backend == "nccl":
            problem += (
                f": each server must be on other GPUs than the trainer, and find NCCL {OLDEST_NCCL} or newer "
                '(VLLM_NCCL_SO_PATH); or use weight_transport="checkpoint", which needs no NCCL'
            )
        raised = WeightSyncError(problem, phase=cause.phase, parameter=cause.parameter, receiver=cause.receiver)
        raised.__cause__ = error
        return raised

    def _connect(self, client: VllmEngineClient) -> Any:
        """Runs in a thread: trainer and servers wait for each other, and a server that refuses never comes."""
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            engine = _trainer_engine(self._backend, client, self._engine_arguments())
            if (communicator := getattr(engine, "model_update_group", None)) is not None:
                # Its members met in a store that listens while somebody refers to it, and unpickle what they find
                # there, a stranger's too. Now they are connected, and ask it nothing any more.
                communicator.group = None
            return engine
        except Exception as error:
            raise self.not_connected(error) from error

    def _engine_arguments(self) -> dict[str, Any]:
        if self._backend == "ipc":
            return {"packed": True, "packed_buffer_size_bytes": self._settings.bucket_bytes}
        address = address_for_all(url for url, *_ in self._members)
        master = {"master_address": address, "master_port": free_port(address, self._settings.port)}
        # Not packed: in vLLM 0.32 the packed receiver has two buffers on two streams, and a layer whose tensors came in
        # both buffers is assembled on one stream without waiting for the other.
        return {"packed": False, "world_size": 1 + sum(workers for _, workers, _ in self._members), **master}


class VllmEngineClient:
    """The servers, as vLLM's engine on the trainer's side calls them."""

    def __init__(self, transport: VllmTransport, connected: Future[Any]) -> None:
        self._transport, self._connected = transport, connected

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        try:
            self._transport.client.init_weight_transfer_engine(init_info)
        except Exception as error:  # the engine goes on waiting for the server, so the caller is told here
            self._connected.set_exception(self._transport.not_connected(error))
            raise

    def start_weight_update(self) -> None:
        self._transport.client.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:  # encoded as by vLLM's own HTTP client
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        try:
            self._transport.client.update_weights({k: v for k, v in update_info.items() if v is not None})
        except BaseException:
            self._transport.close()
            raise
        if handles is not None and self._transport.buckets_sent is not None:
            self._transport.buckets_sent += 1

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing: `VllmTransport.finish` does it."""


class AnnouncedSource:
    """A source that yields exactly what it has announced, also after an error, which `raise_error` raises."""

    def __init__(self, source: NamedTensors, device: torch.device) -> None:
        self._source, self._device = source, device
        self._metadata = metadata_of(source_of(source))
        self._error: BaseException | None = None

    @property
    def largest(self) -> int:
        """Size of the largest tensor in bytes."""
        return max((prod(shape) * dtype.itemsize for _, shape, dtype in self._metadata), default=0)

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name=name, dtype=dtype, shape=tuple(shape)) for name, shape, dtype in self._metadata]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = iter(self._source)
        for name, shape, dtype in self._metadata:
            tensor = None
            if self._error is None:
                try:
                    tensor = self._next(tensors, name, tuple(shape), dtype)
                except BaseException as error:
                    self._error = error
            yield name, torch.zeros(shape, dtype=dtype, device=self._device) if tensor is None else tensor
        if self._error is None and (extra := next(tensors, None)) is not None:
            self._error = _gather_error("the source yielded it, but did not announce it", extra[0])

    def raise_error(self) -> None:
        """Raise the error that occurred in the last pass, if one did."""
        if self._error is not None:
            raise self._error

    def _next(self, tensors: Iterator[tuple[str, torch.Tensor]], name: str, shape: Any, dtype: Any) -> torch.Tensor:
        try:
            came_name, tensor = next(tensors)
        except StopIteration:
            raise _gather_error("the source announced it, but did not yield it", name) from None
        if (came_name, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            form = f"{came_name!r} with a size of {list(tensor.shape)} in {tensor.dtype}"
            raise _gather_error(f"the source yielded {form}, but announced a size of {list(shape)} in {dtype}", name)
        return tensor.detach().to(self._device)


def _trainer_engine(backend: Backend, client: VllmEngineClient, arguments: dict[str, Any]) -> Any:
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    no_source: Any = ()  # each transfer sets its own
    if backend == "nccl":
        engine, info = nccl_engine.NCCLTrainerWeightTransferEngine, nccl_engine.NCCLTrainerInitInfo
    else:
        engine, info = ipc_engine.IPCTrainerWeightTransferEngine, ipc_engine.IPCTrainerInitInfo
    return engine.trainer_init(info(**arguments, rank=0), client=client, source=no_source)  # pyright: ignore


def find_nccl() -> None:
    """Raise `TransportUnavailable` if vLLM finds no NCCL, or one older than `OLDEST_NCCL`.

    vLLM would make its communicators all the same, and they would send nothing.
    """
    from vllm import envs
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    try:
        if envs.VLLM_DISABLE_PYNCCL:
            raise RuntimeError("VLLM_DISABLE_PYNCCL is set")
        NCCLLibrary()
    except Exception as error:
        raise TransportUnavailable(
            f"vLLM finds no NCCL that it can use beside the trainer ({error}): set VLLM_NCCL_SO_PATH to the "
            f"libnccl.so.2 of NCCL {OLDEST_NCCL} or newer"
        ) from error


def _gather_error(problem: str, parameter: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="gather", parameter=parameter, receiver="trainer")
