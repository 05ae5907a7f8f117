"""Whether every byte of a destination is written once: which sets of copies and constants are accepted."""

from __future__ import annotations

import random

import pytest
import torch

from vgen.weights.load import tensor_accounting
from vgen.weights.load.load_recorder import ConstantFill, SliceCopy, TensorSlice
from vgen.weights.load.tensor_accounting import Spans, replay_problem, runs, superseded

PART = TensorSlice(torch.float32, (1,), (1,), 0)


def copies(*places):
    return [(order, SliceCopy("a", PART, place, 0)) for order, place in enumerate(places)]


def fill(place, after=0):
    return ConstantFill(place, 0.0, 0, after)


def test_parts_in_any_order_that_cover_everything_are_accepted():
    target = torch.zeros(6, 4)
    assert replay_problem(target, copies(target[2:], target[:2]), []) is None
    assert replay_problem(target, copies(*target.split(1, dim=1)), []) is None
    assert replay_problem(target.t(), copies(target), []) is None
    assert replay_problem(target, copies(target[:5]), [fill(target[5:])]) is None
    assert replay_problem(target, copies(target), [fill(target)]) is None  # constants first, everything over them
    assert replay_problem(target, [], [fill(target)]) is None


@pytest.mark.parametrize(
    ("problem", "parts", "constants"),
    [
        ("nothing is loaded", [], []),
        ("a part of it is not loaded", [slice(0, 5)], []),
        ("a part of it is not loaded", [slice(0, 2), slice(3, 6)], []),
        ("written twice", [slice(0, 4), slice(3, 6)], []),
        ("a constant is written over", [slice(0, 6)], [(slice(5, 6), 1)]),
    ],
)
def test_everything_else_is_refused(problem, parts, constants):
    target = torch.zeros(6, 4)
    fills = [fill(target[rows], after) for rows, after in constants]
    assert problem in (replay_problem(target, copies(*(target[rows] for rows in parts)), fills) or "")


def test_repacked_or_gappy_destinations_and_too_many_pieces_are_refused(monkeypatch):
    assert replay_problem(torch.zeros(0), copies(torch.zeros(0)), []) == "the engine has repacked it"
    gaps = torch.zeros(4, 4)[:, :3]
    assert replay_problem(gaps, copies(gaps), []) == "it has gaps"
    monkeypatch.setattr(tensor_accounting, "MOST_RUNS", 3)
    target = torch.zeros(4, 4)
    assert replay_problem(target, copies(target[:, :2], target[:, 2:]), []) == "it is loaded in 4 separate pieces"


def test_runs_are_the_contiguous_pieces_in_order():
    whole = torch.zeros(4, 6, dtype=torch.int16)
    assert [runs(whole)[0].tolist(), runs(whole)[1]] == [[whole.data_ptr()], 48]
    starts, length = runs(whole[::2, 3:])
    assert (starts - whole.data_ptr()).tolist() == [6, 30]
    assert length == 6


def test_a_copy_is_superseded_by_a_later_one_into_the_same_slice():
    target = torch.zeros(4, 4)
    made = [copy for _, copy in copies(target[:2], target[2:], target[:2], target[:1], target[:2])]
    assert superseded(made) == {0, 2}


def random_view(tensor: torch.Tensor, random: random.Random) -> torch.Tensor:
    """A view of it by a few random operations, which may have gaps, steps, or elements that repeat."""
    for _ in range(random.randrange(4)):
        dim = random.randrange(tensor.dim()) if tensor.dim() else 0
        match random.randrange(6):
            case 0 if tensor.dim():
                start = random.randrange(tensor.shape[dim] + 1)
                tensor = tensor.narrow(dim, start, random.randrange(tensor.shape[dim] - start + 1))
            case 1 if tensor.dim() > 1:
                tensor = tensor.transpose(dim, random.randrange(tensor.dim()))
            case 2 if tensor.dim() and tensor.shape[dim]:
                tensor = tensor.select(dim, random.randrange(tensor.shape[dim]))
            case 3 if tensor.dim():
                tensor = tensor[(slice(None),) * dim + (slice(random.randrange(2), None, random.randrange(1, 4)),)]
            case 4:
                tensor = tensor.unsqueeze(0).expand(random.randrange(1, 3), *tensor.shape)
            case 5 if tensor.dim() and tensor.shape[dim] > 2:
                tensor = tensor.unfold(dim, 2, 1)
    return tensor


def bytes_of(tensor: torch.Tensor) -> set[int]:
    """The same by brute force: the offset of every byte of every element."""
    size, offsets = tensor.element_size(), [int(tensor.storage_offset())]
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = [offset + index * stride for offset in offsets for index in range(length)]
    return {offset * size + byte for offset in offsets for byte in range(size)}


@pytest.mark.parametrize("seed", range(60))
def test_spans_are_sets_of_bytes(seed):
    chance = random.Random(seed)
    dtype = chance.choice([torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
    shape = [chance.randrange(1, 6) for _ in range(chance.randrange(1, 5))]
    whole = torch.empty(shape, dtype=dtype, device="meta")
    item = whole.element_size()
    views = [random_view(whole, chance) for _ in range(6)]
    sets = [bytes_of(view) for view in views]
    for view, expected in zip(views, sets, strict=True):
        spans = Spans.of(view)
        assert bool(spans) == bool(expected)
        assert spans.elements(item) == len(expected) // item
        if expected:
            assert spans.bounds() == (min(expected), max(expected) + 1)
        for other, other_bytes in zip(views, sets, strict=True):
            assert Spans.of(view).covers(Spans.of(other)) == (other_bytes <= expected)
            assert Spans.of(view).within(Spans.of(other)).elements(1) == len(expected & other_bytes)
    assert Spans.union(map(Spans.of, views)).elements(1) == len(set.union(*sets))
    grown = Spans()
    for view in views:
        grown.add(Spans.of(view))
        grown.add(Spans.of(view))
    assert grown.elements(1) == len(set.union(*sets))


def test_spans_of_a_copy_are_those_of_the_elements_that_it_was_made_of():
    source = torch.empty(6, 8, dtype=torch.bfloat16, device="meta")[2:]
    copy = torch.empty(4, 8, dtype=torch.float64, device="meta")
    part = Spans.of(copy[1:3, 2:4]).as_of(copy, source)
    expected = Spans.of(source[1:3, 2:4])
    assert part.covers(expected)
    assert expected.covers(part)
