"""`ServerGeneration` with a stock vLLM server in development mode, without vgen's plugin."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
import torch

from vgen import (
    EngineError,
    ProfilingContext,
    Sampling,
    ServerConnection,
    ServerError,
    ServerGeneration,
    WeightSyncError,
)
from vgen.demo import max_logprob_difference
from vgen.engine_protocol import EngineState
from vgen.profiling import semconv
from vgen.testing import MemorySink, stock_server, tiny_model

pytestmark = pytest.mark.slow  # starts a second server

FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "67108864", "--max-model-len", "512", "--dtype", "float32"]
FLAGS += ["--logprobs-mode", "processed_logprobs", "--enable-per-request-metrics", "--enable-prompt-tokens-details"]
FLAGS += ["--api-key", "the-api-key", "--weight-transfer-config", '{"backend": "nccl"}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("served")
    tiny_model(place)
    return str(place)


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with stock_server(folder, arguments=FLAGS, environment={"TORCH_COMPILE_DISABLE": "1"}) as url:
        yield url


@pytest.fixture(scope="module")
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture(scope="module")
def served(url, folder, sink):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    profiling = ProfilingContext([sink])
    keys = dict(api_key="the-api-key", processing_class=tokenizer, connection=ServerConnection(timeout=120.0))
    with ServerGeneration(model, base_urls=[url], profiling=profiling, **keys) as generation:
        yield generation, model


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)


def test_fresh_random_weights_twice_by_the_servers_own_reload(served, sink):
    generation, model = served
    warm = [list(range(100)), "a prompt"]
    for version in ("first", "second"):
        generation.generate(warm, Sampling(max_tokens=4))
        randomize(model)
        assert max_logprob_difference(model, generation.generate(warm, Sampling(max_tokens=8))) > 1e-2
        report = generation.sync_weights(version=version)
        assert report.tensors == 27
        assert report.audited  # by vLLM's definition of the server's model, built beside the trainer
        rollouts = generation.generate(warm, Sampling(max_tokens=24), 3)
        assert max_logprob_difference(model, rollouts) <= 1e-4
    phases = [span.name for span in sink.spans if span.parent is not None and span.parent.name == semconv.WEIGHT_SYNC]
    expected = ("audit", "transfer", "pause", "load", "reset_cache", "resume")
    assert phases[:6] == [f"vgen.weight_sync.{name}" for name in expected]
    assert phases.count("vgen.weight_sync.audit") == 1
    assert sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.PLAN_WAY] == "reload"
    with pytest.raises(ValueError, match="verify must be one of logprobs, none"):
        generation.sync_weights(verify="bits")


def test_a_trained_bias_that_the_server_would_drop_is_refused_before_anything_is_sent(served, sink):
    generation, model = served
    layer = model.model.layers[0].mlp.down_proj
    layer.bias, before = torch.nn.Parameter(torch.randn(layer.out_features)), len(sink.spans)
    with pytest.raises(WeightSyncError, match=r"no place for it \(shape \[128\]") as caught:
        generation.sync_weights()
    assert caught.value.parameter == "model.layers.0.mlp.down_proj.bias"
    assert [span.name for span in sink.spans[before:]] == ["vgen.weight_sync.audit", semconv.WEIGHT_SYNC]
    layer.bias = None
    generation.sync_weights()
    assert max_logprob_difference(model, generation.generate([[1, 2, 3]], Sampling(max_tokens=8))) <= 1e-4


def test_vllms_weight_transfer_engine_needs_a_gpu_on_the_trainers_side(url, served, sink):
    generation, model = served
    assert generation.engine.endpoints[0].backend == "nccl"
    assert sink.named(semconv.WEIGHT_SYNC)[-1].attributes[semconv.TRANSPORT] == "checkpoint"
    keys = dict(base_urls=url, api_key="the-api-key")
    with pytest.raises(EngineError, match=r"takes no weights by ipc: start it with .*weight-transfer-config"):
        ServerGeneration(model, weight_transport="ipc", **keys)
    with (
        ServerGeneration(model, weight_transport="nccl", **keys) as asked,
        pytest.raises(
            WeightSyncError, match=r"phase 'transfer' of http.*: the trainer's model is not on a GPU, as nccl needs"
        ),
    ):
        asked.sync_weights()
    assert max_logprob_difference(model, generation.generate([[1, 2, 3]], Sampling(max_tokens=8))) <= 1e-4


def test_timing_of_every_completion(served):
    generation, _ = served
    rollouts = generation.generate([[1, 2, 3], [4]], Sampling(max_tokens=6, ignore_eos=True), 4)
    for completion in rollouts:
        timing = completion.timing
        assert 0 <= timing.queue < timing.time_to_first_token < timing.e2e
        assert timing.queue + timing.prefill + timing.decode == pytest.approx(timing.e2e)
        assert timing.time_per_output_token == pytest.approx(timing.decode / 5)
    again = generation.generate([list(range(200))] * 2, Sampling(max_tokens=2))
    assert generation.generate([list(range(200))], Sampling(max_tokens=2))[0].timing.cached_tokens > 0
    assert len(again) == 2


def test_one_call_for_a_whole_batch(url, served, folder):
    _, model = served
    with ServerGeneration(
        model, base_urls=url, api_key="the-api-key", connection=ServerConnection(request_timing=False)
    ) as generation:
        rollouts = generation.generate([[i + 1, 5] for i in range(20)], Sampling(max_tokens=5, ignore_eos=True), 2)
    assert max_logprob_difference(model, rollouts) <= 1e-4
    assert [c.timing for c in rollouts] == [None] * 40


def test_sampling_parameters_mean_the_same_as_in_process(served):
    generation, model = served
    greedy = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    (first,) = generation.generate([[1, 2, 3]], greedy)
    ids = [1, 2, 3]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert first.token_ids == ids[3:]
    (top,) = generation.generate([[1, 2, 3]], Sampling(max_tokens=4, logprobs=3))
    for token, position in zip(top.token_ids, top.top_logprobs, strict=True):
        assert token in dict(position)
        assert 3 <= len(position) <= 4
    (bare,) = generation.generate([[1, 2, 3]], Sampling(max_tokens=4, logprobs=None))
    assert bare.logprobs is None
    seeded = Sampling(max_tokens=8, seed=5, ignore_eos=True)
    rollouts = [generation.generate([[1, 2]], seeded, 3) for _ in range(2)]
    assert [c.token_ids for c in rollouts[0]] == [c.token_ids for c in rollouts[1]]
    assert len({tuple(c.token_ids) for c in rollouts[0]}) == 3
    matching = Sampling(max_tokens=20, structured_outputs={"regex": "(ab|cd){2}"})
    (structured,) = generation.generate(["write: "], matching)
    assert len([token for token in structured.token_ids if token < 256]) == 4
    scored = generation.score([[1, 2, 3]], [first.token_ids])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert scored[0] == pytest.approx([logits[2 + i, token].item() for i, token in enumerate(ids[3:])], abs=1e-4)


def test_a_stream_that_is_closed_early_leaves_no_request_behind(served):
    generation, model = served
    stream = generation.stream([[1]] * 16, Sampling(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert max_logprob_difference(model, generation.generate([[1]], Sampling(max_tokens=8))) <= 1e-4


def test_sleep_is_real_on_the_server(url, served):
    generation, _ = served
    generation.sleep(1)
    assert generation.state is EngineState.ASLEEP
    with urllib.request.urlopen(f"{url}/is_sleeping") as answer:
        assert b"true" in answer.read()
    generation.wake_up()
    with urllib.request.urlopen(f"{url}/is_sleeping") as answer:
        assert b"false" in answer.read()
    assert len(generation.generate([[1]], Sampling(max_tokens=2))) == 1


@pytest.mark.parametrize(("change", "says"), [({"vocab_size": 304}, "vocab_size of 272"), ({}, "embedding_dim of 128")])
def test_a_server_with_another_model_is_an_error_that_says_so(url, tmp_path, change, says):
    model, _ = tiny_model(tmp_path, hidden_size=192, num_attention_heads=6, **change)
    with pytest.raises(EngineError, match=f"{says}, and the trainer's model has .*: start it with the trainer's"):
        ServerGeneration(model, base_urls=url, api_key="the-api-key")


def test_a_wrong_key_is_refused_in_the_servers_words(url, served):
    _, model = served
    with pytest.raises(ServerError) as caught:
        ServerGeneration(model, base_urls=url, api_key="another")
    assert caught.value.status == 401
    assert "another" not in str(caught.value)
