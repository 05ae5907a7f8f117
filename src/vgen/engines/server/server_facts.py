"""What a `vgen serve` server and its model are, as `server_api.INFO` answers it."""

from __future__ import annotations

import functools
from typing import Any

from ..._addresses import this_host
from ..._version import __version__
from .. import kv_stores
from ..server_api import EXTENSION, SHAPE, Feature

WEIGHT_FEATURES = (Feature.SHARED_MEMORY, Feature.GROUP, Feature.RESIDENT, Feature.RECORDED)
"""The features of a server whose workers have vgen's weight-transfer engine."""
_MODEL_FACTS = ("model", "max_model_len", "logprobs_mode", "quantization")


def features(app: Any) -> list[Feature]:
    """What the workers of this vLLM application can do for vgen."""
    transports = WEIGHT_FEATURES if _backend(app) == "vgen_shm" else ()
    extended = attribute(app, "state.vllm_config.parallel_config.worker_extension_cls") == EXTENSION
    return [*transports, *([Feature.MEMORY] if extended else [])]


def facts(app: Any) -> dict[str, Any]:
    """What does not change while the server runs. What vLLM's configuration does not tell is None."""
    config = attribute(app, "state.vllm_config")
    model, parallel = attribute(config, "model_config"), attribute(config, "parallel_config")
    return {
        "vgen": __version__,
        **{name: getattr(model, name, None) for name in _MODEL_FACTS},
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch.") or None,
        "device": attribute(config, "device_config.device_type"),
        "max_num_seqs": attribute(config, "scheduler_config.max_num_seqs"),
        "shape": _shape(model),
        "world_size": getattr(parallel, "world_size_across_dp", None),
        "enable_eplb": getattr(parallel, "enable_eplb", None),
        "kv_store_refusal": kv_stores.refusal(config),
        "weight_transfer": _backend(app),
        "shared_memory_directory": _shared_directory() if _backend(app) == "vgen_shm" else None,
        "host": this_host(),
    }


def attribute(value: Any, path: str) -> Any:
    """The attribute at a dotted path; None if one of the attributes is missing."""
    return functools.reduce(lambda parent, name: getattr(parent, name, None), path.split("."), value)


def _backend(app: Any) -> str | None:
    return attribute(app, "state.vllm_config.weight_transfer_config.backend")


def _shape(model: Any) -> dict[str, int]:
    """The sizes of the model, by which a trainer recognizes its own."""
    config = getattr(model, "hf_text_config", None)
    sizes = {name: getattr(config, name, None) for name in SHAPE}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _shared_directory() -> str:
    from ...weights.transports.shared_memory import shared_directory

    return str(shared_directory())
