"""The tensors of a trainer's model, sharded or not: which there are, and how to make them whole.

A `Weight` describes one tensor as it is when whole. `gather` makes many of them whole. It runs collectives, so all
trainer ranks must call it alike. When it has returned, no gather context is open, and each tensor either owns its
storage or is the trainer's own live, unsharded tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .gather_error import gather_error
from .unwrap_model import checkpoint_entries, clean, path_of, unwrapped

Gather: TypeAlias = Callable[[Sequence["Weight"]], list[torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of the model, perhaps in shards; `shape`, `stride` and `dtype` are those of the whole tensor."""

    name: str
    """The model's own name for it: without what wrappers insert, with what PEFT inserts."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    gather: Gather
    """Makes such tensors whole. Weights with an equal function may be gathered in one call."""
    holder: Any
    """What `gather` reads; equal for tied weights."""

    @property
    def live(self) -> bool:
        """Whether the tensor is whole and on this rank: nothing has to be gathered."""
        return self.gather is _live

    @property
    def collective(self) -> bool:
        """Whether all ranks must gather it together."""
        return self.gather not in (_live, _dequantized)

    @property
    def unit(self) -> Gather | None:
        """The FSDP1 instance that it is gathered with, as a whole, which should happen once; None for others."""
        return self.gather if isinstance(self.gather, _Fsdp1Unit) else None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """The tensor that `gather` returns for it, without data."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@torch.no_grad()
