"""The weight syncs of TRL and of vLLM itself as subjects of a check; both need a CUDA device, and so no test runs them.

PYTHONPATH=src:tests vgen check llama --dtype bfloat16 --adapter helpers.third_parties:trl
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from helpers.reload_weights import PlainEngine

MAX_MODEL_LENGTH = 384


class TrlGeneration:
    """TRL's own `VLLMGeneration`, colocated."""

    def __init__(self, model: torch.nn.Module, folder: str) -> None:
        from accelerate import Accelerator
        from transformers import AutoTokenizer
        from trl.generation.vllm_generation import VLLMGeneration

        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        model.name_or_path = folder
        self._trl = VLLMGeneration(
            model,
            Accelerator(),
            AutoTokenizer.from_pretrained(folder),
            gpu_memory_utilization=0.3,
            max_model_length=MAX_MODEL_LENGTH,
            max_num_seqs=16,
            generation_kwargs={"ignore_eos": True},
        )

    def sync(self, model: Any) -> None:
        self._trl.model = model
        self._trl.sync_weights()

    def generate(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float) -> list[Any]:
        self._trl.max_completion_length, self._trl.temperature = max_tokens, temperature
        _, ids, logprobs, _ = self._trl.generate([list(prompt) for prompt in prompts], None, 1)
        return [(tokens, [at[0] for at in each]) for tokens, each in zip(ids, logprobs, strict=True)]

    def close(self) -> None:
        self._trl.llm.llm_engine.engine_core.shutdown()


class VllmIpc(PlainEngine):
    """vLLM's weight-transfer engine `ipc`, into an engine in a process of its own on the same GPU."""

    packed = False

    def __init__(self, model: torch.nn.Module, folder: str) -> None:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self.llm = LLM(
            folder,
            max_model_len=MAX_MODEL_LENGTH,
            max_num_seqs=16,
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=1 << 30,
            weight_transfer_config=WeightTransferConfig(backend="ipc"),
        )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)

    def sync(self, model: Any) -> None:
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        info = IPCTrainerInitInfo(rank=0, packed=self.packed)
        IPCTrainerWeightTransferEngine.trainer_init(info, client=self, source=ModuleSource(model)).send_weights()
        self.llm.reset_prefix_cache()


class VllmPackedIpc(VllmIpc):
    packed = True


trl, ipc, packed_ipc = TrlGeneration, VllmIpc, VllmPackedIpc
