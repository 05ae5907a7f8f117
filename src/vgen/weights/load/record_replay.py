"""One pass of a source's tensors through a load record: what is copied at once, what later, and what is compared."""

from __future__ import annotations

from collections.abc import Set

import torch

from ...engine_protocol import SourceAddresses
from ..verification.bit_check import Differences, NotFinite
from .batched_copy import Pair, copy_pairs
from .load_record import LoadRecord


class RecordReplay:
    """Copies the tensors of one pass to the destinations of a record.

    Args:
        addresses: The addresses of the trainer's live tensors: copies of those wait until the end of the pass, to be
            made together. All other tensors are copied as they come, because their memory is reused.
        parts: Whether the tensors come in parts whose memory stays valid until `copy`.
        nameless: Names that the record leaves out, because the engine does not know them.
        verify: Whether each destination is compared with its source, and each source examined for values that are not
            finite.
    """

    def __init__(
        self,
        record: LoadRecord,
        *,
        addresses: SourceAddresses | None = None,
        parts: bool = False,
        nameless: Set[str] = frozenset(),
        verify: bool = False,
    ) -> None:
        self._record, self._addresses, self._parts, self._verify = record, addresses, parts, verify
        self._nameless = nameless
        self.not_finite = NotFinite()
        self._received = set[str]()
        self._waiting_names: list[str] = []
        self.waiting: list[Pair] = []
        """Destinations and values that are still to be copied, together."""
        self.all_in_place = True
        """Whether every value is in the trainer's live memory."""
        self.from_host = False
        """Whether some value is copied from the host to a device."""
        self.differences = Differences()

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy one tensor, now or later; False if its name, shape or dtype is not as recorded."""
        if name in self._nameless:
            return True
        self._received.add(name)
        if self._verify:
            self.not_finite.check(name, tensor)
        if self._record.layouts.get(name) != (tuple(tensor.shape), tensor.dtype):
            return False
        in_place = self._addresses is not None and self._addresses.holds(tensor) and tensor.is_contiguous()
        for copy in self._record.copies.get(name, ()):
            value = copy.part.of(tensor)
            self.from_host = self.from_host or (copy.place.is_cuda and not value.is_cuda)
            self.all_in_place = self.all_in_place and in_place
            if in_place or self._parts:
                self.waiting.append((copy.place, value))
                self._waiting_names.append(self._record.names[copy.target])
                continue
            copy.place.copy_(value, non_blocking=True)
            if self._verify:
                self.differences.compare(self._record.names[copy.target], copy.place, value)
        return True

    def copy(self) -> None:
        """Make the copies that wait."""
        copy_pairs(self.waiting)
        self.compare()
        self.waiting, self._waiting_names = [], []

    def compare(self) -> None:
        """If the pass is verified, compare the destinations of waiting copies, which were made, with their sources."""
        if self._verify:
            for name, (place, value) in zip(self._waiting_names, self.waiting, strict=True):
                self.differences.compare(name, place, value)

    def missing(self) -> list[str]:
        """The names that were recorded and did not come."""
        return [name for name in self._record.copies if name not in self._received]
