"""Export of a LoRA adapter alone, for an engine with LoRA enabled: megabytes instead of a merged model's gigabytes."""

from __future__ import annotations

import json
import os
import tempfile
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gather_error import gather_error
from .parameter_gather import gather, weights_of
from .unwrap_model import path_of, unwrapped, unwrapped_once

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Adapter:
    """What PEFT saves of one adapter, in the format that vLLM's `LoRARequest` loads."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    tensors: dict[str, torch.Tensor]
    """The content of adapter_model.safetensors."""

    def save(self, folder: str | Path) -> None:
        """Write both files, each atomically: a server may be reading the files of the last call."""
        from safetensors.torch import save

        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        _replace(Path(folder, "adapter_model.safetensors"), save(tensors, metadata={"format": "pt"}))
        _replace(Path(folder, "adapter_config.json"), json.dumps(self.config, indent=2).encode())


def adapter_of(model: Any, name: str | None = None) -> Adapter:
    """Copies of the adapter `name` of a PEFT model, by default of the active one. All ranks of a sharded model call it.

        adapter_of(model).save(folder)
        request = LoRARequest("policy", 1, lora_path=str(folder), load_inplace=True)
        generation.engine.llm.llm_engine.add_lora(request)

    The engine must have the trainer's base weights, and LoRA enabled for this LoRA rank and these modules. PEFT's
    `get_peft_model_state_dict` chooses and names the tensors. Raises `WeightSyncError` if there is no such adapter.
    """
    from peft.utils import get_peft_model_state_dict

    holder = _holder(model)
    name = name or _active(holder)
    if name not in holder.peft_config:
        raise gather_error(f"it has no adapter {name!r}, only {', '.join(map(repr, holder.peft_config))}")
    prefix = path_of(unwrapped(model), holder)
    weights = {f"{prefix}{weight.name}": weight for weight in weights_of(model)}
    metas = {key: weight.meta() for key, weight in weights.items()}
    options: dict[str, Any] = dict(adapter_name=name, save_embedding_layers=False)
    # First on tensors without data, to learn which weights it takes: only those are gathered.
    taken = {id(meta) for meta in get_peft_model_state_dict(holder, state_dict=metas, **options).values()}
    keys = [key for key, meta in metas.items() if id(meta) in taken]
    whole = zip(keys, gather([weights[key] for key in keys]), strict=True)
    state = {key: tensor.clone() if weights[key].live else tensor for key, tensor in whole}
    tensors = get_peft_model_state_dict(holder, state_dict=state, **options)
    if "PeftModel" not in {kind.__name__ for kind in type(holder).__mro__}:
        # Adapters that were added to a transformers model itself: its names lack PEFT's prefix.
        tensors = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    return Adapter(_config(holder.peft_config[name]), tensors)


def _holder(model: Any) -> Any:
    """The PEFT model inside other wrappers, or the transformers model to which adapters were added directly."""
    while model is not None:
        if getattr(model, "peft_config", None):
            return model
        model = unwrapped_once(model)
    raise gather_error("the model has no PEFT adapter")


def _active(holder: Any) -> str:
    active: Any = holder.active_adapters
    names: Any = active() if callable(active) else active
    if len(names) != 1:
        raise gather_error(f"name one of the active adapters: {names}")
    return names[0]


def _config(config: Any) -> dict[str, Any]:
    """The configuration as PEFT writes it: sets become lists, enumerations become their values."""
    config = copy(config)
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads(Path(folder, "adapter_config.json").read_text())


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
