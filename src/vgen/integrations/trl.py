"""vgen in the shape of TRL's own generation object, for TRL 1.16's trainers.

from functools import partial
import trl.trainer.grpo_trainer
from vgen.integrations.trl import TRLGeneration

trl.trainer.grpo_trainer.VLLMGeneration = partial(TRLGeneration, profiling=profiling)
GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate", ...))

With `vllm_mode="server"` it generates with a server that `vgen serve` has started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, TypeAlias

from ..engines.base import EngineState
from ..errors import ServerError
from ..generation import ColocateGeneration, ServerGeneration
from ..generation.base import Generation
from ..profiling import ProfilingContext
from ..types import Sampling

Generated: TypeAlias = (
    "tuple[list[list[int]], list[list[int]], list[list[list[float | None]]] | None, list[list[list[int]]] | None]"
)

_FIELDS = frozenset(field.name for field in fields(Sampling)) - {"extra"}


class TRLGeneration:
    """Takes the arguments of TRL 1.16's `VLLMGeneration`, has its methods, and generates through vgen.

    With sleep mode the engine sleeps (level 2) between calls of `generate`, as TRL's own does; what
    `sync_weights` has not brought back by then is restored before the first token.

    In server mode `server_timeout` is how many seconds are waited for the server to be up, as in TRL, and
    `group_port` is without meaning: weights travel by the transports that the server and the trainer share. What
    `ServerGeneration` takes besides, such as `control_key` or `timeout`, goes into `server_kwargs`.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Any,
        processing_class: Any,
        mode: str = "colocate",
        structured_outputs_regex: str | None = None,
        server_base_url: str | None = None,
        server_host: str = "0.0.0.0",
        server_port: int = 8000,
        server_timeout: float = 240.0,
        group_port: int = 51216,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = 0.0,
        max_completion_length: int = 16,
        logprobs: int | None = 0,
        generation_kwargs: Mapping[str, Any] | None = None,
        *,
        profiling: ProfilingContext = ProfilingContext.disabled(),
        engine_kwargs: Mapping[str, Any] | None = None,
        server_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in ("colocate", "server"):
            raise ValueError(f"vllm_mode must be 'colocate' or 'server', got {mode!r}")
        more = dict(generation_kwargs or {})
        own: dict[str, Any] = dict(
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p or 0.0,
            max_tokens=max_completion_length,
            logprobs=logprobs,
        )
        own |= {name: more.pop(name) for name in list(more) if name in _FIELDS}
        self._sampling = Sampling(**own, extra=more)
        self._sleep = enable_sleep_mode and mode == "colocate"
        shared: dict[str, Any] = dict(
            processing_class=processing_class, structured_outputs_regex=structured_outputs_regex, profiling=profiling
        )
        self.generation: Generation
        if mode == "server":
            url = server_base_url or f"http://{server_host}:{server_port}"
            keys = dict(server_kwargs or {})
            self.generation = _when_up(
                lambda: ServerGeneration(model, accelerator=accelerator, base_urls=[url], **shared | keys),
                server_timeout,
            )
            self.vllm_client = _Client(url, keys.get("api_key"), keys.get("control_key"))
        else:
            self.generation = ColocateGeneration(
                model,
                accelerator=accelerator,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_length=max_model_length,
                max_num_seqs=max_num_seqs,
                model_impl=model_impl,
                enable_sleep_mode=enable_sleep_mode,
                trust_remote_code=trust_remote_code,
                engine_kwargs=engine_kwargs,
                **shared,
            )
        if self._sleep:
            self.generation.sleep(level=2)
        accelerator.wait_for_everyone()

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, whose `max_model_len` TRL's trainers read in colocate mode."""
        return self.generation.engine.llm

    def sync_weights(self) -> None:
        """Bring the model's weights into the engine."""
        if self.generation.state is EngineState.ASLEEP:
            self.generation.wake_up(["weights"])
        self.generation.sync_weights()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> Generated:
        """One completion for each prompt: TRL has already repeated every prompt `num_generations` times.

        `images` are each prompt's, or None; the prompts may hold their placeholders as TRL's processors write them.
        Returns prompt ids, completion ids, log-probabilities of shape (sequences, tokens, alternatives) with the
        likeliest first, and the token ids of those alternatives.
        """
        if self.generation.state is EngineState.ASLEEP:
            self.generation.wake_up()
        with profiler or nullcontext():
            rollouts = self.generation.generate(prompts, self._sampling, images=images)
        if self._sleep:
            self.generation.sleep(level=2)
        completion_ids = [completion.token_ids for completion in rollouts]
        if self._sampling.logprobs is None:
            return rollouts.prompt_ids, completion_ids, None, None
        pairs = [
            completion.top_logprobs
            or [[pair] for pair in zip(completion.token_ids, completion.logprobs or (), strict=True)]
            for completion in rollouts
        ]
        logprobs = [[[logprob for _, logprob in position] for position in sequence] for sequence in pairs]
        token_ids = [[[token for token, _ in position] for position in sequence] for sequence in pairs]
        return rollouts.prompt_ids, completion_ids, logprobs, token_ids


def _when_up(build: Callable[[], ServerGeneration], seconds: float) -> ServerGeneration:
    """What `build` returns, tried again for so long while nothing answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            return build()
        except ServerError as error:
            if error.status is not None or time.monotonic() > until:
                raise
        time.sleep(min(1.0, seconds))


class _Client:
    """What TRL's trainers ask of TRL's own client."""

    def __init__(self, url: str, api_key: str | None, control_key: str | None) -> None:
        self._url, self._api_key, self._control_key = url, api_key, control_key

    def get_server_info(self) -> dict[str, Any]:
        """The server's configuration, as vLLM's `/server_info` gives it. Raises `ServerError`."""
        from ..engines.http import Loop, Server

        server = Server(self._url, api_key=self._api_key, control_key=self._control_key, timeout=60.0)
        loop = Loop()
        try:
            return loop.run(server.get("/server_info?config_format=json"))["vllm_config"]
        finally:
            loop.run(server.close())
            loop.close()
