"""A new temporary folder, or one error that names what to set."""

from __future__ import annotations

import tempfile

from ..errors import EngineError


def temporary_folder(prefix: str) -> str:
    """Make a folder that only this user can read. Raises `EngineError` if no place for temporary files takes one."""
    try:
        return tempfile.mkdtemp(prefix=prefix)  # its mode is 0700
    except OSError as error:
        problem = f"no folder for temporary files can be written ({error})"
        raise EngineError(f"{problem}: set TMPDIR to one on a file system that is not read-only") from error