def gather(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """The whole tensors of `weights`, in that order. Runs collectives unless all of them are live."""
    groups: dict[Gather, list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault(weight.gather, []).append(index)
    full: dict[int, torch.Tensor] = {}
    for gather_group, indices in groups.items():
        members = [weights[index] for index in indices]
        try:
            full.update(zip(indices, gather_group(members), strict=True))
        except Exception as error:
            raise gather_error(f"{type(error).__name__}: {error}", members[0].name) from error
    return [full[index] for index in range(len(weights))]


def weights_of(top: torch.nn.Module) -> list[Weight]:
    """All parameters and persistent buffers of the model inside `top`; a tied one under each of its names.

    Raises `WeightSyncError` if one has no data, or data in a format that only its own library can read.
    """
    module: Any
    for module in top.modules():
        if _is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            # After a forward pass the parameters may still be whole and cast to another dtype: not what is trained.
            module.reshard()
    root = unwrapped(top)
    packed = getattr(root, "hf_quantizer", None) is not None
    dtype = getattr(getattr(root, "config", None), "dtype", None) or torch.get_default_dtype()
    weights = {weight.name: weight for weight in _fsdp1(top, root)}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, tensor in checkpoint_entries(module):
            name = clean(f"{path}.{name}" if path else name)
            if name not in weights and not name.endswith("_flat_param"):
                weights[name] = _weight(name, tensor, module, dtype)
                if packed and weights[name].live and tensor.ndim > 1 and not tensor.is_floating_point():
                    raise gather_error("it is quantized in a way that vgen cannot undo", name)
    return list(weights.values())


def _weight(name: str, tensor: torch.Tensor, module: torch.nn.Module, dtype: torch.dtype) -> Weight:
    """The `Weight` of one tensor; `dtype` is for quantized tensors that do not know their original dtype."""
    if hasattr(tensor, "ds_id"):
        shape = tuple(tensor.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]
        return Weight(name, shape, _contiguous(shape), tensor.dtype, _zero3, tensor)
    shape = tuple(tensor.shape)
    if tensor.is_meta:
        raise gather_error("it has no data (it is on the meta device): load or initialize the model first", name)
    if hasattr(tensor, "full_tensor"):
        if type(tensor).__name__ in ("Params4bit", "Int8Params") or _quantized(tensor):
            raise gather_error("it is quantized and sharded, and its shards cannot be dequantized", name)
        return Weight(name, shape, _contiguous(shape), tensor.dtype, _redistributed, tensor)
    if type(tensor).__name__ == "Params4bit":
        state: Any = tensor.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        if state is None:
            raise gather_error("it has not been quantized yet: move the model to its device first", name)
        shape = tuple(state.shape)
        dtype = state.original_dtype if _repacked(state) else state.dtype
        return Weight(name, shape, _contiguous(shape), dtype, _dequantized, (tensor, module))
    if type(tensor).__name__ == "Int8Params":
        return Weight(name, shape, _contiguous(shape), dtype, _dequantized, (tensor, module))
    if _quantized(tensor):
        problem = f"it is quantized ({type(tensor).__name__}, {tensor.dtype}) in a way that vgen cannot undo"
        raise gather_error(problem, name)
    return Weight(name, shape, tensor.stride(), tensor.dtype, _live, tensor)


def _quantized(tensor: torch.Tensor) -> bool:
    """Packed integers that are trained on, or a tensor class that hides them (torchao's)."""
    if type(tensor).__module__.startswith("torchao."):
        return True
    return isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())


def _live(weights: Sequence[Weight]) -> list[torch.Tensor]:
    return [weight.holder.detach() for weight in weights]


def _redistributed(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """FSDP2 and tensor parallelism. Offloaded shards are moved to the device where collectives run."""
    full: list[torch.Tensor] = []
    for weight in weights:
        tensor = weight.holder.detach()
        if tensor.device.type != tensor.device_mesh.device_type:
            tensor = tensor.to(tensor.device_mesh.device_type)
        full.append(tensor.full_tensor())
    return full


def _zero3(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Copies, because DeepSpeed frees or reuses the memory that its context gathers into."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = [weight.holder for weight in weights]
    with GatheredParameters(parameters):
        return [parameter.data.clone() for parameter in parameters]


def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """4-bit weights in their usual format.

    On a CPU with AVX512-BF16, the first forward pass outside training repacks them, with scales in bf16.
    `dequantize_4bit` of bitsandbytes 0.50 does not know the repacked format. Its inverse function is used here for the
    weights alone, because it mixes up the scales of weights that were quantized once.
    """
    if not _repacked(state):
        return data, state
    from bitsandbytes import functional

    common = copy(state)
    common.original_nested = False  # the scales stay as the forward pass sees them
    data, common = functional._convert_weight_packed_for_cpu_inverse(data, common)
    common.absmax = state.absmax.T.reshape(-1).float()
    return data, common


def _repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _dequantized(weights: Sequence[Weight]) -> list[torch.Tensor]:
    from bitsandbytes import functional

    full: list[torch.Tensor] = []
    for weight in weights:
        tensor, module = weight.holder
        if type(tensor).__name__ == "Params4bit":
            full.append(functional.dequantize_4bit(*_unpacked(tensor.data, tensor.quant_state)))
        else:
            scale = module.state.SCB if module.state.SCB is not None else tensor.SCB
            full.append((tensor.data.float() * scale.float().view(-1, 1) / 127).to(weight.dtype))
    return full


@dataclass(frozen=True, slots=True)
class _Fsdp1Unit:
    """One FSDP1 instance: its parameters are stored in one flat tensor and gathered by one collective."""

    instance: Any
    outermost: Any

    def __call__(self, weights: Sequence[Weight]) -> list[torch.Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

        if self.outermost._is_root is None:  # otherwise the first instance that is gathered would become the root
            _runtime_utils._lazy_init(self.outermost, self.outermost)
        with FullyShardedDataParallel.summon_full_params(self.instance, recurse=False, writeback=False):
            return [getattr(module, name).detach().clone() for module, name in (weight.holder for weight in weights)]


def _fsdp1(top: torch.nn.Module, root: torch.nn.Module) -> Iterator[Weight]:
    instances = [module for module in top.modules() if _is_a(module, "torch.distributed.fsdp", _FSDP1)]
    if not instances:
        return
    inside, paths = path_of(root, top), {module: path for path, module in top.named_modules()}
    for instance in instances:
        flat = getattr(instance._handle, "flat_param", None)
        if flat is None:
            continue
        unit = _Fsdp1Unit(instance, instances[0])
        shapes = zip(flat._shapes, flat._strides, strict=True)
        tensors = {
            (info.module, info.param_name): ((info.module, info.param_name), tuple(shape), tuple(stride))
            for info, (shape, stride) in zip(flat._param_infos, shapes, strict=True)
        }
        for info in flat._shared_param_infos:  # tied ones
            tensors[info.module, info.param_name] = tensors[info.prim_module, info.prim_param_name]
        for (module, name), (holder, shape, stride) in tensors.items():
            path = paths[module]
            full_name = f"{path}.{name}" if path else name
            if full_name.startswith(inside):
                yield Weight(clean(full_name.removeprefix(inside)), shape, stride, flat.dtype, unit, holder)


_FSDP1 = "FullyShardedDataParallel"


def _is_a(module: Any, library: str, kind: str) -> bool:
    """Whether `module` is of this class. A library that nobody has imported has no instances, and is not imported."""
    loaded_class = getattr(sys.modules.get(library), kind, None)
    return loaded_class is not None and isinstance(module, loaded_class)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()
