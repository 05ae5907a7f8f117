"""Models with PEFT adapters and mixtures of experts on real vLLM: after a sync, engine and trainer agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from peft import LoraConfig, get_peft_model

from vgen import ColocateGeneration, Sampling
from vgen.demo import max_logprob_difference
from vgen.testing import tiny_model
from vgen.weights.source.adapter_export import adapter_of

PROMPTS = [[1, 2, 3, 4, 5], list(range(40)), [7]]
SAMPLING = Sampling(max_tokens=16, ignore_eos=True)
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20}

pytestmark = pytest.mark.slow  # these tests start engines


def randomize(model: Any, only: str = "", scale: float = 0.05) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.copy_(torch.randn_like(parameter) * scale)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ColocateGeneration]]:
    """A Qwen2 with LoRA on every linear layer, and an engine with LoRA enabled."""
    base, tokenizer = tiny_model(tmp_path_factory.mktemp("model"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    randomize(model, "lora_", 0.3)
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    with ColocateGeneration(
        model, processing_class=tokenizer, max_model_length=128, engine_kwargs=SMALL | lora
    ) as generation:
        yield model, generation


def test_adapters_are_merged_before_the_first_generation_and_at_each_sync(adapted):
    model, generation = adapted
    assert max_logprob_difference(model, generation.generate(PROMPTS, SAMPLING)) <= 1e-4
    for _ in range(2):
        stale = generation.generate(PROMPTS, SAMPLING)
        randomize(model, "lora_", 0.3)
        assert max_logprob_difference(model, stale) > 1e-2
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generation.sync_weights()
        assert max_logprob_difference(model, generation.generate(PROMPTS, SAMPLING)) <= 1e-4
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_alone_is_loaded_over_the_base_weights(adapted, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, generation = adapted
    with model.disable_adapter():
        generation.sync_weights()  # the base model only
        assert max_logprob_difference(model, generation.generate(PROMPTS, SAMPLING)) <= 1e-4
    llm = generation.engine.llm
    for _ in range(2):
        randomize(model, "lora_", 0.3)
        adapter_of(model).save(tmp_path)
        request = LoRARequest("policy", 1, lora_path=str(tmp_path), load_inplace=True)
        assert llm.llm_engine.add_lora(request)
        llm.reset_prefix_cache()
        use = LoRARequest("policy", 1, lora_path=str(tmp_path))
        asked = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0, detokenize=False, seed=3)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], asked, lora_request=use, use_tqdm=False
        )
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            (found,) = output.outputs
            ids = torch.tensor([prompt + list(found.token_ids)])
            with torch.no_grad():
                own = model(ids).logits[0].log_softmax(-1)
            for i, (token, at) in enumerate(zip(found.token_ids, found.logprobs, strict=True)):
                assert at[token].logprob == pytest.approx(own[len(prompt) - 1 + i, token].item(), abs=1e-4)
    with model.disable_adapter():
        assert (
            max_logprob_difference(model, generation.generate(PROMPTS, SAMPLING)) <= 1e-4
        )  # without the adapter, the base model


def test_a_mixture_of_experts_is_synced_with_checkpoint_names():
    # In a new process: vLLM cannot start such an engine in a process that had one without experts.
    worker = Path(helpers.__file__).with_name("moe_worker.py")
    done = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tensors"] == 2 * (8 * 3 + 9) + 3
    assert max(found["differences"]) <= 1e-3, found
    assert min(found["stale"]) > 1e-2, found
