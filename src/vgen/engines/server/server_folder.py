"""The temporary folder of a server: its control key, and its log."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

from ..._addresses import this_host
from ..temporary_folder import temporary_folder

PREFIX = "vgen-serve-"
LOCKED = "locked-by-launcher"
"""A file in the folder that names its host. It says that the folder is locked for as long as its launcher lives."""


class ServerFolder:
    """A folder that only this user can read. It is deleted by `cleanup`, or with this process.

    A process that was killed deletes nothing. Its server does that, and if that was killed as well, the next server
    that this user starts on this host. Raises `EngineError` if there is no place for temporary files.
    """

    def __init__(self) -> None:
        self.name = temporary_folder(PREFIX)
        lock = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(self.name, LOCKED).write_text(this_host())
        self._finalizer = weakref.finalize(self, _delete, self.name, lock, os.getpid())
        _sweep(Path(self.name).parent)

    def cleanup(self) -> None:
        """Delete the folder. A second call does nothing."""
        self._finalizer()


def _delete(name: str, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child runs the finalizer, too
        return
    shutil.rmtree(name, ignore_errors=True)
    os.close(lock)


def _sweep(parent: Path) -> None:
    """Delete the folders of this user's servers whose launchers were killed.

    Hosts that share the place do not see each other's locks, so each deletes only its own.
    """
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError, ValueError):  # its launcher lives, or another process deletes it
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            if Path(path, LOCKED).read_text() != this_host():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
