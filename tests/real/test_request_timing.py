"""vgen's request timings equal vLLM's metrics of the same run, in process and behind a server."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest
from helpers.waiting import wait_until

from vgen import ColocateGeneration, ProfilingContext, Sampling, ServerGeneration
from vgen.profiling import semconv
from vgen.testing import MemorySink, tiny_model

pytestmark = pytest.mark.slow

SECONDS = {
    semconv.REQUEST_QUEUE: "vllm:request_queue_time_seconds",
    semconv.REQUEST_PREFILL: "vllm:request_prefill_time_seconds",
    semconv.REQUEST_DECODE: "vllm:request_decode_time_seconds",
    semconv.REQUEST_TTFT: "vllm:time_to_first_token_seconds",
    semconv.REQUEST_TPOT: "vllm:request_time_per_output_token_seconds",
    semconv.REQUEST_E2E: "vllm:e2e_request_latency_seconds",
}
TOTALS = {
    semconv.PROMPT_TOKENS: "vllm:prompt_tokens",
    semconv.GENERATED_TOKENS: "vllm:generation_tokens",
    semconv.REQUEST_CACHED: "vllm:prompt_tokens_cached",
    semconv.REQUEST_PREEMPTED: "vllm:num_preemptions",
    semconv.REQUEST_FINISHED: "vllm:request_success",
}
PROMPTS = [[7 * i + j for j in range(20)] for i in range(8)]
SHARED = [list(range(10, 210))] * 2
"""Two equal prompts: the second one is a hit in the prefix cache, if it comes later."""


def scraped(url: str) -> dict[str, float]:
    """A server's counters, and the counts and sums of its histograms, summed over all labels."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(url + "/metrics") as answer:
        for line in answer.read().decode().splitlines():
            name = line.partition("{")[0]
            if name.startswith("vllm:") and name.endswith(("_sum", "_count", "_total")):
                name = name.removesuffix("_total")
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


def in_process(engine: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in engine.llm.get_metrics():
        parts = {"_count": "count", "_sum": "sum"} if hasattr(metric, "sum") else {"": "value"}
        for suffix, field in parts.items():
            if (value := getattr(metric, field, None)) is not None:
                found[metric.name + suffix] = found.get(metric.name + suffix, 0.0) + value
    return found


def agree(profiling: ProfilingContext, generate: Any, theirs: Any) -> None:
    """Run a step with different kinds of requests, and compare vgen's figures with vLLM's."""
    before = theirs()
    with profiling.step(1) as step:
        generate(PROMPTS, Sampling(max_tokens=96, ignore_eos=True, seed=1), 4)
        generate(SHARED[:1], Sampling(max_tokens=2, ignore_eos=True))
        generate(SHARED[1:], Sampling(max_tokens=48, stop_token_ids=tuple(range(8)), seed=2), 4)
    requests = before.get("vllm:request_success", 0.0) + 37
    after = wait_until(lambda: metrics if (metrics := theirs())["vllm:request_success"] >= requests else None)
    vllms = {name: value - before.get(name, 0.0) for name, value in after.items()}
    ours = step.summary()
    for own, name in TOTALS.items():
        assert ours[own.name] == vllms[name], own.name
    assert ours[semconv.REQUEST_FINISHED.name] == 37
    assert ours[semconv.REQUEST_CACHED.name] > 0
    for own, name in SECONDS.items():
        assert ours[own.name + ".count"] == 37, own.name  # each completion counts, also those of the same prompt
        assert vllms[name + "_count"] == 37, name
        assert ours[own.name + ".sum"] == pytest.approx(vllms[name + "_sum"], rel=0.01), own.name
    parts = (semconv.REQUEST_ADMISSION, semconv.REQUEST_QUEUE, semconv.REQUEST_PREFILL, semconv.REQUEST_DECODE)
    whole = sum(ours[part.name + ".sum"] for part in parts)
    assert whole == pytest.approx(ours[semconv.REQUEST_E2E.name + ".sum"])


def test_behind_a_server(server):
    profiling = ProfilingContext([MemorySink()])
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with ServerGeneration(server.model, base_urls=[server.base_url], profiling=profiling, **keys) as generation:
        generation.sync_weights()  # the first sync sends a probe, which must not count
        agree(profiling, generation.generate, lambda: scraped(server.base_url))


def test_in_process(tmp_path):
    profiling = ProfilingContext([MemorySink()])
    settings: dict[str, Any] = {"max_model_length": 512, "engine_kwargs": {"kv_cache_memory_bytes": 64 << 20}}
    # A new engine: vLLM's metrics are those of the process's last engine.
    with ColocateGeneration(tiny_model(tmp_path)[0], profiling=profiling, **settings) as generation:
        generation.sync_weights()  # its verification generates, too
        agree(profiling, generation.generate, lambda: in_process(generation.engine))


def test_a_request_span_has_the_whole_timing(real):
    real.generation.generate(PROMPTS[:1], Sampling(max_tokens=5, ignore_eos=True), 2)
    for span in real.sink.named(semconv.REQUEST):
        own = span.attributes
        parts = (semconv.ADMISSION_SECONDS, semconv.QUEUE_SECONDS, semconv.PREFILL_SECONDS, semconv.DECODE_SECONDS)
        assert sum(own[part] for part in parts) == pytest.approx(own[semconv.E2E_SECONDS])
        assert own[semconv.TPOT_SECONDS] == pytest.approx(own[semconv.DECODE_SECONDS] / 4)
        assert own[semconv.WEIGHT_VERSION] == own[semconv.FIRST_VERSION] == real.generation.weight_version
        assert (own[semconv.INPUT_TOKENS], own[semconv.OUTPUT_TOKENS]) == (20, 5)
        assert own[semconv.PREEMPTIONS] == 0
        if semconv.REBUILT in own:
            assert span.duration == pytest.approx(own[semconv.E2E_SECONDS], abs=1e-6)
