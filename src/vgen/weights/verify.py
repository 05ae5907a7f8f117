"""Whether an engine's weights are the trainer's: bit by bit where both can be read, by log-probabilities anywhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch

MOST_ELEMENTS = 1 << 26
"""Compared at a time: each takes a byte more meanwhile."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differs(place: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Whether any bit of `place` is not that of `value` in its dtype: one bool on the device, not waited for."""
    if place.dim() and place.numel() > MOST_ELEMENTS and len(place) > 1:
        parts = -(-place.numel() // MOST_ELEMENTS)
        pairs = zip(place.chunk(parts), value.chunk(parts), strict=True)
        return torch.stack([differs(*pair) for pair in pairs]).any()
    value = value.to(device=place.device, dtype=place.dtype)
    if place.dtype.is_complex:
        place, value = torch.view_as_real(place), torch.view_as_real(value)
    bits = _BITS[place.element_size()]
    return (place.view(bits) != value.view(bits)).any()


class Differences:
    """Collects what differs, without waiting for the device until it is read."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._found: list[torch.Tensor] = []

    def compare(self, name: str, place: torch.Tensor, value: torch.Tensor) -> None:
        """Note whether the two differ."""
        self._names.append(name)
        self._found.append(differs(place, value))

    def names(self) -> tuple[str, ...]:
        """What differs, each once."""
        by_device: dict[torch.device, list[int]] = {}
        for index, found in enumerate(self._found):
            by_device.setdefault(found.device, []).append(index)
        wrong: list[int] = []
        for indices in by_device.values():  # one wait for each device
            answers = torch.stack([self._found[index] for index in indices]).tolist()
            wrong += [index for index, answer in zip(indices, answers, strict=True) if answer]
        return tuple(dict.fromkeys(self._names[index] for index in sorted(wrong)))


def verify_bits(pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> tuple[str, ...]:
    """The names among `(name, place, value)` whose place does not hold the value, bit for bit in its own dtype."""
    differences = Differences()
    for name, place, value in pairs:
        differences.compare(name, place, value)
    return differences.names()
