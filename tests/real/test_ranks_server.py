"""Two gloo ranks in front of one real server: own completions, and weights that only the leader sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from vgen import Sampling, ServerGeneration


def test_ranks_share_a_server(server, tmp_path):
    worker = str(Path(__file__).with_name("ranks_server.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker]
    command += [server.folder, server.base_url, str(tmp_path)]
    keys = {"API_KEY": server.api_key, "CONTROL_KEY": server.control_key}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **keys})
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert zero["prompts"] == [[1, 2, 3], [], [4, 5]]
    assert one["prompts"] == [[9, 8, 7, 6]]
    assert [len(tokens) for tokens in zero["tokens"]] == [8, 8, 0, 0, 8, 8]
    assert [len(tokens) for tokens in one["tokens"]] == [8, 8]
    assert zero["timed"] == [True, True, False, False, True, True]
    assert one["timed"] == [True, True]
    assert (zero["after"], one["after"]) == (0, 1)
    assert one["versions"] == ["fresh"]
    assert zero["score"] == one["score"] == [2]
    assert (zero["links"], one["links"]) == (0, 1)
    assert zero["bytes"] == one["bytes"]
    for found in (zero, one):
        assert found["difference"] <= 1e-4
    # One process with all prompts samples the same: seeds are numbered over all ranks.
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with ServerGeneration(server.model, base_urls=[server.base_url], timeout=120.0, **keys) as alone:
        found = alone.generate([[1, 2, 3], [4, 5], [9, 8, 7, 6]], Sampling(max_tokens=8, ignore_eos=True, seed=3), 2)
    assert [c.token_ids for c in found] == [tokens for tokens in zero["tokens"] + one["tokens"] if tokens]
