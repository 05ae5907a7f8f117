"""LoRA adapter folders, as all engines identify and keep them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TypeAlias

logger = logging.getLogger(__name__)

Fingerprint: TypeAlias = "tuple[str, tuple[tuple[str, int, int], ...]]"
"""The path, and name, modification time (nanoseconds) and size (bytes) of each adapter file."""

ATTEMPTS = 5
"""How often a folder is copied that somebody writes to meanwhile."""


def fingerprint(path: str) -> Fingerprint:
    """Identify an adapter folder and its present content: an engine loads an adapter again if this has changed.

    A hub name instead of a folder is identified by the name only.
    """
    files = sorted(Path(path).glob("adapter_*")) if Path(path).is_dir() else []
    stats = [(file.name, file.stat()) for file in files]
    return path, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def is_newer(current: Fingerprint, held: Fingerprint) -> bool:
    """Whether a folder holds another adapter than the one that was taken from it. A folder that is gone does not."""
    gone = current[0] == held[0] and not current[1]
    return current != held and not gone


class AdapterCopy:
    """The files of an adapter as they are now, where nobody rewrites or removes them.

    vLLM reads an adapter's files again, for example after a weight sync, or when the adapter was evicted in favour of
    another. The copy is removed by `remove`, or with this object.

    Args:
        path: The adapter's folder. What is no folder with an adapter is not copied.
        parent: Where the copy is made; None for the system's folder of temporary files.
    """

    def __init__(self, path: str, parent: Path | None) -> None:
        self.path, self.fingerprint = path, fingerprint(path)
        """What the engine reads, and what it was taken from."""
        self.remove = lambda: None
        if not self.fingerprint[1]:
            return
        try:
            copy = tempfile.mkdtemp(prefix=".vgen-adapter-", dir=parent)
        except OSError as error:
            message = (
                "vgen: the LoRA adapter in %s is not copied (%s): leave its folder as it is while the engine uses it"
            )
            logger.warning(message, path, error.strerror)
            return
        self.remove = weakref.finalize(self, _remove, copy, os.getpid())
        for attempt in range(ATTEMPTS):
            before = self.fingerprint
            try:
                for name, _, _ in before[1]:
                    shutil.copy(Path(path, name), copy)
            except FileNotFoundError:  # it is being replaced
                if attempt == ATTEMPTS - 1:
                    raise
            self.fingerprint = fingerprint(path)
            if self.fingerprint == before:
                break
        Path(copy).chmod(Path(path).stat().st_mode & 0o777 | 0o700)  # a server may run as another user
        self.path = copy


def _remove(copy: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has the object, and the folder is its parent's
        shutil.rmtree(copy, ignore_errors=True)
