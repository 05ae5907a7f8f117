"""`ColocateEngine` around a stand-in for vLLM: what it asks of vLLM, and what becomes of its errors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sources import SmallSource

from vgen import EngineError, Generation, MissingExtraError, Sampling, WeightSyncError
from vgen.engine_protocol import Batch, Request
from vgen.engines import vllm_prompts
from vgen.engines.inprocess import prompt_admission
from vgen.engines.inprocess.engine import ColocateEngine


def _flat(token_ids: Sequence[int], logprobs: list[float]) -> SimpleNamespace:
    """Like vLLM's `FlatLogprobs`, with one log-probability for each token."""
    starts = list(range(len(token_ids)))
    ends = [start + 1 for start in starts]
    return SimpleNamespace(token_ids=list(token_ids), logprobs=logprobs, start_indices=starts, end_indices=ends)


class LLM:
    """Answers each request after two steps, with its prompt's own tokens; the request that came last is done first."""

    error: Exception | None = None
    resets = True
    """Whether the caches can be reset."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error
        torch.manual_seed(0)  # as vLLM does
        self.kwargs, self.llm_engine, self.engine_core = kwargs, self, self
        self.model_config = SimpleNamespace(
            max_model_len=64,
            get_vocab_size=lambda: 100,
            dtype=torch.float32,
            quantization=None,
            hf_config=SimpleNamespace(),
            is_multimodal_model=False,
        )
        self.vllm_config = SimpleNamespace(
            lora_config=None,
            cache_config=SimpleNamespace(cache_dtype="auto"),
            parallel_config=SimpleNamespace(world_size=1),
        )
        self.requests: dict[str, list[int]] = {}
        self.calls: list[Any] = []
        self.steps = 0

    def collective_rpc(self, function: Any) -> list[Any]:
        runner = SimpleNamespace(get_model=torch.nn.Module, _sample=None, _bookkeeping_sync=None)
        return [function(SimpleNamespace(model_runner=runner))]

    def set_weight_version(self, version: str) -> None:
        self.calls.append(version)

    def add_request(self, request_id: str, prompt: Any, parameters: Any, **more: Any) -> None:
        self.requests[request_id] = prompt["prompt_token_ids"]

    def abort_request(self, request_ids: list[str]) -> None:
        self.calls.append(("abort", sorted(request_ids)))

    def step(self) -> list[Any]:
        self.steps += 1
        if self.steps % 2:
            return []
        request_id, token_ids = self.requests.popitem()
        return [
            SimpleNamespace(
                request_id=request_id,
                finished=True,
                metrics=None,
                num_cached_tokens=0,
                prompt_logprobs=None,
                outputs=[
                    SimpleNamespace(
                        token_ids=token_ids,
                        finish_reason="stop",
                        weight_versions=[SimpleNamespace(version="3", start=0, end=len(token_ids))],
                        logprobs=_flat(token_ids, [float("nan")] * len(token_ids)),
                    )
                ],
            )
        ]

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache" + " and connector" * reset_connector)
        return self.resets

    def reset_mm_cache(self) -> None:
        self.calls.append("reset_mm_cache")

    def reset_encoder_cache(self) -> None:
        self.calls.append("reset_encoder_cache")

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tags))

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture
def vllm(monkeypatch):
    """Modules in vLLM's place, as far as the engine looks at them."""
    names = ["vllm", "vllm.platforms", "vllm.distributed", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.core"]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    state = SimpleNamespace(_WORLD=None, GroupCoordinator=type("GroupCoordinator", (), {}))
    state.destroy_model_parallel = state.destroy_distributed_environment = lambda: None
    modules["vllm.distributed"].parallel_state = state
    modules["vllm.platforms"].current_platform = SimpleNamespace(device_type="cpu")
    modules["vllm.v1.engine.core"].cleanup_dist_env_and_memory = lambda: None
    modules["vllm"].LLM = type("TestLLM", (LLM,), {})
    monkeypatch.setattr(prompt_admission, "sampling_params", lambda sampling, seed: sampling)
    monkeypatch.setattr(vllm_prompts, "prompt_errors", lambda: (ValueError,))
    return modules["vllm"]


@pytest.fixture
def engine(vllm):
    made = ColocateEngine("a model", weight_version="3", max_num_seqs=5)
    yield made
    made.close()


def batch(count=3) -> Batch:
    return Batch([Request(i, 0, [i, i + 1], None) for i in range(count)], Sampling())


def test_vllm_is_constructed_with_vgens_defaults_and_the_callers_own(engine):
    assert engine.llm.kwargs["max_num_seqs"] == 5
    assert engine.llm.kwargs["logprobs_mode"] == "processed_logprobs"
    assert engine.llm.kwargs["enforce_eager"]
    assert "enable_sleep_mode" not in engine.llm.kwargs  # vLLM for the CPU knows none
    assert (engine.max_model_length, engine.vocabulary_size, engine.dtype) == (64, 100, "float32")
    assert engine.llm.calls == ["3"]


def test_constructing_it_leaves_the_trainers_random_numbers_alone(vllm):
    before = torch.get_rng_state()
    engine = ColocateEngine("a model")
    assert torch.equal(torch.get_rng_state(), before)
    engine.close()


def test_each_completion_comes_when_it_is_done(engine):
    completions = list(engine.stream(batch()))
    assert [completion.prompt_index for completion in completions] == [2, 1, 0]
    assert [completion.token_ids for completion in completions] == [[2, 3], [1, 2], [0, 1]]
    assert completions[0].weight_versions == [("3", 0, 2)]
    assert completions[0].weight_version == "3"
    assert completions[0].logprobs == [None, None]  # NaN


def test_leaving_early_aborts_the_rest(engine):
    stream = engine.stream(batch())
    next(stream)
    stream.close()
    assert engine.llm.calls[-1] == ("abort", ["vgen-1", "vgen-2"])


def test_a_batch_that_is_cancelled_ends_before_the_next_step(engine):
    work = batch()
    work.cancellation.cancel()
    with pytest.raises(asyncio.CancelledError):
        list(engine.stream(work))
    assert engine.llm.steps == 0
    assert engine.llm.calls[-1] == ("abort", ["vgen-1", "vgen-2", "vgen-3"])


@pytest.mark.fault(
    point="the engine in the trainer's process",
    did="The scheduler raises",
    happens="`EngineError` without the text of prompts",
    within=20,
)
def test_a_scheduler_that_breaks_is_an_engine_error_without_its_text(engine, monkeypatch):
    def step():
        raise RuntimeError("tokens of a prompt")

    monkeypatch.setattr(engine.llm, "step", step)
    with pytest.raises(EngineError, match=r"^vLLM failed in a scheduler step: RuntimeError$"):
        list(engine.stream(batch()))


def test_on_a_cpu_sleep_stops_the_scheduler_and_frees_nothing(engine):
    assert engine.sleep(2).memory_freed is False
    assert engine.llm.calls[-2:] == ["reset_prefix_cache", ("sleep", 0)]
    assert engine.wake_up(["weights"]).memory_freed is False
    assert engine.llm.calls[-1] == ("sleep", 0)  # scheduling goes on with the KV cache
    engine.wake_up(["kv_cache"])
    assert engine.llm.calls[-1] == ("wake_up", ["scheduling"])


@pytest.mark.parametrize("resets", [True, False])
def test_a_sync_empties_the_caches_and_the_stores_of_connectors(engine, monkeypatch, resets):
    monkeypatch.setattr(engine, "_load", lambda source, verify: None)
    engine.llm.resets = resets
    with nullcontext() if resets else pytest.raises(WeightSyncError, match="the prefix cache could not be reset"):
        Generation(engine, SmallSource()).sync_weights("4", verify="none")
    caches = ["reset_prefix_cache and connector", "reset_mm_cache", "reset_encoder_cache", "4"]
    assert engine.llm.calls[1:] == (caches if resets else caches[:1])


@pytest.mark.fault(
    point="the engine in the trainer's process",
    did="The engine cannot start",
    happens="`EngineError` says why",
    within=20,
)
def test_an_engine_that_cannot_start_says_why(vllm):
    vllm.LLM.error = ValueError("no such model")
    with pytest.raises(EngineError, match="vLLM could not start 'a model': ValueError: no such model"):
        ColocateEngine("a model")
    vllm.LLM.error = ImportError("no module", name="vllm._C")
    with pytest.raises(MissingExtraError, match=r"vgen\[vllm"):
        ColocateEngine("a model")
    vllm.LLM.error = ImportError("no module", name="other")
    with pytest.raises(ImportError, match="no module"):
        ColocateEngine("a model")
