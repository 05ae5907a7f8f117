"""Weights to a server on the trainer's own GPU, which reads them from the trainer's memory: no bytes are sent.

The trainer sends CUDA's handles of its memory once, as base64. A later sync is one call, in which the workers copy by
the loader's record (`weights.load.recorded_copy`). The handles are CUDA's own and not torch's: torch would keep the
memory allocated while a server has it open, although the trainer has moved its model away.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch

from ...engine_protocol import Source, SourceAddresses
from ...errors import WeightSyncError
from ...profiling import semconv
from ..source.address_snapshot import TensorAddresses
from ..source.module_source import IterableSource
from .buckets import abort_update, dtype_name, dtype_of, malformed
from .sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, as_sync_error
from .weight_transport import (
    NEEDS_GPU,
    NEEDS_VGEN_SERVE,
    EndpointGroup,
    TransportEndpoint,
    TransportUnavailable,
    WeightTransport,
    WeightUpdate,
    source_gpu,
)

TensorEntry = tuple[str, str, list[int], list[int], int, int]
"""Name, dtype, shape, stride, index of the handle, and offset in bytes from the start of its memory."""


class NotResident(TransportUnavailable):
    """Another process cannot read these weights from the memory that they are in. The text says why."""


class CudaIpcTransport(WeightTransport):
    """To servers with vgen's plugin whose workers are all on the trainer's GPU."""

    name, serves = "resident", "servers on the trainer's own GPU"

    def __init__(self) -> None:
        self._source: Source | None = None
        self._table: HandleTable | None = None

    def supports(self, endpoint: TransportEndpoint, source: Source | None) -> str | None:
        if "resident" not in endpoint.features:
            return NEEDS_VGEN_SERVE
        if source is None:
            return None
        if (gpu := source_gpu(source)) is None:
            return NEEDS_GPU
        return None if endpoint.devices == {uuid_of(gpu)} else "not on the trainer's own GPU"

    def open(self, group: EndpointGroup, source: Source) -> None:
        """Make the table of handles, unless the last one is still valid. Raises `NotResident`."""
        super().open(group, source)
        if self._table is None or self._source is not source or not self._table.valid():
            self._table, self._source = HandleTable(source), source
        else:
            source.seconds = 0.0  # no pass over the source is made

    def send(self, update: WeightUpdate) -> None:
        table, self._table = self._table, None
        assert table is not None, "open() first"
        with update.trace.phase("load") as span:
            table.synchronize()
            self._update({"table": table.name, "verify": update.verify, "last": True}, update.version, table)
            span.set({semconv.GATHER_SECONDS: update.source.seconds})
            self._group.record_seconds(span, "update_in_one_call")
        self._table = table  # kept only after success: what a server knows after an error is uncertain

    def _update(self, update_info: dict[str, Any], version: str, table: HandleTable) -> None:
        try:
            try:
                self._group.update_in_one_call(update_info, version)
            except Exception as error:
                reason = as_sync_error(error).reason
                if reason == UPDATE_OPEN:
                    abort_update(self._group)
                elif reason != UNKNOWN_HANDLES:
                    raise
                self._group.update_in_one_call(update_info, version, {"table": table.description()})
        except Exception as error:
            raise error if isinstance(error, WeightSyncError) else as_sync_error(error) from error


class HandleTable:
    """The memory of each tensor of a source, described so that another process can open it."""

    def __init__(self, source: Source) -> None:
        """Makes one pass over the source. Raises `NotResident`."""
        self.name = secrets.token_hex(8)
        addresses = source.address_snapshot()
        if addresses is None:
            raise NotResident("the model is sharded, adapted or quantized: its weights are made for each sync")
        self.handles: list[dict[str, Any]] = []
        self.entries: list[TensorEntry] = []
        self.device: torch.device | None = None
        handle_index: dict[int, int] = {}
        self._allocations: dict[int, int] = {}
        """By address: CUDA's ID of the allocation there."""
        for name, tensor in source:
            if not addresses.holds(tensor):
                raise NotResident(f"{name} is made for each sync")
            if not tensor.is_cuda or self.device not in (None, tensor.device):
                raise NotResident(f"{name} is on {tensor.device}")
            self.device = tensor.device
            base, size = _allocation(tensor.data_ptr()) if tensor.numel() else (0, 0)
            if size:
                self._allocations[base] = _allocation_id(base)
            if base not in handle_index:
                handle_index[base] = len(self.handles)
                self.handles.append({"handle": _export(base) if size else "", "bytes": size})
            place = handle_index[base], tensor.data_ptr() - base if size else 0
            layout = list(tensor.shape), list(tensor.stride())
            self.entries.append((name, dtype_name(tensor.dtype), *layout, *place))
        self._addresses = addresses

    def valid(self) -> bool:
        """Whether the model is still in the same memory."""
        return self._addresses.in_place() and self._addresses.unchanged() and self._same_allocations()

    def _same_allocations(self) -> bool:
        # A trainer that frees its memory and allocates again may get the old address, where a server that has the old
        # allocation open would go on reading the old bytes.
        try:
            return all(_allocation_id(base) == number for base, number in self._allocations.items())
        except NotResident:  # nothing is allocated there any more
            return False

    def synchronize(self) -> None:
        """Wait until the trainer has finished computing the weights."""
        torch.cuda.current_stream(self.device).synchronize()

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "handles": self.handles, "tensors": self.entries}


