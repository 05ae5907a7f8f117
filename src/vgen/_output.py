"""Keeps what libraries and engines print out of a command's own output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def output_redirected(log: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Within the block, `log` gets what is printed. Yields the real standard output and the real standard error."""

    def redirect(stdout: int, stderr: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        # File descriptors, not sys.stdout: the engine's processes and C++ code write to 1 and 2 directly.
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)

    with log.open("wb") as file, os.fdopen(os.dup(1), "w") as stdout, os.fdopen(os.dup(2), "w") as stderr:
        redirect(file.fileno(), file.fileno())
        try:
            yield stdout, stderr
        finally:
            redirect(stdout.fileno(), stderr.fileno())
