"""What a real engine starts from: the trainer's model as it is now, which stays as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.small_models import PROMPTS
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from vgen import ColocateGeneration, Sampling
from vgen.demo import max_logprob_difference
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import MemorySink

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 9, 33, 120, 77, 3]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A GPT-NeoX, which vLLM for a CPU builds from the classes of transformers, loaded and changed in memory."""
    folder = tmp_path_factory.mktemp("neox")
    shape = dict(vocab_size=272, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    config = GPTNeoXConfig(**shape, max_position_embeddings=256, eos_token_id=256, bos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a resumed run
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.gpt_neox.layers = model.gpt_neox.layers[:2]
    model.config.num_hidden_layers = 2
    generation_config = model.generation_config
    generation_config.eos_token_id = [256, 7]
    generation_config.repetition_penalty, generation_config.do_sample, generation_config.top_k = 3.0, True, 1
    before, sink = logits(model), MemorySink()
    options = dict(max_model_length=128, profiling=ProfilingContext([sink]))
    with ColocateGeneration(model, engine_kwargs={"kv_cache_memory_bytes": 16 << 20}, **options) as generation:
        yield SimpleNamespace(model=model, before=before, generation=generation, sink=sink)


def test_the_trainers_model_computes_bit_for_bit_what_it_did_and_more_can_be_made(started):
    assert torch.equal(logits(started.model), started.before)
    more = AutoModelForCausalLM.from_config(started.model.config).float().eval()
    more.load_state_dict(started.model.state_dict())
    assert torch.equal(logits(more), started.before)
    assert "vllm" not in str(type(started.model.gpt_neox).__mro__)


def test_the_first_generation_has_the_weights_and_the_configuration_of_the_model(started):
    rollouts = started.generation.generate(PROMPTS, Sampling(max_tokens=16, ignore_eos=True))
    assert max_logprob_difference(started.model, rollouts) <= 1e-4
    (sync,) = started.sink.named(semconv.WEIGHT_SYNC)
    assert sync.attributes[semconv.WEIGHT_VERSION] == "0"


@pytest.mark.parametrize("token", [256, 7])
def test_a_completion_ends_at_each_end_of_sequence_token_of_the_model(started, token):
    always = Sampling(max_tokens=20, logprobs=None, extra={"logit_bias": {token: 100.0}})
    (completion,) = started.generation.generate([[1, 2, 3]], always)
    assert (completion.token_ids, completion.finish_reason) == ([token], "stop")
