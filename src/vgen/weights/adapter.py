"""A LoRA adapter alone, for an engine with LoRA enabled: megabytes where the merged model has gigabytes."""

from __future__ import annotations

import json
import os
import tempfile
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightSyncError
from .names import path_of, unwrapped, unwrapped_once
from .sharded import Weight, gather, weights_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Adapter:
    """What PEFT saves of one adapter, and what vLLM's `LoRARequest` loads."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    tensors: dict[str, torch.Tensor]
    """Under the names of adapter_model.safetensors."""

    def save(self, folder: str | Path) -> None:
        """Write both files, each whole or not at all: a server may be reading the ones that are there."""
        from safetensors.torch import save

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        _replace(Path(folder, "adapter_model.safetensors"), save(tensors, metadata={"format": "pt"}))
        _replace(Path(folder, "adapter_config.json"), json.dumps(self.config, indent=2).encode())


def adapter_of(model: Any, name: str | None = None) -> Adapter:
    """The adapter `name` of a PEFT model, the active one by default, in copies. All ranks of a sharded model call it.

        adapter_of(model).save(folder)
        request = LoRARequest("policy", 1, lora_path=str(folder), load_inplace=True)
        generation.engine.llm.llm_engine.add_lora(request)

    The engine must have the trainer's base weights, and LoRA enabled for this rank and these modules. PEFT's own
    function chooses and names the tensors. Raises `WeightSyncError` where the model has no such adapter.
    """
    from peft.utils import get_peft_model_state_dict

    holder = _holder(model)
    name = name or _active(holder)
    if name not in holder.peft_config:
        raise WeightSyncError(
            f"it has no adapter {name!r}, only {', '.join(map(repr, holder.peft_config))}",
            phase="gather",
            receiver="trainer",
        )
    prefix = path_of(unwrapped(model), holder)
    weights = {f"{prefix}{weight.name}": weight for weight in weights_of(model)}
    metas = {found: weight.meta() for found, weight in weights.items()}
    asked: dict[str, Any] = dict(adapter_name=name, save_embedding_layers=False)
    chosen = {id(meta) for meta in get_peft_model_state_dict(holder, state_dict=metas, **asked).values()}
    needed = [found for found, meta in metas.items() if id(meta) in chosen]
    state = dict(zip(needed, _copies([weights[found] for found in needed]), strict=True))
    tensors = get_peft_model_state_dict(holder, state_dict=state, **asked)
    if not _is_peft_model(holder):  # adapters that were added to a transformers model itself
        tensors = {f"base_model.model.{found}": tensor for found, tensor in tensors.items()}
    return Adapter(_config(holder.peft_config[name]), tensors)


def _copies(weights: list[Weight]) -> list[torch.Tensor]:
    return [tensor.clone() if weight.live else tensor for weight, tensor in zip(weights, gather(weights), strict=True)]


def _holder(model: Any) -> Any:
    """The PEFT model inside of other wrappers, or the transformers model that has adapters of its own."""
    found: Any = model
    while found is not None:
        if getattr(found, "peft_config", None):
            return found
        found = unwrapped_once(found)
    raise WeightSyncError("the model has no PEFT adapter", phase="gather", receiver="trainer")


def _is_peft_model(model: Any) -> bool:
    """Whether its names begin with PEFT's own prefix."""
    return "PeftModel" in {kind.__name__ for kind in type(model).__mro__}


def _active(holder: Any) -> str:
    active: Any = holder.active_adapters
    names: Any = active() if callable(active) else active
    if len(names) != 1:
        raise WeightSyncError(f"name one of the active adapters: {names}", phase="gather", receiver="trainer")
    return names[0]


def _config(config: Any) -> dict[str, Any]:
    """As PEFT writes it: sets are lists, enumerations are their values."""
    config = copy(config)
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads(Path(folder, "adapter_config.json").read_text())


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
