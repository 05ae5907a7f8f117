"""Stores outside an engine's own caches that keep what old weights computed: keys and values, encoder outputs.

A weight sync has them emptied together with the engine's caches, by vLLM's `reset_prefix_cache(reset_connector=True)`.
That reports success also for a connector that does not know how to empty its store, so those that do are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_EMPTIED = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector", "MultiConnector")
"""Connectors of vLLM whose `reset_cache` empties the store and says whether that succeeded."""
_WITHOUT_STORE = ("ExampleHiddenStatesConnector",)
"""Connectors of vLLM that only write outputs, and read none of them again."""
_EMPTIED_SPECS = (None, "CPUOffloadingSpec", "TieringOffloadingSpec")
"""What an `OffloadingConnector` may keep entries in. The second one may have further tiers, which are never emptied."""


def refusal(config: Any) -> str | None:
    """Why weights cannot be synced to an engine with this configuration; None if they can.

    Args:
        config: vLLM's `VllmConfig`, its JSON, or keyword arguments of `vllm.LLM`.
    """
    if encoder := _get(_get(config, "ec_transfer_config"), "ec_connector"):
        problem = f"{encoder} of ec_transfer_config keeps encoder outputs, and vLLM has no call that discards them"
        fix = "start it without ec_transfer_config"
    elif _get(config, "kv_offloading_size") is not None and _get(config, "kv_offloading_backend") == "lmcache":
        problem = "kv_offloading_backend='lmcache' does not confirm that the keys and values it keeps are discarded"
        fix = "use kv_offloading_backend='native'"
    elif problem := _problem(_get(config, "kv_transfer_config")):
        fix = "start it without that, or offload to host memory by kv_offloading_size, which a sync empties"
    else:
        return None
    return f"{problem}, so after a weight sync the engine would use what old weights have computed: {fix}"


def _problem(transfer: Any) -> str | None:
    """Why a connector's store cannot be relied on to be empty after a reset; None if it can, or there is none."""
    name = _get(transfer, "kv_connector")
    if not name or name in _WITHOUT_STORE:
        return None
    if name not in _EMPTIED or _get(transfer, "kv_connector_module_path"):
        return f"{name} of kv_transfer_config does not confirm that the keys and values it keeps are discarded"
    extra: Any = _get(transfer, "kv_connector_extra_config") or {}
    if name == "MultiConnector":
        children: Sequence[Any] = extra.get("connectors", ())
        return next(filter(None, map(_problem, children)), None)
    if name == "OffloadingConnector":
        if (spec := extra.get("spec_name")) not in _EMPTIED_SPECS:
            return f"the {spec} of kv_transfer_config does not confirm that the keys and values it keeps are discarded"
        if tiers := extra.get("secondary_tiers"):
            kinds = ", ".join(str(_get(tier, "type")) for tier in tiers)
            return f"the secondary_tiers ({kinds}) of kv_transfer_config keep keys and values when the cache is reset"
    return None


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
