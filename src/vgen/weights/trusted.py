"""Which of an engine's modules keep their weights as the loader leaves them.

vLLM repacks weights after loading in many places, some of them into the same shape. What is not on the lists here
is not trusted: it takes the engine's own reload. Comparing with that reload cannot replace the lists: vLLM repacks
experts when they are first loaded and on some backends not again, so that its reload may be as wrong as the record.
"""

from __future__ import annotations

from typing import Any

import torch

METHODS = frozenset(
    {"UnquantizedLinearMethod", "_GateLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod"}
)
"""Quantization methods, by their exact class: a subclass may do more."""
EXPERT_BACKENDS = frozenset({"TRITON", "BATCHED_TRITON"})
"""Of unquantized experts: those that compute with the loader's own layout."""
ATTENTION = frozenset({"Attention", "MMEncoderAttention"})
"""Layers whose hook after loading concerns quantization scales, which no trusted layer has, and their backend."""


def distrust(module: torch.nn.Module) -> str | None:
    """Why the weights of this module alone may be kept in another form than they are loaded in; None when not."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    kind, method = type(module).__name__, getattr(module, "quant_method", None)
    if isinstance(module, QuantizeMethodBase):
        return None  # judged with its layer
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
        return _distrust_backend(module)
    for name, tensor in _tensors(module):
        if getattr(tensor, "_vllm_is_uva_offloaded", False):
            return f"{name} lives in host memory"
    return _repacked(module)


def _distrust_backend(layer: Any) -> str | None:
    """An attention backend may keep sinks or scales of its own."""
    implementation = getattr(layer, "impl", None)
    if getattr(layer, "quant_config", None) is not None:
        return "attention with a quantization config"
    if implementation is None:
        return None
    from vllm.v1.attention.backend import AttentionImplBase

    own = type(implementation).process_weights_after_loading is not AttentionImplBase.process_weights_after_loading
    if own and getattr(implementation, "_sinks_source", implementation) is not None:
        return f"attention backend {type(implementation).__name__} processes weights after loading"
    return None


def _repacked(module: torch.nn.Module) -> str | None:
    """A tensor that is no longer as it was when the module was made."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    info = LAYERWISE_INFO.get(module)
    if info is None:
        return None
    made = {**info.restore_metadata[0], **info.restore_metadata[1]}
    for name, tensor in _tensors(module):
        before = made.get(name)
        if before is not None and (before.shape, before.dtype) != (tensor.shape, tensor.dtype):
            return "the engine has repacked it"
        if before is not None and before.stride() != tensor.stride():
            return "the engine has repacked it"
    return None


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in found if tensor is not None]
