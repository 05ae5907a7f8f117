"""Two trainer ranks on the CPU, with an engine each, or with one tensor-parallel engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.torchrun import on_two_ranks

from vgen.testing import tiny_model


@pytest.fixture
def crashed() -> Iterator[None]:
    """vLLM's shared memory as a run of two tensor-parallel ranks once left it when it crashed."""
    names = [Path("/dev/shm", f"-tp:0-[0-1]-cpushm_{rank}") for rank in (0, 1)]
    for name in names:
        name.write_bytes(bytes(64))
    yield
    for name in names:
        name.unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("crashed")
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_each_rank_gets_its_own_completions(tmp_path, tensor_parallel_size):
    tiny_model(tmp_path / "model")
    zero, one = on_two_ranks("ranks_worker.py", [str(tmp_path / "model"), str(tensor_parallel_size)], tmp_path)
    assert zero["lengths"] == [8, 8, 0, 0, 8, 8]  # the two completions of the refused prompt are marked
    assert one["lengths"] == [8, 8]
    assert zero["prompt_ids"] == [[1, 2, 3], [], [4, 5]]
    assert one["prompt_ids"] == [[9, 8, 7, 6]]
    assert zero["done"] == [0, 0, 2, 2]
    assert one["done"] == [0, 0]
    assert (zero["after"], one["after"]) == (1, 0)
    for rank, found in enumerate((zero, one)):
        assert found["difference"] <= 1e-4
        assert found["span_ranks"] == [rank]
        assert found["group_kept"]
        assert found["left_by_a_crash"] == ["-tp:0-[0-1]-cpushm_0", "-tp:0-[0-1]-cpushm_1"]  # and nothing of this run
    # Ranks whose trainers have the same seed sample differently.
    assert zero["same"] != one["same"]
