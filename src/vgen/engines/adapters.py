"""LoRA adapters in an engine in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from ..types import LoRARequest

Fingerprint: TypeAlias = "tuple[str, tuple[tuple[str, int, int], ...]]"


class Adapters:
    """The adapters that were asked for, by name, loaded before a request needs them.

    Left to vLLM they would be loaded in a scheduler step, where a missing folder breaks the engine. A name whose
    folder has changed since, or is another, is loaded anew: vLLM would go on with the old one.
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._known: dict[str, tuple[Fingerprint, int]] = {}
        self._count = 0

    def load(self, wanted: LoRARequest | None) -> Any:
        """vLLM's own request for it, or None where none is wanted. Raises `ValueError` that says what to do."""
        if wanted is None:
            return None
        from vllm.lora.request import LoRARequest as EngineLoRARequest

        name, path = wanted.lora_name, wanted.lora_path
        if not path:
            raise ValueError(f"LoRA adapter {name!r} has no lora_path, from which this engine would load it")
        if self._engine.vllm_config.lora_config is None:
            raise ValueError(
                f"LoRA adapter {name!r} needs an engine with LoRA: construct with "
                "engine_kwargs={'enable_lora': True, 'max_lora_rank': ...}"
            )
        found = fingerprint(path)
        known, adapter_id = self._known.get(name, (None, 0))
        if known != found:
            self._count += 1
            old, adapter_id = adapter_id, self._count
        else:
            old = 0
        request = EngineLoRARequest(name, adapter_id, path)
        try:
            self._engine.add_lora(request)  # where it is loaded already, vLLM keeps it from being the next to go
        except Exception as error:
            raise ValueError(f"LoRA adapter {name!r} could not be loaded from {path!r}: {_reason(error)}") from error
        if old:
            self._engine.remove_lora(old)
            self._llm.reset_prefix_cache()  # its entries go by name and path
        self._known[name] = found, adapter_id
        return request


def fingerprint(path: str) -> Fingerprint:
    """Tells a folder's adapter from another and from what it was before; of a hub name, the name alone."""
    files = sorted(Path(path).glob("adapter_*")) if Path(path).is_dir() else []
    stats = [(file.name, file.stat()) for file in files]
    return path, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _reason(error: Exception) -> str:
    if "max_lora_rank" in str(error):
        return f"{error}; construct with a larger engine_kwargs={{'max_lora_rank': ...}}"
    return str(error) or type(error).__name__
