"""vgen in the place of TRL's own generation object, for the trainers of TRL 1.16.

Before the trainer is constructed, replace the class that it uses:

    import functools
    import trl.trainer.grpo_trainer
    from vgen.integrations.trl import TRLGeneration

    trl.trainer.grpo_trainer.VLLMGeneration = functools.partial(TRLGeneration, profiling=profiling)

TRL's own settings apply: `GRPOConfig(use_vllm=True, vllm_mode="colocate", ...)`, or `vllm_mode="server"` for a server
that `vgen serve` started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, TypeAlias

from ..engine_protocol import EngineState
from ..errors import ServerError
from ..generation import ColocateGeneration, Generation, ServerGeneration
from ..profiling import ProfilingContext
from ..types import Sampling

Generated: TypeAlias = (
    "tuple[list[list[int]], list[list[int]], list[list[list[float | None]]] | None, list[list[list[int]]] | None]"
)
"""Prompt ids, completion ids, log-probabilities, and the token ids that these belong to."""

_SAMPLING_FIELDS = frozenset(field.name for field in fields(Sampling)) - {"extra"}


class TRLGeneration:
    """Has the arguments and methods of TRL 1.16's `VLLMGeneration`, and generates through vgen.

    With `enable_sleep_mode` the engine sleeps (level 2) between two calls of `generate`, like TRL's own. If
    `sync_weights` was not called before the next `generate`, vgen restores the weights before the first token.

    In server mode the constructor waits up to `server_timeout` seconds for the server to start, like TRL. `group_port`
    has no effect, because vgen chooses how weights travel to the server.

    Args:
        profiling: Receives spans and measurements. By default nothing is recorded.
        engine_kwargs: Further arguments of `vllm.LLM`, in colocate mode.
        server_kwargs: Further arguments of `ServerGeneration`, in server mode, such as `control_key` or `connection`.

    Raises:
        ValueError: `mode` is neither `colocate` nor `server`.
        ServerError: No server answered within `server_timeout` seconds.
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
        extra = dict(generation_kwargs or {})
        sampling: dict[str, Any] = dict(
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p or 0.0,
            max_tokens=max_completion_length,
            logprobs=logprobs,
        )
        sampling |= {name: extra.pop(name) for name in list(extra) if name in _SAMPLING_FIELDS}
        self._sampling = Sampling(**sampling, extra=extra)
        self._sleep = enable_sleep_mode and mode == "colocate"
        shared: dict[str, Any] = dict(
            processing_class=processing_class, structured_outputs_regex=structured_outputs_regex, profiling=profiling
        )
        self.generation: Generation
        if mode == "server":
            host = f"[{server_host}]" if ":" in server_host and not server_host.startswith("[") else server_host
            url = server_base_url or f"http://{host}:{server_port}"
            options = shared | dict(server_kwargs or {})
            self.generation = _retry_until_up(
                lambda: ServerGeneration(model, accelerator=accelerator, base_urls=[url], **options), server_timeout
            )
            self.vllm_client = _Client(url, options.get("api_key"), options.get("control_key"))
        else:
            self.generation = ColocateGeneration(
                model,
                accelerator=accelerator,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_length=max_model_length,
                max_num_seqs=max_num_seqs,
                enable_sleep_mode=enable_sleep_mode,
                engine_kwargs=dict(model_impl=model_impl, trust_remote_code=trust_remote_code)
                | dict(engine_kwargs or {}),
                **shared,
            )
        if self._sleep:
            self.generation.sleep(level=2)
        accelerator.wait_for_everyone()

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`. TRL's trainers read its `max_model_len` in colocate mode."""
        return self.generation.engine.llm

    def sync_weights(self) -> None:
        """Replace the engine's weights by those of the trainer's model. A sleeping engine wakes up for that."""
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
        """Sample one completion of each prompt, because TRL has repeated every prompt `num_generations` times already.

        `images` holds a list for each prompt, or is None. Prompts may hold image placeholders as TRL's processors
        expand them. Returns prompt ids, completion ids, log-probabilities of shape (sequences, tokens, alternatives),
        likeliest first, and the token ids of the alternatives in the same shape.
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


def _retry_until_up(build: Callable[[], ServerGeneration], seconds: float) -> ServerGeneration:
    """Call `build` until a server answers, for at most that many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return build()
        except ServerError as error:
            if error.status is not None or time.monotonic() > deadline:
                raise
        time.sleep(min(1.0, seconds))


class _Client:
    """The part of TRL's own client that TRL's trainers use."""

    def __init__(self, url: str, api_key: str | None, control_key: str | None) -> None:
        self._url, self._api_key, self._control_key = url, api_key, control_key

    def get_server_info(self) -> dict[str, Any]:
        """The server's configuration from vLLM's `/server_info`. Raises `ServerError`."""
        from ..engines.client.event_loop_thread import EventLoopThread
        from ..engines.client.http import HttpClient

        server = HttpClient(self._url, api_key=self._api_key, control_key=self._control_key, timeout=60.0)
        loop = EventLoopThread()
        try:
            return loop.run(server.get("/server_info?config_format=json"))["vllm_config"]
        finally:
            loop.run(server.close())
            loop.close()
