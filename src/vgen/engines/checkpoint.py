"""What an engine in this process starts from: the model's own checkpoint, or its config alone."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder or hub name that vLLM can load."""

    path: str
    tokenizer: str | None
    """None where there is no tokenizer; the engine then takes token ids only."""
    folder: tempfile.TemporaryDirectory[str] | None = None
    """Holds a config without weights, for a model that was never saved. Its owner cleans it up."""


def checkpoint_of(model: Any, processing_class: Any) -> Checkpoint:
    """Where `model` was loaded from or saved to; else a temporary folder with its config and the tokenizer."""
    path = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", ""))
    # A relative path that is no folder is a hub name; vLLM says so itself when that is not to be had.
    if path and (Path(path).is_dir() or not Path(path).is_absolute()):
        own = str(getattr(processing_class, "name_or_path", "") or "")
        return Checkpoint(path, own if own and Path(own).is_dir() else path)
    folder = tempfile.TemporaryDirectory(prefix="vgen-model-")
    config = model.config
    if not config.architectures:  # without them vLLM loads the model for embeddings and refuses to generate
        config = type(config).from_dict({**config.to_dict(), "architectures": [type(model).__name__]})
    config.save_pretrained(folder.name)
    if processing_class is None:
        return Checkpoint(folder.name, None, folder)
    processing_class.save_pretrained(folder.name)
    return Checkpoint(folder.name, folder.name, folder)
