"""Buckets sent to real servers that keep the loaded layout: the recorded copy loads them, and can compare bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.changed_source import ChangedSource
from helpers.plain_layout import plain_layout_environment
from helpers.small_models import MODELS, three_times
from helpers.transfers import K_PROJ, LAST, SMALL, missing, randomize, wrong_shape

from vgen import ProfilingContext, Sampling, ServerConnection, ServerGeneration, WeightSyncError, WeightSyncOptions
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import Source
from vgen.engines.server.launcher import start_server
from vgen.profiling import semconv
from vgen.testing import MemorySink

pytestmark = pytest.mark.slow

ARGUMENTS = ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(16 << 20)]


def served(folder: Path) -> Any:
    """A server with two tensor-parallel workers, all of which keep the loaded layout."""
    environment = plain_layout_environment(folder / "own")
    return start_server(folder, arguments=ARGUMENTS, environment=environment, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Iterator[tuple[Any, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("plain")
    model = MODELS["qwen2"](folder)
    with served(folder) as server:
        yield (
            model,
            dict(base_urls=[server.url], control_key=server.control_key, connection=ServerConnection(timeout=120.0)),
        )


def syncs(sink: MemorySink) -> list[Any]:
    return [span.attributes for span in sink.named(semconv.WEIGHT_SYNC)]


@pytest.mark.parametrize(("transport", "bucket_bytes"), [("shared_memory", 256 << 20), ("gloo", SMALL)])
def test_the_recorded_copy_brings_fresh_weights_three_times_and_compares_bits(plain, transport, bucket_bytes):
    (model, keys), sink = plain, MemorySink()
    more = dict(
        weight_transport=transport,
        weight_sync=WeightSyncOptions(bucket_bytes=bucket_bytes),
        profiling=ProfilingContext([sink]),
    )
    with ServerGeneration(model, **keys, **more) as generation:
        three_times(model, generation)
        randomize(model)
        generation.sync_weights(verify="bits")
        assert max_logprob_difference(model, generation.generate([[5, 6]], Sampling(max_tokens=8))) <= 1e-4
    first, *others, last = syncs(
        sink
    )  # one more sync before the first rollout, if another trainer used the server before
    found = [first, *others, last]
    assert (first[semconv.VERIFY], last[semconv.VERIFY]) == ("logprobs", "bits")
    assert not any(semconv.VERIFY in attributes for attributes in others)
    assert {attributes[semconv.PLAN_WAY] for attributes in found} == {"foreach"}
    assert {attributes[semconv.TRANSPORT] for attributes in found} == {transport}
    assert not any(semconv.PLAN_REASON in attributes for attributes in found)


@pytest.mark.parametrize(
    ("transport", "change", "parameter", "says"),
    [("shared_memory", missing(K_PROJ), K_PROJ, "does not provide it"), ("gloo", wrong_shape(LAST), LAST, "size of")],
)
def test_a_tensor_that_differs_from_the_metadata_is_named_and_the_next_sync_is_right(
    plain, transport, change, parameter, says
):
    model, keys = plain
    source = ChangedSource(model)
    with ServerGeneration(
        source, **keys, weight_transport=transport, weight_sync=WeightSyncOptions(bucket_bytes=SMALL)
    ) as generation:
        generation.sync_weights()
        with source.changed_by(change), pytest.raises(WeightSyncError, match=says) as caught:
            generation.sync_weights()
        assert caught.value.parameter == parameter
        assert generation.state == "failed"
        randomize(model)
        generation.sync_weights()
        assert max_logprob_difference(model, generation.generate([[5, 6]], Sampling(max_tokens=8))) <= 1e-4


class Unannounced(Source):
    """A source that does not say beforehand what it yields."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        yield from self._source


def test_a_source_without_metadata_is_reloaded_and_the_next_one_with_metadata_is_not(plain):
    (model, keys), sink = plain, MemorySink()
    with ServerGeneration(model, **keys, profiling=ProfilingContext([sink])) as generation:
        own = generation.source
        for source in (own, Unannounced(own), own):
            generation.source = source
            randomize(model)
            generation.sync_weights(verify="none")
            assert max_logprob_difference(model, generation.generate([[5, 6]], Sampling(max_tokens=8))) <= 1e-4
    assert [attributes[semconv.PLAN_WAY] for attributes in syncs(sink)] == ["foreach", "reload", "foreach"]
    assert [attributes.get(semconv.PLAN_REASON, "")[:11] for attributes in syncs(sink)] == ["", "the trainer", ""]
