"""Weights to servers that vgen has not started, through vLLM's own NCCL and CUDA IPC engines.

A server takes them where it was started with `--weight-transfer-config '{"backend": "nccl"}'`, or `"ipc"`. The
trainer's side is vLLM's too, so vLLM must be installed there. What it would wait for without end is ended here.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from math import prod
from threading import Thread
from typing import Any, Literal

import torch

from ..engines.launch import free_port
from ..errors import WeightSyncError
from .buckets import WeightSyncClient, as_sync_error
from .group import own_address
from .spoil import metadata_of

Backend = Literal["nccl", "ipc"]
NCCL = "2.29.7"
"""The least that vLLM 0.32 takes."""


def available() -> bool:
    """Whether vLLM is installed here."""
    return find_spec("vllm") is not None


def nccl_problem() -> str:
    """Why vLLM's NCCL engine cannot be used beside the trainer; empty where it can."""
    if not available():
        return "vLLM is not installed beside the trainer"
    try:
        find_nccl()
    except WeightSyncError as error:
        return error.problem
    return ""


class VllmTransfer:
    """Sends a model, again and again, through vLLM's engine `backend` to servers with `workers` in all.

    As with a `BucketTransfer` the servers must be paused meanwhile, and their caches reset afterwards. Both sides of
    vLLM's NCCL engine cut the stream by what was announced, and wait for exactly that: where the source fails, zeros
    take the place of what is left, and the error is raised at the end. Where a server fails the communicator is
    aborted; a server that is itself waiting in NCCL then must be started anew, which `vgen serve`'s need not.

    `client.init_weight_transfer_engine` must give each server its own `rank_offset`: its first worker's rank.
    """

    copy_seconds: float | None = None
    """vLLM's engine does not tell."""
    verify = False
    """vLLM's engines reload, so there is no record to compare bits by."""

    def __init__(
        self,
        client: WeightSyncClient,
        *,
        backend: Backend,
        url: str,
        workers: int,
        device: torch.device,
        bucket_bytes: int,
        port: int = 0,
        timeout: float = 600.0,
    ) -> None:
        self.client = client
        """May be replaced by another that reaches the same servers."""
        self.buckets_sent: int | None = None
        self._backend: Backend = backend
        self._url, self._workers, self._device = url, workers, device
        self._bucket_bytes, self._port, self._timeout = bucket_bytes, port, timeout
        self._engine: Any = None

    def send(self, source: Iterable[tuple[str, torch.Tensor]], version: str | None = None) -> None:
        """Replace all of the servers' weights and give them `version`. Raises `WeightSyncError`."""
        self.stream(source)
        self.finish(version)

    def stream(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The first half of `send`: all weights are there."""
        self.buckets_sent = 0 if self._backend == "ipc" else None
        on_gpu = self._device.type == "cuda"
        with self._closing(), torch.cuda.device(self._device) if on_gpu else nullcontext():
            whole = Announced(source, self._device)
            engine = self._introduced()
            if on_gpu:
                torch.cuda.current_stream().synchronize()  # vLLM's engine reads on streams of its own
            engine.source = whole
            if self._backend == "ipc":  # each bucket is of this size, and vLLM's refuses a tensor that is larger
                engine.packed_buffer_size_bytes = max(self._bucket_bytes, whole.largest)
            try:
                engine.send_weights()
            finally:
                engine.source = None
            whole.judge()

    def finish(self, version: str | None = None) -> None:
        """The second half: the weights are put to use, under `version`."""
        with self._closing():
            self.client.finish_weight_update(version)

    def close(self) -> None:
        """Leave the servers, also in the middle of a transfer: what waits on the device for them is ended."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with suppress(Exception):
                engine.shutdown()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """After any error, close, and end the update at the servers."""
        try:
            yield
        except BaseException as error:
            self.close()
            with suppress(Exception):
                self.client.finish_weight_update()
            if isinstance(error, WeightSyncError) or not isinstance(error, Exception):
                raise
            raise as_sync_error(error) from error

    def _introduced(self) -> Any:
        if self._engine is None:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and self._backend == "ipc":
                # One rank drives; vLLM's engine would wait for all of them.
                raise _refused("vLLM's own IPC engine serves a trainer of one rank; `vgen serve`'s serve any")
            made: Future[Any] = Future()
            Thread(target=self._make, args=(made,), daemon=True).start()
            try:
                self._engine = made.result(self._timeout)
            except TimeoutError:
                raise self.not_met(TimeoutError(f"not within {self._timeout:g} s")) from None
        return self._engine

    def not_met(self, error: Exception) -> WeightSyncError:
        """What to raise where `error` has kept the two sides from coming together."""
        found = error if isinstance(error, WeightSyncError) else as_sync_error(error)
        problem = f"vLLM's {self._backend} engines did not meet: {found.problem}"
        if self._backend == "nccl":
            problem += (
                f": each server must be on other GPUs than the trainer, and find NCCL {NCCL} or newer "
                '(VLLM_NCCL_SO_PATH); weight_transport="checkpoint" does without'
            )
        raised = WeightSyncError(problem, phase=found.phase, parameter=found.parameter, receiver=found.receiver)
        raised.__cause__ = error
        return raised

    def _make(self, made: Future[Any]) -> None:
        """In a thread of its own: each side waits for the other, and where a server refuses it does not come."""
        with suppress(InvalidStateError):
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                found = _trainer_engine(self._backend, _Driver(self, made), self._own())
            except WeightSyncError as error:
                made.set_exception(error)
            except Exception as error:
                made.set_exception(self.not_met(error))
            else:
                made.set_result(found)

    def _own(self) -> dict[str, Any]:
        if self._backend == "ipc":
            return {"packed": True, "packed_buffer_size_bytes": self._bucket_bytes}
        address = own_address(self._url)
        meeting = {"master_address": address, "master_port": free_port(address, self._port)}
        # Tensor by tensor. In vLLM 0.32 its packed receiver has two buffers on two streams, and a layer whose tensors
        # came in both is put together on one of them, with nothing to make it wait for the other.
        return {"packed": False, "world_size": 1 + self._workers, **meeting}


class _Driver:
    """The servers as vLLM's engine sees them."""

    def __init__(self, transfer: VllmTransfer, made: Future[Any]) -> None:
        self._transfer, self._made = transfer, made

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        try:
            self._transfer.client.init_weight_transfer_engine(init_info)
        except Exception as error:
            self._made.set_exception(self._transfer.not_met(error))
            raise

    def start_weight_update(self) -> None:
        self._transfer.client.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        handles = update_info.pop("ipc_handles", None)
        if handles is not None:  # as vLLM's own HTTP client does
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        try:
            self._transfer.client.update_weights({k: v for k, v in update_info.items() if v is not None})
        except BaseException:
            self._transfer.close()
            raise
        if handles is not None and self._transfer.buckets_sent is not None:
            self._transfer.buckets_sent += 1

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Left to `VllmTransfer.finish`."""


class Announced:
    """A source that yields what it has announced, whatever happens; what did happen is raised by `judge`."""

    def __init__(self, source: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
        self._source, self._device = source, device
        self._forms = metadata_of(source)
        self._error: BaseException | None = None

    @property
    def largest(self) -> int:
        """The bytes of the largest tensor."""
        return max((prod(shape) * dtype.itemsize for _, shape, dtype in self._forms), default=0)

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name=name, dtype=dtype, shape=tuple(shape)) for name, shape, dtype in self._forms]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = iter(self._source)
        for name, shape, dtype in self._forms:
            tensor = None
            if self._error is None:
                try:
                    tensor = self._next(tensors, name, tuple(shape), dtype)
                except BaseException as error:
                    self._error = error
            yield name, torch.zeros(shape, dtype=dtype, device=self._device) if tensor is None else tensor
        if self._error is None and (more := next(tensors, None)) is not None:
            self._error = _gathered("it was not announced", more[0])

    def judge(self) -> None:
        """Raise what the source has met, if anything."""
        if self._error is not None:
            raise self._error

    def _next(self, tensors: Iterator[tuple[str, torch.Tensor]], name: str, shape: Any, dtype: Any) -> torch.Tensor:
        try:
            came, tensor = next(tensors)
        except StopIteration:
            raise _gathered("it was announced and did not come", name) from None
        if (came, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            form = f"{came!r} with a size of {list(tensor.shape)} in {tensor.dtype}"
            raise _gathered(f"{form} came, where a size of {list(shape)} in {dtype} was announced", name)
        return tensor.detach().to(self._device)


def _trainer_engine(backend: Backend, driver: _Driver, own: dict[str, Any]) -> Any:
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    nowhere: Any = ()  # the source of each transfer is its own
    if backend == "nccl":
        find_nccl()
        engine, info = nccl_engine.NCCLTrainerWeightTransferEngine, nccl_engine.NCCLTrainerInitInfo
    else:
        engine, info = ipc_engine.IPCTrainerWeightTransferEngine, ipc_engine.IPCTrainerInitInfo
    return engine.trainer_init(info(**own, rank=0), client=driver, source=nowhere)  # pyright: ignore


def find_nccl() -> None:
    """Raise `WeightSyncError` where vLLM finds no NCCL: its communicators would be made all the same, and send nothing.

    One older than `NCCL` counts as none.
    """
    from vllm import envs
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    try:
        if envs.VLLM_DISABLE_PYNCCL:
            raise RuntimeError("VLLM_DISABLE_PYNCCL is set")
        NCCLLibrary()
    except Exception as error:
        raise _refused(
            f"vLLM finds no NCCL that it can use beside the trainer ({error}): set VLLM_NCCL_SO_PATH to the "
            f"libnccl.so.2 of NCCL {NCCL} or newer"
        ) from error


def _gathered(problem: str, parameter: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="gather", parameter=parameter, receiver="trainer")


def _refused(problem: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="transfer", receiver="server")
