"""`Sampling` refuses values out of range and names the field; `Completions` groups by prompt."""

from __future__ import annotations

import math

import pytest

from vgen import Completion, Completions, Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", 300),
        ("logprobs", -1),
        ("seed", -1),
        ("extra", {"n": 4}),
    ],
)
def test_a_value_outside_its_range_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"Sampling\.{field} must be"):
        Sampling(**{field: value})


def test_the_limits_of_the_ranges_are_valid():
    Sampling(temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, max_tokens=1, logprobs=None, presence_penalty=-2.0)


def test_completions_of_a_prompt_are_a_group():
    made = [Completion(prompt_index=p, generation_index=g, token_ids=[p, g]) for p in range(3) for g in range(2)]
    completions = Completions([[1], [2], [3]], made, 2, "v")
    assert len(completions) == 6
    assert [c.generation_index for c in completions.group(1)] == [0, 1]
    assert {c.prompt_index for c in completions.group(-1)} == {2}
    assert completions.output_tokens == 12
    with pytest.raises(IndexError):
        completions.group(3)
