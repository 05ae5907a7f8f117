"""An FSDP2 trainer of two ranks on the CPU, with vLLM in the same processes."""

from __future__ import annotations

import pytest
from helpers.torchrun import on_two_ranks

from vgen.testing import tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_a_sharded_model_in_process_is_synced_and_verified_together(tmp_path, tensor_parallel_size):
    tiny_model(tmp_path / "model")
    ranks = on_two_ranks("ranks_sharded.py", [str(tmp_path / "model"), str(tensor_parallel_size)], tmp_path)
    for rank, found in enumerate(ranks):
        assert max(found["own"]) <= 1e-4
        assert min(found["stale"]) > 1e-3
        notes = [] if rank == 1 else ["raised on rank 1"]
        assert found["failed"] == [["as injected", "load", "colocate", notes, "failed"]] * 3
        assert found["woken"] == "logprobs"
        # After a sync that failed on either rank, both ranks verify the next one.
        assert found["verified"] == ["logprobs", None, "deferred", *[None, "logprobs"] * 3]
