"""Completions as tensors, compared with what a trainer of TRL builds by hand."""

from __future__ import annotations

import math

import pytest

from vgen import ArgumentError, Completion, Completions

torch = pytest.importorskip("torch")


def completion(prompt_index: int, token_ids: list[int], logprobs=None, **more) -> Completion:
    return Completion(prompt_index=prompt_index, generation_index=0, token_ids=token_ids, logprobs=logprobs, **more)


BATCH = Completions(
    [[5, 6, 7], [8]],
    [
        completion(0, [1, 2], [-0.5, None]),
        completion(0, [3], [-0.25]),
        completion(1, [4, 4, 4], [-1.0, -2.0, -3.0]),
        completion(1, [9], [-0.125]),
    ],
    2,
    "0",
)


def test_rows_are_what_trls_pad_makes_of_them():
    pad = pytest.importorskip("trl.trainer.utils").pad
    batch = BATCH.padded(0)
    prompts = [torch.tensor(BATCH.prompt_ids[each.prompt_index]) for each in BATCH]
    sampled = [torch.tensor(each.token_ids) for each in BATCH]
    prompt_ids = pad(prompts, padding_value=0, padding_side="left")
    completion_ids = pad(sampled, padding_value=0, padding_side="right")
    prompt_mask = pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left")
    completion_mask = pad([torch.ones_like(ids) for ids in sampled], padding_value=0, padding_side="right")
    assert torch.equal(batch.prompt_ids, prompt_ids)
    assert torch.equal(batch.completion_ids, completion_ids)
    assert torch.equal(batch.completion_mask, completion_mask)
    assert torch.equal(batch.attention_mask, torch.cat([prompt_mask, completion_mask], dim=1))
    assert torch.equal(batch.input_ids, torch.cat([prompt_ids, completion_ids], dim=1))
    assert {each.dtype for each in batch[:4]} == {torch.int64}


def test_log_probabilities_are_zero_in_the_padding_and_nan_where_the_engines_were():
    logprobs = BATCH.padded(0).logprobs
    assert logprobs.dtype == torch.float32
    assert logprobs[1:].tolist() == [[-0.25, 0.0, 0.0], [-1.0, -2.0, -3.0], [-0.125, 0.0, 0.0]]
    first = logprobs[0].tolist()
    assert (first[0], math.isnan(first[1]), first[2]) == (-0.5, True, 0.0)


def test_padding_has_the_id_that_was_asked_for():
    batch = BATCH.padded(77)
    assert batch.prompt_ids[2].tolist() == [77, 77, 8]
    assert batch.completion_ids[3].tolist() == [9, 77, 77]


def test_what_has_no_log_probabilities_has_none():
    plain = Completions([[5]], [completion(0, [1, 2])], 1, "0")
    assert plain.padded(0).logprobs is None


def test_a_refused_prompt_is_padding_only_and_nothing_is_a_batch_of_no_rows():
    refused = Completions([[5], []], [completion(0, [1]), completion(1, [], None, finish_reason="error")], 1, "0")
    assert refused.padded(0).attention_mask.tolist() == [[1, 1], [0, 0]]
    nothing = Completions([], [], 1, "0").padded(0)
    assert nothing.input_ids.shape == (0, 0)


def test_a_pad_token_that_is_no_token_is_refused():
    with pytest.raises(ArgumentError, match="pad_token_id"):
        BATCH.padded(None)
