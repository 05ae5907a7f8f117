"""The keys of a server, given as text or as files that may be replaced while a run goes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeAlias

from ...arguments import text
from ...errors import ArgumentError

logger = logging.getLogger(__name__)

KeyOrFile: TypeAlias = "str | os.PathLike[str] | None"
"""A key, or the file that holds it, as a `pathlib.Path`."""


class Key:
    """One key. Raises `ArgumentError` for a file that cannot be read or is empty.

    Args:
        argument: The name that the caller knows the key by.
        given: The key, the file that holds it, or None for no key.
    """

    def __init__(self, argument: str, given: KeyOrFile) -> None:
        self._file = Path(given) if isinstance(given, os.PathLike) else None
        if self._file is not None:
            try:
                given = _read(self._file)
            except (OSError, ValueError) as error:
                raise ArgumentError(argument, f"names a file that holds no key: {error}") from None
        self.value = "" if given is None else text(argument, given, "a key as text, or its file as a pathlib.Path")
        """The key now; empty if there is none."""

    def read_again(self) -> None:
        """Read the file, if the key came from one. An unreadable file leaves the key as it was."""
        if self._file is not None:
            try:
                self.value = _read(self._file)
            except (OSError, ValueError) as error:
                logger.warning("vgen: a key could not be read again: %s", error)


def _read(file: Path) -> str:
    if not (key := file.read_text().strip()):
        raise ValueError(f"{file} is empty")
    return key
