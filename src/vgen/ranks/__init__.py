"""Several trainer ranks and the engines that they generate with."""

from __future__ import annotations

from .base import Asked, Call, GroupRanks, Ranks, SingleRank
from .distributed import DistributedRanks, ranks_of
from .engine import LedEngine

__all__ = ["Asked", "Call", "DistributedRanks", "GroupRanks", "LedEngine", "Ranks", "SingleRank", "ranks_of"]
