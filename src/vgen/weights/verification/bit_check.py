"""Whether two tensors are equal bit by bit, for many pairs without waiting for the device after each."""

from __future__ import annotations

import torch

MOST_ELEMENTS = 1 << 26
"""Elements compared at a time: the comparison takes a byte of memory for each."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differs(place: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Whether any bit of `place` differs from `value` in the dtype of `place`: a bool on the device, not waited for."""
    if place.dim() and place.numel() > MOST_ELEMENTS and len(place) > 1:
        parts = -(-place.numel() // MOST_ELEMENTS)
        pairs = zip(place.chunk(parts), value.chunk(parts), strict=True)
        return torch.stack([differs(*pair) for pair in pairs]).any()
    value = value.to(device=place.device, dtype=place.dtype)
    if place.dtype.is_complex:
        place, value = torch.view_as_real(place), torch.view_as_real(value)
    bits = _BITS[place.element_size()]
    return (place.view(bits) != value.view(bits)).any()


class _Results:
    """Collects named results on their devices. Only `names` waits for the devices."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._results: list[torch.Tensor] = []

    def _add(self, name: str, result: torch.Tensor) -> None:
        self._names.append(name)
        self._results.append(result)

    def names(self) -> tuple[str, ...]:
        """The names of those with the result true, each once, in the order in which they came."""
        by_device: dict[torch.device, list[int]] = {}
        for index, result in enumerate(self._results):
            by_device.setdefault(result.device, []).append(index)
        different: list[int] = []
        for indices in by_device.values():  # one wait for each device
            answers = torch.stack([self._results[index] for index in indices]).tolist()
            different += [index for index, answer in zip(indices, answers, strict=True) if answer]
        return tuple(dict.fromkeys(self._names[index] for index in sorted(different)))


class Differences(_Results):
    """Names of pairs of tensors that differ."""

    def compare(self, name: str, place: torch.Tensor, value: torch.Tensor) -> None:
        """Start a comparison of the two."""
        self._add(name, differs(place, value))


class NotFinite(_Results):
    """Names of tensors that hold a NaN or an infinity."""

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Start to examine the tensor."""
        if tensor.is_floating_point() and tensor.numel():
            extremes = tensor.detach().aminmax() if tensor.dtype.itemsize > 1 else tensor.float().aminmax()
            self._add(name, ~(extremes.min.isfinite() & extremes.max.isfinite()))
