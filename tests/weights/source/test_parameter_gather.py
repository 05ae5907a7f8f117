"""Sources of sharded models, two gloo ranks: bits, poisoned memory, receivers that fail; see `sharded_worker.py`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

CHEAP = ["fsdp2 peft"]
FSDP1 = ["fsdp1", "fsdp1 flat", "fsdp1 moe", "fsdp1 peft", "fsdp1 flat peft", "fsdp1 checkpointed", "fsdp1 tied"]
FSDP2 = ["fsdp2", "fsdp2 ignored", "fsdp2 moe", "fsdp2 peft everywhere", "fsdp2 checkpointed peft", "fsdp2 tied"]
ZERO3 = ["zero3", "zero3 moe", "zero3 peft", "zero3 tied"]


def on_two_ranks(folder: Path, cases: list[str]) -> None:
    worker = Path(helpers.__file__).with_name("sharded_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run([*command, str(folder), *cases], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((folder / f"rank-{rank}.json").read_text())
        assert list(found) == cases
        for case, result in found.items():
            assert result.pop("tensors") >= 27, case
            assert result == {"wrong": [], "left": []}, (rank, case, result)


@pytest.mark.slow
def test_shards_come_whole_and_no_rank_waits_for_one_that_failed(tmp_path):
    on_two_ranks(tmp_path, CHEAP)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [FSDP1, FSDP2], ids=["fsdp1", "fsdp2"])
def test_every_way_of_fsdp(tmp_path, cases):
    on_two_ranks(tmp_path, cases)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'vgen[deepspeed]'"
)
def test_zero3(tmp_path):
    on_two_ranks(tmp_path, ZERO3)


def test_a_sharded_tensor_is_gathered_whole_in_order(tmp_path):
    """One rank of a real mesh; two are in the slow tests."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from vgen.weights.source.module_source import source_of

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, whole = torch.nn.Module(), {name: torch.randn(4, 3) for name in ("a", "b")}
        for name, tensor in whole.items():
            model.register_parameter(name, torch.nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])))
        sent = dict(source_of(model))
    finally:
        dist.destroy_process_group()
    assert sent.keys() == whole.keys()
    for name, tensor in whole.items():
        assert type(sent[name]) is torch.Tensor
        assert torch.equal(sent[name], tensor)


@pytest.mark.parametrize(("said", "expected"), [("bfloat16", "bfloat16"), (None, "float32")])
def test_what_is_not_live_comes_in_the_dtype_of_the_models_configuration(monkeypatch, said, expected):
    """And in torch's own where the configuration has none."""
    from types import SimpleNamespace

    import torch

    from vgen.weights.source import parameter_gather

    seen = []
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(dtype=said and getattr(torch, said))
    weight = parameter_gather._weight
    monkeypatch.setattr(parameter_gather, "_weight", lambda *given: (seen.append(given[3]), weight(*given))[1])
    parameter_gather.weights_of(model)
    assert set(seen) == {getattr(torch, expected)}
