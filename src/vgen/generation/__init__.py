"""Generation objects: an engine, the trainer's weights, the ranks and a profiling context, composed."""

from .base import Generation
from .colocate import ColocateGeneration
from .server import ServerGeneration

__all__ = ["ColocateGeneration", "Generation", "ServerGeneration"]
