"""From prompts to requests and back, with one number for a completion: rank, prompt, generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vgen import ArgumentError, Completion, PromptError, Sampling
from vgen.distributed.ranks import RankPrompt
from vgen.generation.call_plan import CallPlan, CallRequest, make_requests, request_seed
from vgen.types import LoRARequest

PROMPTS = [RankPrompt(0, [1]), RankPrompt(2, [3], ("image",)), RankPrompt(1, [4], rank=1)]


def completion(prompt: int, generation: int, error: PromptError | None = None) -> Completion:
    return Completion(prompt_index=prompt, generation_index=generation, token_ids=[prompt, generation], error=error)


def plan(count: int = 2, errors=(), prompts=([1], [2], [3])) -> CallPlan:
    call = CallRequest([], Sampling(), count, priority=3)
    return CallPlan(list(prompts), dict(errors), make_requests(PROMPTS, count, None), call)


def test_requests_carry_the_callers_numbers_and_seeds_of_their_places_among_all_ranks_prompts():
    requests = make_requests(PROMPTS, 2, 40)
    assert [request.key for request in requests] == [(r, p, g) for r, p in ((0, 0), (0, 2), (1, 1)) for g in (0, 1)]
    seeds = [request.seed for request in requests]
    assert seeds == [request_seed(40, place, generation) for place in range(3) for generation in range(2)]
    assert seeds[0] == 40
    assert len({*seeds, *(request_seed(41, place, generation) for place in range(3) for generation in range(2))}) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    others = [request.seed for request in make_requests(PROMPTS, 2, 40, engine=1)]
    assert len({*seeds, *others}) == 12
    assert [list(request.token_ids) for request in requests] == [[1], [1], [3], [3], [4], [4]]
    assert [request.images for request in requests[1:3]] == [(), ("image",)]
    assert {request.seed for request in make_requests(PROMPTS, 2, None)} == {None}


def test_no_two_of_many_requests_share_a_seed():
    places = [(seed, place, generation) for seed in (1, 11, 111) for place in range(120) for generation in range(12)]
    seeds = {request_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert min(seeds - {1, 11, 111}) > 2**40  # of 63 bits


def test_each_request_gets_its_own_trace_context_or_the_default():
    batch = plan().batch({(1, 1, 0): {"traceparent": "own"}}, {"traceparent": "default"})
    contexts = {request.key: request.headers["traceparent"] for request in batch.requests}
    assert contexts.pop((1, 1, 0)) == "own"
    assert set(contexts.values()) == {"default"}
    assert batch.priority == 3


def test_the_result_is_in_prompt_order_whatever_order_the_engine_answered_in():
    result = plan().result([completion(p, g) for p in (2, 0, 1) for g in (1, 0)], "v")
    assert [c.token_ids for c in result] == [[p, g] for p in range(3) for g in range(2)]
    assert (result.prompt_ids, result.num_generations, result.weight_version) == ([[1], [2], [3]], 2, "v")


def test_refused_prompts_are_marked_whoever_refused_them():
    own, engines = PromptError(1, "is empty"), PromptError(2, "is not to its taste")
    sampled = [completion(0, 0), completion(0, 1), completion(2, 0, engines), completion(2, 1, engines)]
    result = plan(errors={1: own}.items(), prompts=([1], [], [3])).result(sampled, "v")
    assert [c.error for c in result] == [None, None, own, own, engines, engines]
    assert [c.finish_reason for c in result.group(1)] == ["error", "error"]
    assert result.prompt_ids == [[1], [], []]


def test_what_was_not_sampled_is_missing():
    result = plan().result([completion(2, 1)], "v")
    assert [c.token_ids for c in result] == [[2, 1]]


def test_all_options_but_the_cancellation_must_agree_between_ranks():
    lora = LoRARequest(lora_name="a")
    terms = CallRequest([], Sampling(temperature=0.5, seed=3), 4, lora_request=lora, priority=1).terms()
    assert {name: terms[name] for name in ("num_generations", "lora_request", "priority", "temperature", "seed")} == {
        "num_generations": 4,
        "lora_request": lora,
        "priority": 1,
        "temperature": 0.5,
        "seed": 3,
    }
    assert "cancellation" not in terms
    assert "sampling" not in terms


def test_what_a_caller_leaves_out():
    call = CallRequest([], Sampling(), 1)
    assert (call.images, call.lora_request, call.priority, call.refused) == (None, None, 0, "raise")
    assert RankPrompt(0, [1]).rank == 0


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), list(np.array([1, 2])), list(torch.tensor([1, 2])), np.array([1, 2])])
def test_the_token_ids_of_one_prompt_are_no_list_of_prompts(ids):
    with pytest.raises(ArgumentError, match=r"got the token ids of one: pass \[token_ids\]"):
        CallRequest.of(ids, Sampling(), 1)


@pytest.mark.parametrize("prompts", [[], [[1, 2]], ["text"], [np.array([1, 2])], [torch.tensor([1, 2])], ((1, 2),)])
def test_a_list_of_prompts_of_any_kind_is_one(prompts):
    assert len(CallRequest.of(prompts, Sampling(), 1).prompts) == len(prompts)
