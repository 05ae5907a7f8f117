"""A temporary folder whose path is the same at the next start, because vLLM's compile cache belongs to a path."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from ..temporary_folder import temporary_folder


class ModelFolder:
    """An empty folder that belongs to this object until `cleanup`, or the end of the process, which deletes it.

    The path is made of `name` and the first free number from `number` on. A folder that a killed process has left is
    taken over. Where the folder for temporary files cannot be used this way, the path is random. Raises `EngineError`
    if no folder can be made at all.

    Args:
        name: The same for the same content.
        number: The rank, so that each of several ranks gets its own path again.
    """

    def __init__(self, name: str, number: int = 0) -> None:
        self._lock: int | None = None
        self.path = self._reserve(name, number)
        self._finalizer = weakref.finalize(self, _delete, self.path, self._lock, os.getpid())

    def _reserve(self, name: str, number: int) -> Path:
        root = _private_root()
        if root is None:
            return Path(temporary_folder("vgen-model-"))
        paths = (root / f"{name}-{each}" for each in itertools.count(number))
        return next(path for path in paths if self._take(path))

    def _take(self, path: Path) -> bool:
        """Whether this process has locked the folder, and so may use it. It is empty then."""
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have deleted it meanwhile, and another process may have made a new one.
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise FileNotFoundError
        except OSError:
            os.close(descriptor)
            return False
        for left in path.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        self._lock = descriptor
        return True

    def cleanup(self) -> None:
        """Delete the folder. A second call does nothing."""
        self._finalizer()


def _delete(path: Path, lock: int | None, process: int) -> None:
    if os.getpid() != process:  # a forked child ends
        return
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _private_root() -> Path | None:
    """A folder for temporary files that only this user can change; None if there is none."""
    try:
        root = Path(tempfile.gettempdir(), f"vgen-models-{os.getuid()}")
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
    except OSError:
        return None
    private = root.is_dir() and not root.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return root if private else None
