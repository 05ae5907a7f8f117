"""The weight syncs of TRL and of vLLM itself as subjects of a check; both need a CUDA device, and so no test runs them.

PYTHONPATH=src:tests vgen check llama --dtype bfloat16 --adapter helpers.third_parties:trl

`trl_server` and `nccl` have the engine on a second device: they need two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch

from helpers.reload_weights import PlainEngine

MAX_MODEL_LENGTH = 384


class TrlGeneration:
    """TRL's own `VLLMGeneration`, colocated."""

    options: Mapping[str, Any] = MappingProxyType({})

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
            **self.options,
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


class TrlSleeping(TrlGeneration):
    """The same with its sleep mode: it sleeps after each call, and brings the weights before the next."""

    options = MappingProxyType({"enable_sleep_mode": True})


class TrlServer(TrlGeneration):
    """TRL's own `VLLMGeneration` with a stock vLLM server on the second device; its weights travel by NCCL."""

    def __init__(self, model: torch.nn.Module, folder: str) -> None:
        from vgen.testing import stock_server

        arguments = ["--weight-transfer-config", '{"backend": "nccl"}', "--max-model-len", str(MAX_MODEL_LENGTH)]
        arguments += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--max-num-seqs", "16"]
        arguments += ["--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.3"]
        self._server = ExitStack()
        url = self._server.enter_context(
            stock_server(folder, arguments=arguments, environment={"CUDA_VISIBLE_DEVICES": "1"})
        )
        self.options = {"mode": "server", "server_base_url": url}
        super().__init__(model, folder)

    def close(self) -> None:
        self._server.close()


class VllmIpc(PlainEngine):
    """vLLM's weight-transfer engine `ipc`, into an engine in a process of its own on the same GPU."""

    backend, packed = "ipc", False

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
            weight_transfer_config=WeightTransferConfig(backend=self.backend),
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


class VllmNccl(VllmIpc):
    """vLLM's weight-transfer engine `nccl`, into an engine in a process of its own on the second device."""

    backend = "nccl"

    def __init__(self, model: torch.nn.Module, folder: str) -> None:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"  # for the process that the engine starts
        try:
            super().__init__(model, folder)
        finally:
            if devices is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = devices
        self._trainer: Any = None

    def sync(self, model: Any) -> None:
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        from vgen._addresses import free_port

        source = ModuleSource(model)
        if self._trainer is None:
            address = {"master_address": "127.0.0.1", "master_port": free_port("127.0.0.1")}
            info = NCCLTrainerInitInfo(rank=0, world_size=2, packed=self.packed, **address)
            self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(info, client=self, source=source)
        self._trainer.source = source
        self._trainer.send_weights()
        self.llm.reset_prefix_cache()


trl, trl_sleeping, trl_server = TrlGeneration, TrlSleeping, TrlServer
ipc, packed_ipc, nccl = VllmIpc, VllmPackedIpc, VllmNccl
