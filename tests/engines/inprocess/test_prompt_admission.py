"""Prompts that a stand-in for vLLM accepts or refuses, each by itself."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from vgen import PromptError, Sampling
from vgen.engine_protocol import Batch, Request
from vgen.engines import vllm_prompts
from vgen.engines.inprocess import prompt_admission
from vgen.engines.inprocess.prompt_admission import PROBE_ID, PromptAdmission


class Engine:
    """Refuses prompts that hold 13, and with `refuses` every prompt whose parameters it is true of."""

    def __init__(self):
        config = SimpleNamespace(is_multimodal_model=True, hf_config=SimpleNamespace(image_token_id=7), max_model_len=8)
        self.model_config, self.renderer = config, self
        self.added: dict[str, dict] = {}
        self.rendered = 0
        self.refuses = lambda sampling: False

    def add_request(self, request_id, prompt, parameters, **more):
        self.added[request_id] = more  # vLLM may note a request before it refuses it
        if self.refuses(parameters):
            raise ValueError("these parameters make no sense")
        if 13 in prompt["prompt_token_ids"]:
            raise ValueError("13 brings bad luck")

    def abort_request(self, request_ids):
        for request_id in request_ids:
            self.added.pop(request_id, None)

    def render_cmpl(self, prompts, *, skip_mm_cache):
        assert skip_mm_cache
        self.rendered += 1
        (prompt,) = prompts
        if "broken" in prompt["multi_modal_data"]["image"]:
            raise AssertionError("tokens of the prompt")
        return [{"prompt_token_ids": [*prompt["prompt_token_ids"], *prompt["multi_modal_data"]["image"]]}]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(prompt_admission, "sampling_params", lambda sampling, seed: sampling)
    monkeypatch.setattr(vllm_prompts, "request_errors", lambda: (ValueError,))
    monkeypatch.setattr(vllm_prompts, "prompt_errors", lambda: (ValueError, AssertionError))

    def model_prompt(index, token_ids, images, config):
        prompt = {"prompt_token_ids": list(token_ids)}
        return prompt | {"multi_modal_data": {"image": list(images)}} if images else prompt

    monkeypatch.setattr(vllm_prompts, "model_prompt", model_prompt)
    return Engine()


def batch(*prompts, images=(), generations=1, **sampling):
    requests = [
        Request(i, j, prompt, None, images=images, headers={"traceparent": "x"})
        for i, prompt in enumerate(prompts)
        for j in range(generations)
    ]
    return Batch(requests, Sampling(**sampling), priority=3)


def test_each_prompt_is_accepted_or_refused_by_itself(engine):
    waiting = {}
    refused = PromptAdmission(engine).admit(batch([1], [13], [2], generations=2), None, waiting)
    assert [(each.prompt_index, each.generation_index) for each in refused] == [(1, 0), (1, 1)]
    assert str(refused[0].error) == "prompt 1 was refused by vLLM: 13 brings bad luck"
    assert [request.prompt_index for request in waiting.values()] == [0, 0, 2, 2]
    assert engine.added.keys() == waiting.keys()
    assert all(more["priority"] == 3 and more["trace_headers"] for more in engine.added.values())


def test_parameters_that_no_prompt_could_have_are_an_error_of_the_whole_batch(engine):
    engine.refuses = lambda sampling: sampling.min_p > 0
    with pytest.raises(ValueError, match="vLLM refused the sampling parameters: these parameters make no sense"):
        PromptAdmission(engine).admit(batch([1], min_p=0.5), None, {})
    engine.refuses = lambda sampling: sampling.structured_outputs is not None
    with pytest.raises(ValueError, match=r"vLLM refused Sampling\.structured_outputs: these"):
        PromptAdmission(engine).admit(batch([1], structured_outputs={"regex": "("}), None, {})
    assert engine.added == {}
    assert PROBE_ID not in engine.added


def test_images_are_rendered_once_for_all_completions_of_a_prompt(engine):
    waiting = {}
    assert PromptAdmission(engine).admit(batch([1, 7], images=[5, 5], generations=4), None, waiting) == []
    assert (engine.rendered, len(waiting)) == (1, 4)


def test_a_prompt_that_is_too_long_with_its_images_is_refused_with_the_limit(engine):
    (refused,) = PromptAdmission(engine).admit(batch([1, 7], images=[5] * 6), None, {})
    assert isinstance(refused.error, PromptError)
    assert "has 8 tokens with its images; at most 7" in str(refused.error)
    assert refused.error.limit == 7


def test_the_text_of_an_error_that_may_quote_the_prompt_is_not_repeated(engine):
    (refused,) = PromptAdmission(engine).admit(batch([1, 7], images=["broken"]), None, {})
    assert str(refused.error) == "prompt 0 has images that vLLM could not put in their places (AssertionError)"


def test_requests_without_a_seed_get_one_where_the_engine_would_take_it_from_the_trainers_random_state(
    engine, monkeypatch
):
    asked = []
    monkeypatch.setattr(prompt_admission, "sampling_params", lambda sampling, seed: asked.append(seed))
    for seeds in (None, random.Random(0), random.Random(0)):
        PromptAdmission(engine, seeds).admit(batch([1], [2], generations=2), None, {})
    assert asked[:4] == [None] * 4
    assert len({*asked[4:8]}) == 4
    assert asked[4:8] == asked[8:]  # as the ranks of one tensor-parallel engine need
