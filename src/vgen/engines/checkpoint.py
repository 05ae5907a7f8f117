"""What an engine in this process starts from: the model's own checkpoint, or its config alone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..weights.names import unwrapped
from ..weights.peft import adapted_layers


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder or hub name that vLLM can load."""

    path: str
    tokenizer: str | None
    """None where there is no tokenizer; the engine then takes token ids only."""
    folder: tempfile.TemporaryDirectory[str] | None = None
    """Holds a config without weights, for a model that was never saved. Its owner cleans it up."""
    stale: bool = False
    """Whether an engine that starts from it has other weights than the model."""


def checkpoint_of(model: Any, processing_class: Any) -> Checkpoint:
    """Where `model` was loaded from or saved to; else a temporary folder with its config and the tokenizer.

    It is the base model's, without adapters. A quantized model has a folder without weights too: the engine gets
    dequantized ones, and a checkpoint that is quantized itself would have no place for them.
    """
    model = unwrapped(model)
    config = model.config
    path = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    own = str(getattr(processing_class, "name_or_path", "") or "")
    quantized = getattr(config, "quantization_config", None) is not None
    # A relative path that is no folder is a hub name; vLLM says so itself when that is not to be had.
    if path and not quantized and (Path(path).is_dir() or not Path(path).is_absolute()):
        return Checkpoint(path, own if own and Path(own).is_dir() else path, stale=bool(adapted_layers(model)))
    folder = tempfile.TemporaryDirectory(prefix="vgen-model-")
    changed: dict[str, Any] = {}
    if not config.architectures:  # without them vLLM loads the model for embeddings and refuses to generate
        changed["architectures"] = [_class_name(model)]
    if changed or quantized:
        fields = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
        config = type(config).from_dict(fields | changed)
    config.save_pretrained(folder.name)
    if processing_class is None:
        return Checkpoint(folder.name, None, folder, stale=True)
    processing_class.save_pretrained(folder.name)
    return Checkpoint(folder.name, folder.name, folder, stale=True)


def _class_name(model: Any) -> str:
    """FSDP2 makes a class of its own for what it shards: `FSDPQwen2ForCausalLM`."""
    kind = type(model)
    return kind.__bases__[1].__name__ if kind.__bases__[0].__name__ == "FSDPModule" else kind.__name__
