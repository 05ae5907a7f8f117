"""Where the weights of a trainer's model lie, and whether they still do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self
from weakref import ref

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
        return Places((where, name) for where, name in self.held if _storage(where[name]) in storages)

    def storages(self) -> set[int]:
        """The addresses of theirs."""
        return {_storage(where[name]) for where, name in self.held}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Located(Protocol):
    """Where the tensors of a source lie that makes none for a pass: `Live`, or what stands for it elsewhere."""

    places: Places

    def near(self) -> bool: ...

    def whole(self) -> bool: ...

    def same_as(self, other: Any) -> bool: ...

    def hold(self, tensor: torch.Tensor) -> bool: ...


class Live:
    """The addresses of a plain model's parameters and buffers: those that a stream of its weights consists of views of.

    Nothing is kept alive: a trainer may move its model to the host and back. `near` is checked before memory at the
    old addresses is read, `whole` may be checked after.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found: list[tuple[Any, str]] = []
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        self._modules = [(ref(module), [id(child) for child in module._modules.values()]) for module in model.modules()]
        self.storages = set[int]()
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        found.append((held, name))
                        self._forms.append((tensor.shape, tensor.dtype))
                        self.storages.add(_storage(tensor))
        self.storages.discard(0)
        self.places = Places(found)

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
        forms = ((held[name].shape, held[name].dtype) for held, name in self.places.held)
        if any(now != then for now, then in zip(forms, self._forms, strict=True)):
            return False
        seen = 0
        for module, children in self._modules:
            found = module()
            if found is None or [id(child) for child in found._modules.values()] != children:
                return False
            seen += sum(tensor is not None for tensor in found._parameters.values())
            seen += sum(tensor is not None for tensor in found._buffers.values())
        return seen == len(self.places.held)

    def same_as(self, other: Any) -> bool:
        """Whether the model is the same, its modules too, and everything lies where it lay then."""
        return isinstance(other, Live) and self.places.addresses == other.places.addresses and other.whole()

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether it is a part of the model itself, and no copy."""
        return _storage(tensor) in self.storages


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
