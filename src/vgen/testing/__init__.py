"""Helpers for your tests and for vgen's: tiny models, a fake engine, a server that fails on demand, a stock server.

    from vgen import ProfilingContext, ServerGeneration
    from vgen.testing import FaultyServer, MemorySink

    sink = MemorySink()
    with FaultyServer() as server, ProfilingContext([sink]) as profiling:
        server.faults["/v1/completions"] = [503, "reset"]
        ServerGeneration(model, base_urls=[server.url], profiling=profiling).generate([[1, 2]])
    assert "vgen.generate" in [span.name for span in sink.spans]

torch and transformers are imported only by the functions that make a model or a tokenizer.
"""

from ..profiling.sinks.memory import MemorySink
from .fake_engine import FakeEngine
from .faulty_server import Fault, FaultyServer
from .stock_server import stock_server
from .tiny_models import byte_tokenizer, tiny_model, tiny_vision_model

__all__ = [
    "FakeEngine",
    "Fault",
    "FaultyServer",
    "MemorySink",
    "byte_tokenizer",
    "stock_server",
    "tiny_model",
    "tiny_vision_model",
]
