"""Generation objects: an engine, the trainer's weights, the ranks and a profiling context behind one object."""

from .colocate import ColocateGeneration as ColocateGeneration
from .generation import Generation as Generation
from .options import RequestTracing as RequestTracing
from .options import ServerConnection as ServerConnection
from .options import WeightSyncOptions as WeightSyncOptions
from .server import ServerGeneration as ServerGeneration
