"""What an engine in this process starts from: the live configuration of the trainer's model, or a checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...weights.source.module_source import source_of
from ...weights.source.unwrap_model import unwrapped
from ...weights.verification.checkpoint_rows import local_folder
from .model_folder import ModelFolder

logger = logging.getLogger(__name__)

DUMMY_TARGET = "vgen_dummy_target"
"""The load format of an engine whose draft model is loaded while its own weights come by a sync."""
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".distcp")
_TOKENIZER_STARTS = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece", "sentencepiece")
_TOKENIZER_ENDINGS = (".model", ".tiktoken")
_ANOTHER_FORMAT = ("params.json", "quantize_config.json", "hf_quant_config.json", ".index.json")
"""Files by which vLLM would take the folder for a quantized model, one in Mistral's own format, or one with weights."""


@dataclass(frozen=True, slots=True)
class InitialCheckpoint:
    """A folder or hub name from which vLLM can start."""

    path: str
    tokenizer: str | None
    """Folder or hub name; None without a tokenizer: the engine then takes token IDs only."""
    folder: ModelFolder | None = None
    """The temporary folder, if `path` is one. Whoever closes the engine cleans it up: images are processed with it."""


def checkpoint_of(
    model: Any, processing_class: Any, *, weights: Path | None = None, number: int = 0
) -> InitialCheckpoint:
    """A temporary folder with the live configuration of `model`, and all else but weights that an engine reads.

    Configuration and end-of-sequence tokens are those of the model as it is now: its vocabulary may have been resized,
    layers removed, fields given to `from_pretrained`. The configuration is the base model's, without quantization,
    because the engine receives dequantized weights. Of `generation_config` only the special tokens are taken, since
    `Sampling` says how to sample. Tokenizer and processor are `processing_class`; what it does not write (code, the
    processor's configuration) is linked from the checkpoint that the model was loaded from, if that is on this host.

    Args:
        model: A transformers model, perhaps wrapped (DDP, FSDP, PEFT).
        processing_class: The tokenizer or processor, or None.
        weights: A folder of which the weights are linked, too.
        number: The rank, which is a part of the folder's name.
    """
    untied = not source_of(model).ties() if hasattr(model, "named_parameters") else False
    model = unwrapped(model)
    fields = _live_fields(model, untied)
    content = json.dumps(fields, indent=2, sort_keys=True)
    folder = ModelFolder(hashlib.sha256(content.encode()).hexdigest()[:16], number)
    try:
        (folder.path / "config.json").write_text(content)
        if (generation := getattr(model, "generation_config", None)) is not None:
            tokens = {name: _plain(getattr(generation, name, None)) for name in _TOKEN_FIELDS}
            tokens = {name: value for name, value in tokens.items() if value is not None}
            (folder.path / "generation_config.json").write_text(json.dumps(tokens))
        if saved := hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(folder.path)
        if (origin := _origin(model, saved)) is not None:
            left_out = (*_LARGE, *_ANOTHER_FORMAT)
            _link(origin, folder.path, lambda file: not (file.endswith(left_out) or (saved and _is_tokenizer(file))))
        if weights is not None:
            _link(weights, folder.path, lambda file: file.endswith((".safetensors", ".safetensors.index.json")))
    except BaseException:
        folder.cleanup()
        raise
    path = str(folder.path)
    return InitialCheckpoint(path, path if _has_tokenizer(folder.path) else None, folder)


def frozen_checkpoint(path: str) -> InitialCheckpoint:
    """A folder or hub name with weights of its own, for an engine without a trainer's model."""
    bare = Path(path).is_dir() and not _has_tokenizer(Path(path))
    return InitialCheckpoint(path, None if bare else path)


def stored_dtype(path: str) -> str:
    """The dtype of the checkpoint's weights, or `auto` if it does not tell. vLLM itself halves a float32 checkpoint."""
    from transformers import PretrainedConfig

    try:
        fields, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError):  # vLLM's own error will say what is missing
        return "auto"
    parts = (fields, fields.get("text_config") or {})
    named = (str(part[name]) for part in parts for name in ("dtype", "torch_dtype") if part.get(name))
    return next(named, "auto").removeprefix("torch.")


def name_of(model: Any) -> str:
    """The folder or hub name that a model was loaded from; empty if it was never saved."""
    return str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")


def _live_fields(model: Any, untied: bool) -> dict[str, Any]:
    """The configuration as it is now, as `config.json` holds it."""
    fields: dict[str, Any] = json.loads(model.config.to_json_string())
    fields.pop("quantization_config", None)
    # Without this field vLLM loads the model for embeddings and refuses to generate.
    if not {kind.__name__ for kind in type(model).__mro__} & set(fields.get("architectures") or ()):
        fields["architectures"] = [_class_name(model)]
    for part in (fields, *(part for part in fields.values() if isinstance(part, dict))):
        _shorten(part)
        if untied and part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False  # untied by hand or by an adapter: one tensor could not hold both
    if str(fields.get("model_type")).startswith(("deepseek_v3", "glm_moe_dsa")):
        # Their routing, which transformers knows without these fields: vLLM would take a softmax, and no bias.
        fields = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} | fields
    return fields


def _shorten(fields: dict[str, Any]) -> None:
    """Cut lists that name the kind of each layer: code that takes off the last layers changes only the number."""
    layers = fields.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(layers, int) and isinstance(fields.get(name), list):
            fields[name] = fields[name][:layers]


def _class_name(model: Any) -> str:
    """The model's class. FSDP2 replaces it by its own subclass, `FSDPQwen2ForCausalLM` for example."""
    kind = type(model)
    return kind.__bases__[1].__name__ if kind.__bases__[0].__name__ == "FSDPModule" else kind.__name__


def _plain(token: Any) -> Any:
    """A token id or list of such for JSON; transformers also keeps them as tensors."""
    return token.tolist() if hasattr(token, "tolist") else token


def _origin(model: Any, saved: bool) -> Path | None:
    """The folder that the model was loaded from; with a tokenizer, if `saved` is false and the hub can be reached."""
    name, revision = name_of(model), getattr(model.config, "_commit_hash", None)
    folder = local_folder(name, revision)
    if saved or folder is None or folder == Path(name).absolute() or _has_tokenizer(folder):
        return folder
    from huggingface_hub import snapshot_download

    try:  # `from_pretrained` has downloaded only the model
        return Path(snapshot_download(name, revision=revision, ignore_patterns=[f"*{each}" for each in _LARGE]))
    except (OSError, ValueError) as error:
        logger.info("vgen: the engine takes token ids only: %s has no tokenizer here (%s)", name, type(error).__name__)
        return folder


def _link(origin: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Link the wanted files that `folder` does not have yet."""
    for file in origin.iterdir():
        if file.is_file() and wanted(file.name) and not (link := folder / file.name).exists():
            link.symlink_to(file.resolve())


def _is_tokenizer(file: str) -> bool:
    return file.startswith(_TOKENIZER_STARTS) or file.endswith(_TOKENIZER_ENDINGS)


def _has_tokenizer(folder: Path) -> bool:
    return any(_is_tokenizer(file.name) for file in folder.iterdir())
