"""`vgen serve --data-parallel-size 2`: both engines of the server generate, and both have the trainer's weights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.changed_source import ChangedSource
from helpers.transfers import K_PROJ, wrong_shape

from vgen import Sampling, ServerConnection, ServerGeneration, WeightSyncError
from vgen.demo import max_logprob_difference
from vgen.testing import tiny_model


def answered(url: str) -> dict[str, float]:
    """How many requests each engine has finished, by its number."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for engine, count in re.findall(r'^vllm:request_success_total\{engine="(\d+)".*\} (\S+)$', text, re.MULTILINE):
        found[engine] = found.get(engine, 0.0) + float(count)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_data_parallel_engine_gets_the_weights(tmp_path):
    model, _ = tiny_model(tmp_path / "model")
    source = ChangedSource(model)
    command = [sys.executable, "-m", "vgen.cli", "serve", str(tmp_path / "model"), "--port", "0", "--json", "--quiet"]
    command += ["--data-parallel-size", "2", "--max-model-len", "512", "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(64 << 20)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1][-3000:]
        described = json.loads(line)
        key = Path(described["control_key_file"]).read_text()
        keys = {"control_key": key, "connection": ServerConnection(timeout=120.0)}
        for transport in (None, "gloo"):
            with ServerGeneration(source, base_urls=described["url"], weight_transport=transport, **keys) as generation:
                for version in (f"first by {transport}", f"second by {transport}"):
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.copy_(torch.randn_like(parameter) * 0.05)
                    generation.sync_weights(version=version)
                    before = answered(described["url"])
                    prompts = [[1 + i, 2] for i in range(64)]
                    rollouts = generation.generate(prompts, Sampling(max_tokens=16, ignore_eos=True), 2)
                    assert max_logprob_difference(model, rollouts) <= 1e-4
                    assert {tuple(c.weight_versions) for c in rollouts} == {((version, 0, 16),)}
                    after = answered(described["url"])
                    assert sorted(after) == ["0", "1"]
                    assert all(after[engine] - before.get(engine, 0.0) > 10 for engine in after)
                with source.changed_by(wrong_shape(K_PROJ)), pytest.raises(WeightSyncError, match="k_proj"):
                    generation.sync_weights(version="broken")
                generation.sync_weights(version="mended")
                rollouts = generation.generate(prompts, Sampling(max_tokens=16, ignore_eos=True), 2)
                assert max_logprob_difference(model, rollouts) <= 1e-4
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
