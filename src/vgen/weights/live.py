"""Where the weights of a trainer's model lie, and whether they still do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, Protocol, Self

import torch


class Places:
    """Tensors as they are registered in dicts of modules, and where each lay when this was made."""

    def __init__(self, held: Iterable[tuple[Any, str]]) -> None:
        self.held = list(held)
        self.addresses = [where[name].data_ptr() for where, name in self.held]

    def kept(self) -> bool:
        """Whether the tensors that are registered there now lie where those lay.

        It stands before each copy and the device waits for it, so vLLM's parameters, a call of which goes through
        `__torch_function__` for two microseconds, are asked without that.
        """
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            try:
                return [where[name].data_ptr() for where, name in self.held] == self.addresses
            except (AttributeError, KeyError):
                return False

    def within(self, storages: set[int]) -> Places:
        """Those that lie in storages at these addresses."""
        return Places((where, name) for where, name in self.held if storage_of(where[name]) in storages)

    def storages(self) -> set[int]:
        """The addresses of theirs."""
        return {storage_of(where[name]) for where, name in self.held}


def storage_of(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 for one without, or made of others as torchao's quantized weights are."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


class Located(Protocol):
    """Where the tensors of a source lie that makes none for a pass: `Live`, or what stands for it elsewhere."""

    places: Places

    def near(self) -> bool: ...

    def whole(self) -> bool: ...

    def same_as(self, other: Any) -> bool: ...

    def hold(self, tensor: torch.Tensor) -> bool: ...


class Live:
    """The addresses of a plain model's parameters and buffers: those that a stream of its weights consists of views of.

    The modules are kept alive, their memory is not: a trainer may move its model to the host and back. `near` is
    checked before memory at the old addresses is read, `whole` may be checked after.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found: list[tuple[Any, str]] = []
        self._absent: list[tuple[Any, str]] = []
        self.storages = set[int]()
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    (self._absent if tensor is None else found).append((held, name))
                    if tensor is not None:
                        self.storages.add(storage_of(tensor))
        self.storages.discard(0)
        self.places = Places(found)
        self._modules = list(model.modules())
        self._tables = self._tables_now()
        self._forms, self._structure = self._forms_now(), self._structure_now()

    @classmethod
    def of(cls, model: torch.nn.Module | None) -> Self | None:
        """None for a model whose weights may come otherwise than as views: sharded, adapted or quantized."""
        if model is None or any(_special(module) for module in model.modules()):
            return None
        return cls(model)

    def near(self) -> bool:
        """Whether every parameter that was there still is, where it was."""
        return self.places.kept()

    def whole(self) -> bool:
        """Whether no module has been put in, taken out or exchanged since, and no parameter added or reshaped."""
        try:
            return (
                self._forms_now() == self._forms
                and all(map(is_, self._tables_now(), self._tables))
                and self._structure_now() == self._structure
                and all(held[name] is None for held, name in self._absent)
            )
        except (AttributeError, KeyError):  # a parameter is gone
            return False

    def _forms_now(self) -> list[Any]:
        tensors = [held[name] for held, name in self.places.held]
        shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
        return [*shapes, *dtypes, *[tensor.is_contiguous() for tensor in tensors]]

    def _tables_now(self) -> list[dict[str, Any]]:
        """What modules register their parameters, buffers and children in."""
        own = self._modules
        return [m._parameters for m in own] + [m._buffers for m in own] + [m._modules for m in own]

    def _structure_now(self) -> tuple[list[int], list[int]]:
        """How much is registered in each table, and which children."""
        children = self._tables[2 * len(self._modules) :]
        return [*map(len, self._tables)], [*map(id, chain.from_iterable([table.values() for table in children]))]

    def same_as(self, other: Any) -> bool:
        """Whether the model is the same, its modules too, and everything lies where it lay then."""
        return isinstance(other, Live) and self.places.addresses == other.places.addresses and other.whole()

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether it is a part of the model itself, and no copy."""
        return storage_of(tensor) in self.storages


def _special(module: torch.nn.Module) -> bool:
    kind = type(module).__name__
    if hasattr(module, "base_layer") or hasattr(module, "peft_config") or "FSDP" in kind or "FullySharded" in kind:
        return True
    plain = (torch.nn.Parameter, torch.Tensor)
    held = [*module._parameters.values(), *module._buffers.values()]
    return any(
        tensor is not None and (type(tensor) not in plain or tensor.is_meta or hasattr(tensor, "ds_id"))
        for tensor in held
    )
