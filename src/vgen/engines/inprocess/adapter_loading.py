"""LoRA adapters of an engine in this process."""

from __future__ import annotations

from typing import Any

from ...types import LoRARequest
from ..lora_adapters import AdapterCopy, fingerprint, is_newer


class AdapterLoader:
    """Loads adapters into the engine before a request needs them, and reloads an adapter whose folder has changed.

    vLLM itself would load an adapter within a scheduler step, where a missing folder breaks the engine. And it would
    use the old adapter for a name whose folder has changed.
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._loaded: dict[str, tuple[AdapterCopy, int]] = {}
        """By name: the copy of the folder, and the ID under which vLLM has the adapter."""
        self._last_id = 0

    def load(self, adapter: LoRARequest | None) -> Any:
        """Load the adapter if needed and return vLLM's own `LoRARequest`, or None for None.

        Raises `ValueError`, with what to do, if the adapter cannot be loaded.
        """
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest as EngineLoRARequest

        name, path = adapter.lora_name, adapter.lora_path
        if not path:
            raise ValueError(f"LoRA adapter {name!r} has no lora_path: set it to the adapter's folder")
        if self._engine.vllm_config.lora_config is None:
            raise ValueError(
                f"LoRA adapter {name!r} needs an engine with LoRA: construct with "
                "engine_kwargs={'enable_lora': True, 'max_lora_rank': ...}"
            )
        copy, adapter_id = self._loaded.get(name, (None, 0))
        replaced_id = 0
        if copy is None or is_newer(fingerprint(path), copy.fingerprint):
            copy = AdapterCopy(path, None)
            self._last_id += 1
            replaced_id, adapter_id = adapter_id, self._last_id
        request = EngineLoRARequest(name, adapter_id, copy.path)
        try:
            self._engine.add_lora(request)  # also if it is loaded: vLLM then evicts other adapters first
        except Exception as error:
            raise ValueError(f"LoRA adapter {name!r} could not be loaded from {path!r}: {_reason(error)}") from error
        if replaced_id:
            self._engine.remove_lora(replaced_id)
            # The prefix cache identifies an adapter by name and path, which are the same if the folder was not copied.
            self._llm.reset_prefix_cache(reset_connector=True)
        self._loaded[name] = copy, adapter_id
        return request


def _reason(error: Exception) -> str:
    if "max_lora_rank" in str(error):
        return f"{error}; construct with a larger engine_kwargs={{'max_lora_rank': ...}}"
    return str(error) or type(error).__name__
