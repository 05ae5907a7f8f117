"""Three syncs of fresh random weights to a real server, for several architectures."""

from __future__ import annotations

import pytest
from helpers.small_models import MODELS, three_times

from vgen import ProfilingContext, ServerConnection, ServerGeneration
from vgen.engines.server.launcher import start_server
from vgen.profiling import semconv
from vgen.testing import MemorySink

ARGUMENTS = ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(16 << 20)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "tied", "padded", "experts"])
def test_fresh_weights_three_times_by_shared_memory_and_once_more_by_checkpoint(tmp_path, kind):
    model, sink = MODELS[kind](tmp_path), MemorySink()
    tolerance = 1e-3 if kind == "experts" else 1e-4
    with start_server(tmp_path, arguments=ARGUMENTS) as server:
        keys = dict(base_urls=[server.url], control_key=server.control_key, connection=ServerConnection(timeout=120.0))
        with ServerGeneration(model, profiling=ProfilingContext([sink]), **keys) as generation:
            three_times(model, generation, tolerance)
        with ServerGeneration(
            model, profiling=ProfilingContext([sink]), weight_transport="checkpoint", **keys
        ) as generation:
            three_times(model, generation, tolerance)
    syncs = [span.attributes for span in sink.named(semconv.WEIGHT_SYNC)]
    assert {attributes[semconv.TRANSPORT] for attributes in syncs} == {"shared_memory", "checkpoint"}
    verified = [attributes[semconv.VERIFY_DIFFERENCE] for attributes in syncs if semconv.VERIFY in attributes]
    assert len(verified) >= 2
    assert max(verified) <= tolerance
