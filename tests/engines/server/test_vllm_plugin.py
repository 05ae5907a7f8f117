"""vgen's engine in vLLM's registries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vgen.weights.transports.shared_memory import shared_directory

pytestmark = pytest.mark.real
pytest.importorskip("vllm")


def test_it_is_registered_with_both_of_vllms_factories():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from vgen.engines.server.vllm_plugin import register
    from vgen.engines.server.weight_sender import SenderInit

    register()
    register()
    assert {"vgen_shm", "nccl"} <= WeightTransferEngineFactory._registry.keys()

    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, call: str) -> Callable:
            return lambda *_: self.calls.append(call)

    client = Recorder()
    sender = WeightTransferTrainerFactory.trainer_init(
        SenderInit(rank=0), client=client, source=[("weight", torch.ones(3))]
    )
    sender.send_weights()
    sender.shutdown()
    assert client.calls == [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ]
    assert not any(Path(shared_directory()).iterdir())
