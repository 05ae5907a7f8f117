"""Two trainer ranks on the CPU: an engine each, or one engine that both are the workers of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vgen.testing import tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_each_rank_gets_its_own_completions(tmp_path, tensor_parallel_size):
    tiny_model(tmp_path / "model")
    worker = Path(__file__).with_name("ranks_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    command += [str(tmp_path / "model"), str(tensor_parallel_size), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert zero["lengths"] == [8, 8, 0, 0, 8, 8]  # the refused prompt's two are marked
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
    # trainers that are seeded alike do not make their ranks sample alike
    assert zero["same"] != one["same"]
