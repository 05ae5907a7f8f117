"""Cases of engines with other options, dtypes and architectures: each makes an engine of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .elsewhere import own_engine, run_elsewhere
from .session import Bench, Case

_CYCLE = ("fresh sync", "the check sees a stale layer", "second and third sync", "warm prefix cache", "greedy tokens")
_SLEEPS = ("sleep level 1", "sleep level 2 and three syncs")


def _with_options(dtype: str | None = None, **options: Any) -> Callable[[Bench], None]:
    """Three syncs in an engine with these options of `ColocateGeneration`, and one after each level of sleep."""

    def run(bench: Bench) -> None:
        model = bench.variant(seed=20)
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        with bench.fresh(model, **options) as other:
            for number in range(3):
                other.train()
                other.sync()
                other.expect_right(f"sync {number + 1}")
            other.expect_right("greedy decoding", other.generate(temperature=0.0))
            for level in (1, 2):
                other.sleep(level)
                other.train()
                other.wake_up()
                other.sync()
                other.expect_right(f"the sync after a sleep of level {level}")

    return run


def _elsewhere(architecture: str, dtype: str = "float32", cases: tuple[str, ...] = _CYCLE + _SLEEPS) -> Any:
    """The same cases on another architecture, in a process of its own."""

    def run(bench: Bench) -> None:
        run_elsewhere(bench, architecture, dtype, cases)

    return run


def _decode_graphs(bench: Bench) -> None:
    """Decode with CUDA graphs over five syncs, with batches of several sizes."""
    model = bench.variant(seed=21)
    with bench.fresh(model, engine_kwargs={"enforce_eager": False}) as other:
        for number, size in enumerate((8, 1, 3, 5, 8)):
            other.train()
            other.sync()
            prompts = bench.session.prompts[:size]
            other.expect_right(f"sync {number + 1}, {size} at once", other.generate(32, 1.0, prompts), prompts)


def _moved_tensor(bench: Bench) -> None:
    """A tensor that the kernels read is moved behind the engine's back: the next sync is right, or refused."""
    model = bench.variant(seed=22)
    with bench.fresh(model) as other:
        other.sync()
        generation: Any = other.subject.generation
        worker = generation.engine.llm.llm_engine.model_executor.driver_worker.worker
        parameters = list(worker.get_model().parameters())
        parameters[-1].data = parameters[-1].data.clone()
        other.train()
        other.expect_right_or_refused("a tensor at another address")
        bench.note = other.note


def _offloading(bench: Bench) -> None:
    """Keys and values offloaded to host memory: a warm prompt after a sync is computed by new weights."""
    model = bench.variant(seed=23)
    with bench.fresh(model, engine_kwargs={"kv_offloading_size": 1.0}) as other:
        for number in range(3):
            other.train()
            other.sync()
            for _ in range(2):
                other.generate()
            other.expect_right(f"sync {number + 1}")


def _summary(function: Callable[[Bench], None]) -> str:
    return " ".join((function.__doc__ or "").split())


_NEW = ("in process", "more engines", "vgen")
_ELSEWHERE = ("other architectures",)
_MOVED = "after a reload kernels or graphs read tensors at old addresses, or scales and derived matrices of old weights"
_KEEP = "put tensors back at their addresses after the reload, and compute derived ones anew"
_TABLE: list[tuple[str, str, Callable[[Bench], None], tuple[str, ...]]] = [
    ("a trainer in float32, an engine in bfloat16", "The weights are rounded on their way.",
     _with_options(engine_kwargs={"dtype": "bfloat16"}), _NEW),
    ("an engine in bfloat16", "Trainer and engine in bfloat16, three syncs and both sleeps.",
     _with_options("bfloat16"), _NEW),
    ("an engine without prefix caching", "`enable_prefix_caching=False`.",
     _with_options(engine_kwargs={"enable_prefix_caching": False}), _NEW),
    ("prefill in chunks", "`enable_chunked_prefill` with 64 tokens a step.",
     _with_options(engine_kwargs={"enable_chunked_prefill": True, "max_num_batched_tokens": 64}), _NEW),
    ("one sequence at a time", "`max_num_seqs=1`.",
     _with_options(max_num_seqs=1), _NEW),
    ("a mixture of experts", "Qwen3-MoE.", _elsewhere("qwen3_moe"), _ELSEWHERE),
    ("a hybrid of attention and state space", "Falcon-H1.", _elsewhere("falcon_h1"), _ELSEWHERE),
    ("a state-space model", "Mamba-2.", _elsewhere("mamba2"), _ELSEWHERE),
    ("a tied head under another name", "Gemma-2, whose class in vLLM has no output head.", _elsewhere("gemma2"),
     _ELSEWHERE),
    ("biases in attention", "Qwen2.", _elsewhere("qwen2"), _ELSEWHERE),
    ("decode graphs over five syncs", _summary(_decode_graphs), _decode_graphs, (*_NEW, "CUDA")),
    ("a tensor moved behind the engine's back", _summary(_moved_tensor), _moved_tensor,
     (*_NEW, "CUDA")),
    ("KV offloading", _summary(_offloading), _offloading, (*_NEW, "CUDA")),
    ("an engine in float16", "Trainer and engine in float16.",
     _with_options("float16"), (*_NEW, "CUDA")),
    ("without graphs", "`enforce_eager=True`.",
     _with_options(engine_kwargs={"enforce_eager": True}), (*_NEW, "CUDA")),
    ("online fp8", "`quantization='fp8'`: every sync quantizes anew.",
     _with_options("bfloat16", engine_kwargs={"quantization": "fp8"}), (*_NEW, "CUDA")),
    ("an fp8 KV cache", "`kv_cache_dtype='fp8'`, whose scales a wake-up may reset.",
     _with_options("bfloat16", engine_kwargs={"kv_cache_dtype": "fp8"}), (*_NEW, "CUDA")),
    ("a mixture of experts in bfloat16", "Qwen3-MoE.", _elsewhere("qwen3_moe", "bfloat16"),
     (*_ELSEWHERE, "CUDA")),
    ("Mixtral in bfloat16", "Experts under Mixtral's names.", _elsewhere("mixtral", "bfloat16"),
     (*_ELSEWHERE, "CUDA")),
    ("latent attention", "DeepSeek-V2, whose matrices are derived after loading.",
     _elsewhere("deepseek_v2", "bfloat16"), (*_ELSEWHERE, "CUDA")),
    ("latent attention with biased routing", "DeepSeek-V3.", _elsewhere("deepseek_v3", "bfloat16"),
     (*_ELSEWHERE, "CUDA")),
    ("shared experts", "GLM-4-MoE.", _elsewhere("glm4_moe", "bfloat16"), (*_ELSEWHERE, "CUDA")),
    ("attention sinks", "gpt-oss.", _elsewhere("gpt_oss", "bfloat16"), (*_ELSEWHERE, "CUDA")),
    ("a hybrid model in bfloat16", "Falcon-H1.", _elsewhere("falcon_h1", "bfloat16"), (*_ELSEWHERE, "CUDA")),
    ("Jamba", "Attention, state space and experts.", _elsewhere("jamba", "bfloat16"), (*_ELSEWHERE, "CUDA")),
    ("sliding windows", "Gemma-3.", _elsewhere("gemma3_text", "bfloat16"), (*_ELSEWHERE, "CUDA")),
]  # fmt: skip
ENGINE_CASES = [
    own_engine(Case(name, summary, run, _MOVED, _KEEP, frozenset(needs)))
    if "more engines" in needs
    else Case(name, summary, run, _MOVED, _KEEP, frozenset(needs))
    for name, summary, run, needs in _TABLE
]
