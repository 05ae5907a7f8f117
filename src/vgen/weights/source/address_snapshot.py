"""The memory addresses of a model's tensors, and whether the tensors are still there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any, Self

import torch


class TensorAddresses:
    """Tensors by the dict and the name that they are registered under, and the address that each had at the start."""

    def __init__(self, registrations: Iterable[tuple[dict[str, Any], str]]) -> None:
        self.registrations = list(registrations)
        self.addresses = [table[name].data_ptr() for table, name in self.registrations]

    def in_place(self) -> bool:
        """Whether the tensors that are registered now have the addresses of the start.

        The device waits for this check before each copy. vLLM's parameters define `__torch_function__`, which costs
        two microseconds a call, so the check runs with that switched off.
        """
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            try:
                return [table[name].data_ptr() for table, name in self.registrations] == self.addresses
            except (AttributeError, KeyError):
                return False

    def within(self, storages: set[int]) -> TensorAddresses:
        """Those of the tensors whose storage begins at one of these addresses."""
        return TensorAddresses(
            (table, name) for table, name in self.registrations if storage_address(table[name]) in storages
        )

    def storages(self) -> set[int]:
        """The addresses at which the tensors' storages begin."""
        return {storage_address(table[name]) for table, name in self.registrations}


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """The parameters and buffers of this module, without its children: registering dict, name and tensor."""
    for table in (module._parameters, module._buffers):
        yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


def storage_address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins; 0 if it has none, as torchao's tensors, which are made of other tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def storage_id(tensor: torch.Tensor) -> int:
    """Identifies the tensor's storage while that exists, also on the meta device, where all addresses are 0."""
    return tensor.untyped_storage()._cdata


class AddressSnapshot:
    """A `SourceAddresses` of a plain model: its parameters and buffers, of which a source yields views.

    The snapshot keeps the modules alive, but not their memory: a trainer may move its model to the host and back. Ask
    `in_place` before memory at the old addresses is read; `unchanged` takes longer and may be asked afterwards.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = list(model.modules())
        tables = [table for module in self._modules for table in (module._parameters, module._buffers)]
        entries = [(table, name) for table in tables for name in table]
        self.tensor_addresses = TensorAddresses(entry for entry in entries if entry[0][entry[1]] is not None)
        self._absent = [(table, name) for table, name in entries if table[name] is None]
        self._storages = self.tensor_addresses.storages() - {0}
        self._tables = self._current_tables()
        self._layouts, self._structure = self._current_layouts(), self._current_structure()

    @classmethod
    def of(cls, model: torch.nn.Module | None) -> Self | None:
        """The snapshot of `model`; None if a pass may make tensors: it is sharded, adapted or quantized."""
        if model is None or any(_makes_tensors(module) for module in model.modules()):
            return None
        return cls(model)

    def in_place(self) -> bool:
        """Whether every parameter and buffer still has its address."""
        return self.tensor_addresses.in_place()

    def unchanged(self) -> bool:
        """Whether no module was added, removed or replaced since, and no parameter added or reshaped."""
        try:
            return (
                self._current_layouts() == self._layouts
                and all(map(is_, self._current_tables(), self._tables))
                and self._current_structure() == self._structure
                and all(table[name] is None for table, name in self._absent)
            )
        except (AttributeError, KeyError):  # a parameter was removed
            return False

    def _current_layouts(self) -> list[Any]:
        tensors = [table[name] for table, name in self.tensor_addresses.registrations]
        shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
        # A transposed square matrix keeps its address and its shape.
        return [*shapes, *dtypes, *[tensor.is_contiguous() for tensor in tensors]]

    def _current_tables(self) -> list[dict[str, Any]]:
        """The dicts in which the modules register their parameters, buffers and children."""
        modules = self._modules
        return [m._parameters for m in modules] + [m._buffers for m in modules] + [m._modules for m in modules]

    def _current_structure(self) -> tuple[list[int], list[int]]:
        """The number of entries in each dict, and the identities of all child modules."""
        children = self._tables[2 * len(self._modules) :]
        return [*map(len, self._tables)], [*map(id, chain.from_iterable([table.values() for table in children]))]

    def same_as(self, other: Any) -> bool:
        """Whether `other` is of the same model with the same modules, and every tensor has the address it had there."""
        return (
            isinstance(other, AddressSnapshot)
            and self.tensor_addresses.addresses == other.tensor_addresses.addresses
            and other.unchanged()
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a view of the model's own memory, and not a copy."""
        return storage_address(tensor) in self._storages


def _makes_tensors(module: torch.nn.Module) -> bool:
    """Whether a source may have to make tensors for this module's weights: PEFT, FSDP, ZeRO, quantization."""
    kind = type(module).__name__
    if hasattr(module, "base_layer") or hasattr(module, "peft_config") or "FSDP" in kind or "FullySharded" in kind:
        return True
    plain = (torch.nn.Parameter, torch.Tensor)
    return any(
        type(tensor) not in plain or tensor.is_meta or hasattr(tensor, "ds_id") for *_, tensor in own_tensors(module)
    )
