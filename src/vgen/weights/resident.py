"""Weights to a server on the trainer's own GPU, which reads them where they lie: no byte of them is sent.

CUDA's handles of the trainer's memory are exchanged once, as base64; later syncs are one call, in which the worker
copies by its record (see `recorded`). The handles are CUDA's own, not torch's: torch would keep the memory of a
trainer that moves its model away, for as long as a server has it open.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Protocol

import torch

from ..errors import WeightSyncError
from .buckets import WeightSyncClient, abort_update, as_sync_error
from .live import Live, Located, Places
from .source import model_of

UNKNOWN = "it does not know these weights' handles"
"""What a worker says that was started anew, or has met another trainer since."""
_ACTIVE = "already active"
"""What vLLM says of an update that was left open."""
Entry = tuple[str, str, list[int], list[int], int, int]
"""Name, dtype, shape, stride, which of the handles, and the offset in bytes from there."""


class NotResident(Exception):
    """These weights cannot be read where they lie; says why."""


class Table:
    """Where each tensor of a source lies, in terms that another process can use. Good for as long as `holds`."""

    def __init__(self, source: Any) -> None:
        """Makes one pass over the source. Raises `NotResident`."""
        self.name = secrets.token_hex(8)
        live = Live.of(model_of(source))
        if live is None:
            raise NotResident("the model is sharded, adapted or quantized: its weights are made for each sync")
        self.handles: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.device: torch.device | None = None
        known: dict[int, int] = {}
        for name, tensor in source:
            if not live.hold(tensor):
                raise NotResident(f"{name} is made for each sync")
            if not tensor.is_cuda or self.device not in (None, tensor.device):
                raise NotResident(f"{name} is on {tensor.device}")
            self.device = tensor.device
            base, size = _allocation(tensor.data_ptr()) if tensor.numel() else (0, 0)
            if base not in known:
                known[base] = len(self.handles)
                self.handles.append({"handle": _export(base) if size else "", "bytes": size})
            kind = str(tensor.dtype).removeprefix("torch.")
            where = known[base], tensor.data_ptr() - base if size else 0
            self.entries.append((name, kind, list(tensor.shape), list(tensor.stride()), *where))
        self._live = live

    def holds(self) -> bool:
        """Whether the model still lies there."""
        return self._live.near() and self._live.whole()

    def settle(self) -> None:
        """Wait for what the trainer is still computing the weights with."""
        torch.cuda.current_stream(self.device).synchronize()

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "handles": self.handles, "tensors": self.entries}


class Receivers(WeightSyncClient, Protocol):
    """Servers that are sent to together."""

    def whole_update(self, update_info: Any, version: str | None, init_info: Any = None) -> None:
        """An update from its start to its finish, after an introduction where there is one."""
        ...


class ResidentTransfer:
    """Has servers on the trainer's GPU copy its weights. They must be paused meanwhile, their caches reset after."""

    def __init__(self) -> None:
        self._source: Any = None
        self._table: Table | None = None

    def table(self, source: Any) -> Table:
        """Of the weights as they lie now. Raises `NotResident`."""
        if self._table is None or self._source is not source or not self._table.holds():
            self._table, self._source = Table(source), source
        else:
            source.seconds = 0.0  # there was no pass
        return self._table

    def send(self, receivers: Receivers, table: Table, version: str | None, *, verify: bool = False) -> None:
        """Bring the weights of `table`, which must still hold, there under `version`.

        With `verify` every destination is compared with its source on the device. Raises `WeightSyncError`.
        """
        update = {"table": table.name, "verify": verify, "last": True}
        table.settle()
        try:
            try:
                receivers.whole_update(update, version)
            except Exception as error:
                if _ACTIVE in str(error):
                    abort_update(receivers)
                elif UNKNOWN not in str(error):
                    raise
                receivers.whole_update(update, version, {"table": table.described()})
        except Exception as error:
            self._table = None
            raise error if isinstance(error, WeightSyncError) else as_sync_error(error) from error


class ResidentWeights:
    """The worker's side of a `Table`: a source of views of the trainer's memory."""

    seconds = 0.0

    def __init__(self, described: dict[str, Any], device: torch.device) -> None:
        self.name = str(described["name"])
        self._opened: list[int] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        try:
            memory = [self._open(each["handle"], int(each["bytes"]), device) for each in described["handles"]]
            self.tensors = [(entry[0], _view(memory[entry[4]], entry)) for entry in described["tensors"]]
            self.places = Places([({name: tensor}, name) for name, tensor in self.tensors])
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors]

    def live(self) -> Located:
        """In place of `Live`: that the weights lie where they did is for the trainer to say, by the table's name."""
        return self

    def near(self) -> bool:
        return True

    def whole(self) -> bool:
        return True

    def same_as(self, other: Any) -> bool:
        return other is self

    def hold(self, tensor: torch.Tensor) -> bool:
        return True

    def close(self) -> None:
        """Let go of the trainer's memory."""
        self.tensors.clear()
        runtime, _ = _cuda()
        for address in self._opened:
            runtime.cudaIpcCloseMemHandle(address)
        self._opened.clear()

    def _open(self, handle: str, size: int, device: torch.device) -> torch.Tensor:
        if not handle:
            return torch.empty(0, dtype=torch.uint8, device=device)
        runtime, _ = _cuda()
        opened = runtime.cudaIpcMemHandle_t()
        opened.reserved = base64.b64decode(handle)
        address = int(_checked(runtime.cudaIpcOpenMemHandle(opened, runtime.cudaIpcMemLazyEnablePeerAccess)))
        self._opened.append(address)
        return torch.as_tensor(_Memory(address, size), device=device)


class _Memory:
    """Memory at an address, as numba's CUDA array interface describes it (version 3)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def uuid_of(device: torch.device) -> str:
    """A GPU's, which is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _view(memory: torch.Tensor, entry: Sequence[Any]) -> torch.Tensor:
    name, kind, shape, stride, _, offset = entry
    dtype = getattr(torch, kind, None)
    if not isinstance(dtype, torch.dtype) or min([offset, *shape, *stride], default=0) < 0:
        raise WeightSyncError(f"dtype {kind!r}, shape {shape}", phase="load", parameter=name, receiver="server")
    if not prod(shape):
        return torch.empty(shape, dtype=dtype, device=memory.device)
    size = (sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) + 1) * dtype.itemsize
    if offset % dtype.itemsize or offset + size > memory.numel():
        raise WeightSyncError("it lies outside its memory", phase="load", parameter=name, receiver="server")
    return memory[offset : offset + size].view(dtype).as_strided(shape, stride)


def _allocation(address: int) -> tuple[int, int]:
    """Beginning and size of what was allocated there."""
    _, driver = _cuda()
    base, size = _checked(driver.cuMemGetAddressRange(address))
    return int(base), int(size)


def _export(base: int) -> str:
    runtime, _ = _cuda()
    return base64.b64encode(bytes(_checked(runtime.cudaIpcGetMemHandle(base)).reserved)).decode()


def _cuda() -> tuple[Any, Any]:
    try:
        from cuda.bindings import driver, runtime  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NotResident("cuda-bindings, which torch's CUDA builds come with, is not installed") from None
    return runtime, driver


def _checked(result: tuple[Any, ...]) -> Any:
    """What a CUDA call gives, without its status."""
    status, *rest = result
    if int(status):
        # As of memory of an expandable segment, which has no handle.
        raise NotResident(f"CUDA cannot share its memory ({getattr(status, 'name', status)})")
    return rest[0] if len(rest) == 1 else tuple(rest)
