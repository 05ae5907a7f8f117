"""Which of an engine's modules keep their weights in the layout that the loader writes.

vLLM repacks weights after loading in many places, sometimes into the same shape. A model with anything that is not on
these lists is loaded by the engine's own reload. A comparison with that reload cannot replace the lists: on some
backends vLLM repacks experts only when they are first loaded, so its reload may be as wrong as the record.
"""

from __future__ import annotations

from typing import Any

import torch

from ..source.address_snapshot import own_tensors

METHODS = frozenset(
    {"UnquantizedLinearMethod", "_GateLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
)
"""Quantization methods by the name of their exact class: a subclass may do more."""
EXPERT_BACKENDS = frozenset({"TRITON", "BATCHED_TRITON"})
"""Backends of unquantized experts that compute with the loader's layout."""
ATTENTION = frozenset({"Attention", "MMEncoderAttention"})
"""Layers whose hook after loading changes only quantization scales, which no listed layer has, and their backend."""


def layout_change(module: torch.nn.Module) -> str | None:
    """Why this module, children aside, may keep its weights in another layout than the loader's; None if it cannot."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    kind, method = type(module).__name__, getattr(module, "quant_method", None)
    if isinstance(module, QuantizeMethodBase):
        return None  # its layer is examined instead
    if method is not None and type(method).__name__ not in METHODS:
        return f"quantization method {type(method).__name__}"
    backend = getattr(method, "unquantized_backend", None)
    if backend is not None and backend.name not in EXPERT_BACKENDS:
        return f"expert backend {backend.name}"
    if getattr(getattr(getattr(method, "moe", None), "moe_parallel_config", None), "enable_eplb", False):
        return "experts that are moved to balance their load"
    if getattr(module, "_bf16x3_weight", None) is not None:
        return "a router with a split copy of its weight"
    if hasattr(module, "process_weights_after_loading"):
        if kind not in ATTENTION:
            return f"{kind} processes its weights after loading"
        return _backend_layout_change(module)
    for _, name, tensor in own_tensors(module):
        if getattr(tensor, "_vllm_is_uva_offloaded", False):
            return f"{name} lives in host memory"
    return _repacked(module)


def _backend_layout_change(layer: Any) -> str | None:
    """An attention backend may hold sinks or scales itself, outside of modules."""
    implementation = getattr(layer, "impl", None)
    if getattr(layer, "quant_config", None) is not None:
        return "attention with a quantization config"
    if implementation is None:
        return None
    from vllm.v1.attention.backend import AttentionImplBase

    base_hook = AttentionImplBase.process_weights_after_loading
    has_hook = type(implementation).process_weights_after_loading is not base_hook
    if has_hook and getattr(implementation, "_sinks_source", implementation) is not None:
        return f"attention backend {type(implementation).__name__} processes weights after loading"
    return None


def _repacked(module: torch.nn.Module) -> str | None:
    """Whether a tensor has another shape, dtype or layout than when the module was constructed."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    info = LAYERWISE_INFO.get(module)
    if info is None:
        return None
    constructed = {**info.restore_metadata[0], **info.restore_metadata[1]}
    for _, name, tensor in own_tensors(module):
        before = constructed.get(name)
        if before is not None and _layout(before) != _layout(tensor):
            return "the engine has repacked it"
    return None


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
