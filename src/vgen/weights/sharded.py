"""The tensors of a trainer's model, wherever their parts are: what there is, and how a full copy is had.

A `Weight` says of one tensor what it would be if it were whole. `gather` brings many of them together; all
ranks of the trainer must call it alike, for it runs collectives. No gather context is open once it has
returned, and what it returns owns its storage or is the trainer's own live, unsharded tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..errors import WeightSyncError
from .names import clean, path_of, unwrapped

Gather: TypeAlias = Callable[[Sequence["Weight"]], list[torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of the model, perhaps in parts; `shape`, `stride` and `dtype` are those of the whole."""

    name: str
    """The model's own: without wrappers, with what PEFT has put into it."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    gather: Gather
    """Weights with the same one may be gathered together."""
    holder: Any
    """What `gather` knows it by; equal for tied ones."""

    @property
    def live(self) -> bool:
        """Whether it is whole and here: nothing has to be gathered."""
        return self.gather is _live

    @property
    def collective(self) -> bool:
        """Whether all ranks gather it together."""
        return self.gather not in (_live, _dequantized)

    @property
    def unit(self) -> Gather | None:
        """Not None where gathering it gathers a whole FSDP1 instance, which should be done once."""
        return self.gather if isinstance(self.gather, _Fsdp1Unit) else None

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """What `gather` gives for it, without data."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@torch.no_grad()
def gather(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """The full tensors of `weights`, in that order. Runs collectives unless all of them are live."""
    kinds: dict[Gather, list[int]] = {}
    for index, weight in enumerate(weights):
        kinds.setdefault(weight.gather, []).append(index)
    full: dict[int, torch.Tensor] = {}
    for kind, indices in kinds.items():
        members = [weights[index] for index in indices]
        try:
            full.update(zip(indices, kind(members), strict=True))
        except Exception as error:
            raise WeightSyncError(
                f"{type(error).__name__}: {error}", phase="gather", parameter=members[0].name, receiver="trainer"
            ) from error
    return [full[index] for index in range(len(weights))]


def weights_of(top: torch.nn.Module) -> list[Weight]:
    """All parameters and persistent buffers of the model inside `top`; a tied one under each of its names.

    Raises `WeightSyncError` where one has no data, or data that only its own library can read.
    """
    module: Any
    for module in top.modules():
        if _is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            module.reshard()  # its parameters may be left whole, and cast, after a forward: not what is trained
    root = unwrapped(top)
    packed = getattr(root, "hf_quantizer", None) is not None
    dtype = getattr(getattr(root, "config", None), "dtype", None) or torch.get_default_dtype()
    weights = {weight.name: weight for weight in _fsdp1(top, root)}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, tensor in _tensors(module):
            name = clean(f"{path}.{name}" if path else name)
            if name not in weights and not name.endswith("_flat_param"):
                weights[name] = _weight(name, tensor, module, dtype)
                if packed and weights[name].live and tensor.ndim > 1 and not tensor.is_floating_point():
                    raise _refused(name, "it is quantized in a way that vgen cannot undo")
    return list(weights.values())


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _weight(name: str, tensor: torch.Tensor, module: torch.nn.Module, dtype: torch.dtype) -> Weight:
    """`dtype` is for what has lost its own."""
    if hasattr(tensor, "ds_id"):
        shape = tuple(tensor.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]
        return Weight(name, shape, _contiguous(shape), tensor.dtype, _zero3, tensor)
    shape = tuple(tensor.shape)
    if tensor.is_meta:
        raise _refused(name, "it has no data (it is on the meta device): load or initialize the model first")
    if hasattr(tensor, "full_tensor"):
        if type(tensor).__name__ in ("Params4bit", "Int8Params") or _quantized(tensor):
            raise _refused(name, "it is quantized and sharded, and its shards cannot be dequantized")
        return Weight(name, shape, _contiguous(shape), tensor.dtype, _redistributed, tensor)
    if type(tensor).__name__ == "Params4bit":
        state: Any = tensor.quant_state  # pyright: ignore[reportAttributeAccessIssue]
        if state is None:
            raise _refused(name, "it has not been quantized yet: move the model to its device first")
        shape = tuple(state.shape)
        dtype = state.original_dtype if _repacked(state) else state.dtype
        return Weight(name, shape, _contiguous(shape), dtype, _dequantized, (tensor, module))
    if type(tensor).__name__ == "Int8Params":
        return Weight(name, shape, _contiguous(shape), dtype, _dequantized, (tensor, module))
    if _quantized(tensor):
        raise _refused(
            name, f"it is quantized ({type(tensor).__name__}, {tensor.dtype}) in a way that vgen cannot undo"
        )
    return Weight(name, shape, tensor.stride(), tensor.dtype, _live, tensor)


def _quantized(tensor: torch.Tensor) -> bool:
    """Packed integers that are trained on, or a tensor class that hides them (torchao's)."""
    if type(tensor).__module__.startswith("torchao."):
        return True
    return isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())


def _live(weights: Sequence[Weight]) -> list[torch.Tensor]:
    return [weight.holder.detach() for weight in weights]


def _redistributed(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """FSDP2 and tensor parallelism. Shards that were offloaded move to the device where collectives run."""
    full: list[torch.Tensor] = []
    for weight in weights:
        tensor = weight.holder.detach()
        if tensor.device.type != tensor.device_mesh.device_type:
            tensor = tensor.to(tensor.device_mesh.device_type)
        full.append(tensor.full_tensor())
    return full


def _zero3(weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Copies: what the context has gathered is DeepSpeed's, to free or to use again."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = [weight.holder for weight in weights]
    with GatheredParameters(parameters):
        return [parameter.data.clone() for parameter in parameters]


def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """4-bit weights in their common form.

    On a CPU with AVX512-BF16 the first forward pass outside training leaves them in another, with scales in bf16.
    `dequantize_4bit` of bitsandbytes 0.50 takes that for the common one, and its own way back, which is used here for
    the weights alone, mixes up the scales of those that were quantized once.
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
    """One FSDP1 instance: its parameters live in one flat tensor and are gathered by one collective."""

    instance: Any
    outermost: Any

    def __call__(self, weights: Sequence[Weight]) -> list[torch.Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

        if self.outermost._is_root is None:  # the first one to be summoned would take itself for the root
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
    """Whether it is of a class in a library that is slow to import; one nobody has imported has no instances."""
    found = getattr(sys.modules.get(library), kind, None)
    return found is not None and isinstance(module, found)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _refused(name: str, problem: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="gather", parameter=name, receiver="trainer")