class ResidentWeights(Source):
    """A worker's side of a `HandleTable`: a source of views of the trainer's memory."""

    def __init__(self, description: dict[str, Any], device: torch.device) -> None:
        self.name = str(description["name"])
        self._opened: list[int] = []
        self._weights: list[tuple[str, torch.Tensor]] = []
        try:
            memory = [self._open(each["handle"], int(each["bytes"]), device) for each in description["handles"]]
            self._weights = [(entry[0], _view(memory[entry[4]], entry)) for entry in description["tensors"]]
            self.tensor_addresses = TensorAddresses([({name: tensor}, name) for name, tensor in self._weights])
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._weights

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._weights]

    def ties(self) -> dict[str, str]:
        return IterableSource(self._weights).ties()

    def address_snapshot(self) -> SourceAddresses:
        """This object: only the trainer can check that its weights are in place, which it does before each sync."""
        return self

    def in_place(self) -> bool:
        return True

    def unchanged(self) -> bool:
        return True

    def same_as(self, other: Any) -> bool:
        return other is self

    def holds(self, tensor: torch.Tensor) -> bool:
        return True

    def close(self) -> None:
        """Close the trainer's memory."""
        self._weights.clear()
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
    """Memory at an address, in the form of numba's CUDA array interface (version 3), which torch reads."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def uuid_of(device: torch.device) -> str:
    """The UUID of a GPU, which is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _view(memory: torch.Tensor, entry: Sequence[Any]) -> torch.Tensor:
    """The tensor that `entry` describes, as a view of `memory`. Raises `WeightSyncError` if it does not fit."""
    name, kind, shape, stride, _, offset = entry
    dtype = dtype_of(kind, name)
    if min([offset, *shape, *stride], default=0) < 0:
        raise malformed(f"shape {shape}, stride {stride}, offset {offset}", name)
    if not prod(shape):
        return torch.empty(shape, dtype=dtype, device=memory.device)
    size = (sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) + 1) * dtype.itemsize
    if offset % dtype.itemsize or offset + size > memory.numel():
        raise malformed("it is outside of its memory", name)
    return memory[offset : offset + size].view(dtype).as_strided(shape, stride)


def _allocation(address: int) -> tuple[int, int]:
    """Start and size of the allocation that contains this address."""
    _, driver = _cuda()
    base, size = _checked(driver.cuMemGetAddressRange(address))
    return int(base), int(size)


def _allocation_id(base: int) -> int:
    """A number that CUDA gives to each allocation of this process, and never to another one."""
    _, driver = _cuda()
    return int(_checked(driver.cuPointerGetAttribute(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID, base)))


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
    """The result of a CUDA call, without its status. Raises `NotResident` on an error."""
    status, *rest = result
    if int(status):
        # For example, the memory of an expandable segment has no handle.
        raise NotResident(f"CUDA cannot share its memory ({getattr(status, 'name', status)})")
    return rest[0] if len(rest) == 1 else tuple(rest)
