"""Many copies at once: in groups, and as moves of bytes."""

from __future__ import annotations

import torch

from vgen.weights.load.batched_copy import LEAST_RUN, batched_copy_of, copy_pairs, group_pairs, moves_of


def test_adjacent_copies_are_joined_and_rows_are_cut():
    experts, engine = torch.randn(4, 6, 256), torch.zeros(4, 6, 256)
    pairs = [(engine[e, half : half + 3], experts[e, half : half + 3]) for e in range(4) for half in (0, 3)]
    moves, others = moves_of(pairs[::-1])
    assert moves == [(engine.data_ptr(), experts.data_ptr(), experts.numel() * 4)]
    assert others == []
    columns = torch.zeros(6, 128)
    moves, others = moves_of([(columns, experts[0, :, 128:])])  # half of each row, as tensor parallelism takes it
    assert [(to - columns.data_ptr(), of - experts.data_ptr(), size) for to, of, size in moves] == [
        (row * 512, row * 1024 + 512, 512) for row in range(6)
    ]
    mixed = (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3))
    assert moves_of([mixed]) == ([], [mixed])


def test_pairs_of_the_same_dtypes_are_copied_in_one_call():
    values = [torch.randn(3), torch.randn(2, 2), torch.arange(4), torch.randn(3)]
    places = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(3).double()]
    pairs = list(zip(places, values, strict=True))
    assert sorted(len(group[0]) for group in group_pairs(pairs)) == [1, 1, 2]
    copy_pairs(pairs)
    assert all(torch.equal(place, value.to(place.dtype)) for place, value in pairs)


def test_short_rows_are_left_to_torch():
    floats = LEAST_RUN // 4
    for columns, moves in ((floats, 3), (floats - 1, 0)):
        pair = torch.zeros(3, columns), torch.randn(3, 2 * floats)[:, :columns]
        found, others = moves_of([pair])
        assert (len(found), len(others)) == (moves, not moves)


def test_on_a_cpu_there_is_no_batched_copy():
    assert batched_copy_of([(torch.zeros(2), torch.ones(2))]) is None
