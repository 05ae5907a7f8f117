"""What a subject returns is taken in any sequence, and refused in any other form."""

from __future__ import annotations

import math

import pytest
import torch

from vgen.checks.subject import Sampled, WeightSyncSubject, as_float, generate
from vgen.errors import CheckError


class Subject:
    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def sync(self, model):
        pass

    def generate(self, prompts, *, max_tokens, temperature):
        self.asked.append((prompts, max_tokens, temperature))
        return self.answer


def test_prompts_are_lists_and_answers_become_named_tuples():
    subject = Subject([(torch.tensor([1, 2]), torch.tensor([-0.5, -1.0])), ([3, 4], (None, -2.0))])
    first, second = generate(subject, ((5, 6), [7]), 2, 0.0)
    assert subject.asked == [([[5, 6], [7]], 2, 0.0)]
    assert first == Sampled([1, 2], [-0.5, -1.0])
    assert second == Sampled([3, 4], [None, -2.0])
    assert isinstance(subject, WeightSyncSubject)
    assert not isinstance(object(), WeightSyncSubject)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([], "returned 0 completions"),
        ([([1], [0.0])], "returned 1 token ids and 1 log-probabilities for prompt 0: return 2 of each"),
        ([([1, 2], [0.0])], "2 token ids and 1 log-probabilities"),
        ([(["a", "b"], [0.0, 0.0])], "not a list of"),
        (5, "returned int"),
    ],
)
def test_another_form_is_named_with_what_was_asked(answer, says):
    with pytest.raises(CheckError, match=r"generate\(1 prompts, max_tokens=2, temperature=1\)") as caught:
        generate(Subject(answer), [[1]], 2, 1.0)
    assert says in str(caught.value)


def test_none_stands_for_nan_and_zero_for_zero():
    assert math.isnan(as_float(None))
    assert as_float(0) == 0.0
