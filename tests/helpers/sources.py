"""Sources of weights for engines without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vgen.engine_protocol import Source


class SmallSource(Source):
    """Two tensors of 1000 bytes together, which `FakeEngine` does not look at."""

    bytes, tensors, seconds = 1000, 2, 0.0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from (("a", None), ("b", None))
