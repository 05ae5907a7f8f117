"""vgen's figures of requests are vLLM's own, of the same run, in process and behind a server."""

from __future__ import annotations

import time
import urllib.request
from typing import Any

import pytest

from vgen import ColocateGeneration, ProfilingContext, Sampling, ServerGeneration
from vgen.profiling import names
from vgen.testing import MemorySink, tiny_model

SECONDS = {
    names.REQUEST_QUEUE: "vllm:request_queue_time_seconds",
    names.REQUEST_PREFILL: "vllm:request_prefill_time_seconds",
    names.REQUEST_DECODE: "vllm:request_decode_time_seconds",
    names.REQUEST_TTFT: "vllm:time_to_first_token_seconds",
    names.REQUEST_TPOT: "vllm:request_time_per_output_token_seconds",
    names.REQUEST_E2E: "vllm:e2e_request_latency_seconds",
}
TOTALS = {
    names.PROMPT_TOKENS: "vllm:prompt_tokens",
    names.GENERATED_TOKENS: "vllm:generation_tokens",
    names.REQUEST_CACHED: "vllm:prompt_tokens_cached",
    names.REQUEST_PREEMPTED: "vllm:num_preemptions",
    names.REQUEST_FINISHED: "vllm:request_success",
}
PROMPTS = [[7 * i + j for j in range(20)] for i in range(8)]
SHARED = [list(range(10, 210))] * 2
"""The second finds what the first has left in the prefix cache, where it comes later."""


def scraped(url: str) -> dict[str, float]:
    """A server's counters, and its histograms' counts and sums, over all labels."""
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
    """Run a step of many kinds of requests and compare what both sides say of it."""
    before = theirs()
    with profiling.step(1) as step:
        generate(PROMPTS, Sampling(max_tokens=96, ignore_eos=True, seed=1), 4)
        generate(SHARED[:1], Sampling(max_tokens=2, ignore_eos=True))
        generate(SHARED[1:], Sampling(max_tokens=48, stop_token_ids=tuple(range(8)), seed=2), 4)
    after, deadline = theirs(), time.monotonic() + 10
    while after["vllm:request_success"] - before.get("vllm:request_success", 0.0) < 37 and time.monotonic() < deadline:
        time.sleep(0.1)
        after = theirs()
    vllms = {name: value - before.get(name, 0.0) for name, value in after.items()}
    ours = step.summary()
    for own, name in TOTALS.items():
        assert ours[own.name] == vllms[name], own.name
    assert ours[names.REQUEST_FINISHED.name] == 37
    assert ours[names.REQUEST_CACHED.name] > 0
    for own, name in SECONDS.items():
        assert ours[own.name + ".count"] == 37, own.name  # every completion by itself, siblings too
        assert vllms[name + "_count"] == 37, name
        assert ours[own.name + ".sum"] == pytest.approx(vllms[name + "_sum"], rel=0.01), own.name
    parts = (names.REQUEST_ADMISSION, names.REQUEST_QUEUE, names.REQUEST_PREFILL, names.REQUEST_DECODE)
    whole = sum(ours[part.name + ".sum"] for part in parts)
    assert whole == pytest.approx(ours[names.REQUEST_E2E.name + ".sum"])


def test_behind_a_server(server):
    profiling = ProfilingContext([MemorySink()])
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with ServerGeneration(server.model, base_urls=[server.base_url], profiling=profiling, **keys) as generation:
        generation.sync_weights()  # the first sends a probe of its own
        agree(profiling, generation.generate, lambda: scraped(server.base_url))


def test_in_process(tmp_path):
    profiling = ProfilingContext([MemorySink()])
    settings: dict[str, Any] = {"max_model_length": 512, "engine_kwargs": {"kv_cache_memory_bytes": 64 << 20}}
    # its own: vLLM's metrics are those of the process's last engine
    with ColocateGeneration(tiny_model(tmp_path)[0], profiling=profiling, **settings) as generation:
        agree(profiling, generation.generate, lambda: in_process(generation.engine))


def test_a_request_says_all_of_itself(real):
    real.generation.generate(PROMPTS[:1], Sampling(max_tokens=5, ignore_eos=True), 2)
    for span in real.sink.named(names.REQUEST):
        own = span.attributes
        parts = (names.ADMISSION_SECONDS, names.QUEUE_SECONDS, names.PREFILL_SECONDS, names.DECODE_SECONDS)
        assert sum(own[part] for part in parts) == pytest.approx(own[names.E2E_SECONDS])
        assert own[names.TPOT_SECONDS] == pytest.approx(own[names.DECODE_SECONDS] / 4)
        assert own[names.WEIGHT_VERSION] == own[names.FIRST_VERSION] == real.generation.weight_version
        assert (own[names.INPUT_TOKENS], own[names.OUTPUT_TOKENS]) == (20, 5)
        assert own[names.PREEMPTIONS] == 0
        if names.REBUILT in own:
            assert span.duration == pytest.approx(own[names.E2E_SECONDS], abs=1e-6)
