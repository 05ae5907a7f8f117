"""Whether a checkpoint on this host has the weights of the trainer's model, by sampled rows of every tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine_protocol import Source
from ..source.module_source import one_pass

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROWS = 8
"""How many rows of each tensor are compared: the first, the last, and others at equal distances."""


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder on this host that `name`, a path or hub name, stands for; None if there is none."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name).absolute()
    if Path(name).is_absolute():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # it was never downloaded, or is no name of a repository
        return None


def equal_checkpoint(
    source: Source, name: str, revision: str | None, on_any_rank: Callable[[bool], bool]
) -> Path | None:
    """The folder of the checkpoint `name` if it has the weights of the trainer's model, on every rank; else None.

    If it does not, the reason is logged as a warning. All ranks call it together; `on_any_rank` tells each whether its
    argument is true on any of them.
    """
    folder = local_folder(name, revision)
    if on_any_rank(folder is None):  # before the pass, which may be collective
        difference = "no checkpoint that it was loaded from is on this host"
    else:
        assert folder is not None
        difference = first_difference(source, folder)
    if not on_any_rank(difference is not None):
        return folder
    message = "vgen: the first generation syncs the weights, because the model is not the checkpoint %s: %s"
    logger.warning(message, name or "(it was never saved)", difference or "another rank has a difference")
    return None


def first_difference(source: Source, folder: Path) -> str | None:
    """Why the checkpoint in `folder` (safetensors) is not what `source` sends; None if all sampled rows are equal.

    Makes one pass over the source: all ranks of a sharded model call it together. The checkpoint is compared in the
    dtype of the model. A tied tensor that the checkpoint has under another name only is equal if that one is.
    """
    with one_pass(source), ExitStack() as files:
        stored = {name: file for file in _opened(folder, files) for name in file.keys()}  # noqa: SIM118
        equal: set[Any] = set()
        missing = set(stored)
        for name, tensor in source:
            missing.discard(name)
            if name not in stored:
                if _memory(tensor) not in equal:
                    return f"the checkpoint has no {name}"
            elif not _rows_are_equal(stored[name].get_slice(name), tensor):
                return f"{name} is different"
            else:
                equal.add(_memory(tensor))
        return f"the model has no {min(missing)}" if missing else None


def _opened(folder: Path, files: ExitStack) -> Iterator[Any]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith(("adapter_", "consolidated")):
            yield files.enter_context(safe_open(path, "pt"))


def _memory(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _rows_are_equal(stored: Any, tensor: torch.Tensor) -> bool:
    if tuple(stored.get_shape()) != tuple(tensor.shape):
        return False
    if not tensor.ndim:
        return bool((stored[:].to(tensor) == tensor).all())
    length = tensor.shape[0]
    rows = {index * (length - 1) // max(ROWS - 1, 1) for index in range(ROWS)} if length else set[int]()
    return all(_equal(stored[row : row + 1], tensor[row : row + 1]) for row in rows)


def _equal(stored: torch.Tensor, row: torch.Tensor) -> bool:
    return bool((stored.to(row) == row).all())
