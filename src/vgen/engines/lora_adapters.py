"""LoRA adapter folders, as all engines identify them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

Fingerprint: TypeAlias = "tuple[str, tuple[tuple[str, int, int], ...]]"
"""The path, and name, modification time (nanoseconds) and size (bytes) of each adapter file."""


def fingerprint(path: str) -> Fingerprint:
    """Identify an adapter folder and its present content: an engine reloads an adapter if this has changed.

    A hub name instead of a folder is identified by the name only.
    """
    files = sorted(Path(path).glob("adapter_*")) if Path(path).is_dir() else []
    stats = [(file.name, file.stat()) for file in files]
    return path, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
