"""Random weights that an engine gets before its first sync: a probe then sees whatever the sync fails to replace.

Before a first sync both sides often hold the same checkpoint, and a stale weight would look right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...engine_protocol import Source, TensorMetadata


class RandomWeights(Source):
    """A source of random tensors with the names, shapes and dtypes of `metadata`, the same values in each pass.

    The values have unit variance and are made on `device`. Names with the same seed in `seeds` and the same shape get
    the same values; by default each name has its own seed, or that of the name it is tied to. `ties` are as in
    `Source.ties`: an engine that keeps one tensor for both takes them for tied only if they are said to be.
    """

    def __init__(
        self,
        metadata: TensorMetadata,
        device: torch.device,
        seeds: Mapping[str, int] | None = None,
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self._metadata, self._device, self._ties = metadata, device, dict(ties or {})
        numbers = {name: index for index, (name, *_) in enumerate(metadata)}
        self._seeds = seeds or {name: numbers[self._ties.get(name, name)] for name in numbers}

    def ties(self) -> dict[str, str]:
        return self._ties

    def metadata(self) -> TensorMetadata:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator(self._device)
        options: dict[str, Any] = dict(generator=generator, device=self._device)
        for name, shape, dtype in self._metadata:
            generator.manual_seed(self._seeds[name])
            if dtype.is_floating_point:
                drawn_as = dtype if dtype.itemsize > 1 else torch.float32  # randn makes no 8-bit floats
                yield name, torch.randn(shape, dtype=drawn_as, **options).to(dtype)
            else:
                yield name, torch.randint(0, 2 if dtype == torch.bool else 127, shape, **options).to(dtype)
