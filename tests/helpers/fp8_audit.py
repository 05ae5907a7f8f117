"""Audits of vLLM's own fp8 layers with block-wise scales, on the meta device: prints one JSON object.

A process of its own, because vLLM's layers want its process groups.
"""

from __future__ import annotations

import json
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization import fp8

from vgen import WeightSyncError
from vgen.weights.load.load_audit import audit_load

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
CHECKPOINT = [
    *(("gate.weight", (256, 256), FP8), ("gate.weight_scale_inv", (2, 2), torch.float32)),
    *(("up.weight", (256, 256), FP8), ("up.weight_scale_inv", (2, 2), torch.float32)),
]
SENT: dict[str, list[Any]] = {
    "all": CHECKPOINT,
    "one scale missing": CHECKPOINT[:3],
    "a bf16 trainer": [(name, shape, BF16) for name, shape, _ in CHECKPOINT if not name.endswith("scale_inv")],
    "a scale too large": [*CHECKPOINT[:3], ("up.weight_scale_inv", (4, 2), torch.float32)],
}


class Model(torch.nn.Module):
    """Two projections in one, as in an MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up = MergedColumnParallelLinear(256, [256, 256], bias=False, quant_config=config, prefix="gate_up")

    def load_weights(self, weights: Any) -> None:
        for name, tensor in weights:
            module, _, leaf = name.partition(".")
            parameter: Any = getattr(self.gate_up, leaf)
            parameter.weight_loader(parameter, tensor, ("gate", "up").index(module))


def main() -> None:
    # The CPU build has kernels for fp8 only on processors with AMX; none runs here.
    setattr(fp8, "init_fp8_linear_kernel", lambda *_, **__: None)  # noqa: B010
    config = VllmConfig()
    object.__setattr__(config, "model_config", SimpleNamespace(dtype=BF16, is_moe=False))
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        initialize_model_parallel()
        quantization = fp8.Fp8Config(True, "dynamic", weight_block_size=[128, 128])
        with torch.device("meta"):
            model = Model(quantization)
        for what, metadata in SENT.items():
            try:
                audit_load(model, metadata, {}, "engine").require({}, "engine")
                answers[what] = None
            except WeightSyncError as error:
                answers[what] = [error.parameter, error.problem]
    print("ANSWERS " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
