"""Comparisons bit by bit, and searches for what is not finite, whose results are read together."""

from __future__ import annotations

import pytest
import torch

from vgen.weights.verification import bit_check
from vgen.weights.verification.bit_check import Differences, NotFinite, differs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex64])
@pytest.mark.fault(
    point="verification of weights",
    did="One element differs",
    happens="It is found in every dtype",
    within=20,
)
def test_one_element_that_differs_is_enough_in_every_dtype(dtype):
    place = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(dtype)
    value = place.clone()
    assert not differs(place, value)
    value.view(-1)[-1] = 1
    assert differs(place, value)


def test_bits_count_and_not_values():
    assert differs(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not differs(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not differs(torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.5]))  # in the dtype of the place


def test_large_tensors_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(bit_check, "MOST_ELEMENTS", 4)
    place = torch.arange(30.0).reshape(10, 3)
    assert not differs(place, place.clone())
    assert differs(place, place + torch.eye(10, 3))


def test_names_come_once_and_in_order():
    results = Differences()
    for name, value in (("b", 1.0), ("a", 0.0), ("c", 1.0), ("b", 1.0)):
        results.compare(name, torch.zeros(2), torch.full((2,), value))
    assert results.names() == ("b", "c")
    assert Differences().names() == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinities_are_not_finite(dtype):
    results = NotFinite()
    for name, value in (("fine", 1.0), ("nan", float("nan")), ("plus", float("inf")), ("minus", float("-inf"))):
        results.check(name, torch.tensor([0.0, value, 2.0]).to(dtype))
    results.check("indices", torch.arange(3))
    results.check("empty", torch.empty(0))
    assert results.names() == ("nan", "plus", "minus")


def test_a_row_that_is_too_large_by_itself_is_compared_whole(monkeypatch):
    monkeypatch.setattr(bit_check, "MOST_ELEMENTS", 2)
    place = torch.arange(9.0).reshape(3, 3)
    assert not differs(place, place.clone())
    assert differs(place, place + torch.eye(3))
    assert differs(place[:1], place[:1] + 1)
