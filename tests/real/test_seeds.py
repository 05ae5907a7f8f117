"""Seeds on the real engine: what they give does not depend on how vLLM cuts prompts."""

from __future__ import annotations

import pytest

from vgen import ColocateGeneration, Sampling
from vgen.generation.call_plan import request_seed
from vgen.testing import tiny_model

pytestmark = pytest.mark.slow


def test_seeded_prompts_that_are_prefilled_in_parts(tmp_path):
    pytest.importorskip("vllm")
    model = tiny_model(tmp_path)[0]
    prompts = [[(7 * row + place) % 200 for place in range(90)] for row in range(12)]
    kwargs = {"max_num_batched_tokens": 128, "enable_prefix_caching": False}
    with ColocateGeneration(model, max_model_length=128, max_num_seqs=8, engine_kwargs=kwargs) as generation:
        together = generation.generate(prompts, Sampling(max_tokens=6, seed=3, ignore_eos=True))
        alone = [
            generation.generate([prompt], Sampling(max_tokens=6, seed=request_seed(3, place, 0), ignore_eos=True))[0]
            for place, prompt in enumerate(prompts)
        ]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert len({tuple(each.token_ids) for each in together}) > 6
