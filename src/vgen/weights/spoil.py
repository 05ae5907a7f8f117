"""Random weights for an engine's first sync: what its reload then fails to replace, a probe cannot miss.

Before a first sync both sides often hold the same checkpoint, and a stale weight would look right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .recorder import Metadata


class RandomWeights:
    """A stream with the names, shapes and dtypes of `metadata`, the same values in each pass.

    They are of unit variance, made on `device`; names that have one seed in `seeds` and one shape get the same ones.
    """

    seconds = 0.0

    def __init__(self, metadata: Metadata, device: torch.device, seeds: Mapping[str, int] | None = None) -> None:
        self._metadata, self._device = metadata, device
        self._seeds = seeds or {name: index for index, (name, *_) in enumerate(metadata)}

    def metadata(self) -> Metadata:
        """As it was given."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator(self._device)
        own: dict[str, Any] = dict(generator=generator, device=self._device)
        for name, shape, dtype in self._metadata:
            generator.manual_seed(self._seeds[name])
            if dtype.is_floating_point:
                kind = dtype if dtype.itemsize > 1 else torch.float32
                yield name, torch.randn(shape, dtype=kind, **own).to(dtype)
            else:
                yield name, torch.randint(0, 2 if dtype == torch.bool else 127, shape, **own).to(dtype)


def metadata_of(source: Any) -> Metadata:
    """Name, shape and dtype of what a pass yields: the source's own word, or by making one."""
    if (own := said_of(source)) is not None:
        return own
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in source]


def said_of(source: Any) -> Metadata | None:
    """What a source says itself of its passes, vLLM's own sources in their way; None where it says nothing."""
    own = getattr(source, "metadata", None)
    if own is None:
        return None
    return [(each.name, tuple(each.shape), each.dtype) if hasattr(each, "dtype") else tuple(each) for each in own()]
