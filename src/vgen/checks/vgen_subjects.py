"""vgen's own engines as subjects of a check: in this process, and behind a server."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from ..errors import CheckError, VgenError
from ..generation import ColocateGeneration, Generation, ServerConnection, ServerGeneration
from ..types import Sampling
from ..weights.source.module_source import source_of
from .cutting_proxy import CuttingProxy
from .oracle import Measurement, Oracle
from .subject import generate

MAX_MODEL_LENGTH = 384


class VgenSubject:
    """One of vgen's generation objects, with its default verification and accounting."""

    concurrent = False

    def __init__(self, model: Any, generation: Generation) -> None:
        self.generation = generation
        self._model = model
        engine = generation.engine
        described = getattr(engine, "endpoints", [engine])[0]  # servers tell their own
        self.dtype = getattr(described, "dtype", None)
        self.quantization = getattr(described, "quantization", None)

    def sync(self, model: Any) -> Any:
        """Sync `model`'s weights. The returned report is a `SyncReport`."""
        if model is not self._model:
            self.generation.source, self._model = source_of(model), model
        return self.generation.sync_weights()

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, **options: Any
    ) -> list[tuple[list[int], list[float | None]]]:
        """Sample as `WeightSyncSubject.generate` says. `options` go to `Generation.generate`."""
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, ignore_eos=True)
        completions = self.generation.generate(prompts, sampling, **options)
        return [(completion.token_ids, completion.logprobs or []) for completion in completions]

    def sleep(self, level: int) -> None:
        self.generation.sleep(level=level)

    def wake_up(self) -> None:
        self.generation.wake_up()

    def close(self) -> None:
        _ALIVE.discard(self)
        self.generation.close()


_ALIVE = weakref.WeakSet[VgenSubject]()
"""The engines of this process."""


class ServerSubject(VgenSubject):
    """vLLM behind a server, whose weights the check replaces. All calls go through `proxy`."""

    concurrent = True

    def __init__(self, model: Any, generation: Generation, proxy: CuttingProxy) -> None:
        super().__init__(model, generation)
        self.proxy = proxy

    def close(self) -> None:
        super().close()
        self.proxy.close()


def engine_options(model: Any) -> dict[str, Any]:
    """What an engine for this model needs here, as arguments of `vllm.LLM`."""
    if next(model.parameters()).device.type == "cuda":
        return {"kv_cache_memory_bytes": 1 << 30}
    if any(name.startswith(("mamba", "ssm", "state_size")) for name in model.config.to_dict()):
        # vLLM's kernels for a CPU give no states in the middle of a prompt, which it would cache.
        return {"enable_prefix_caching": False}
    return {}


def server_arguments(model: Any) -> list[str]:
    """The same as arguments of `vgen serve`."""
    return ["--no-enable-prefix-caching"] if "enable_prefix_caching" in engine_options(model) else []


def colocate(model: Any, folder: str, **options: Any) -> VgenSubject:
    """A `SubjectFactory`. `options` go to `ColocateGeneration`."""
    engine_kwargs = engine_options(model) | options.pop("engine_kwargs", {})
    settings: dict[str, Any] = {
        "max_model_length": MAX_MODEL_LENGTH,
        "max_num_seqs": 16,
        "gpu_memory_utilization": 0.3,
        # On a CUDA device one engine of a process may sleep.
        "enable_sleep_mode": not (_ALIVE and next(model.parameters()).device.type == "cuda"),
    }
    subject = VgenSubject(model, ColocateGeneration(model, **(settings | options), engine_kwargs=engine_kwargs))
    _ALIVE.add(subject)
    return subject


def held_by_server(url: str, model: Any, *, api_key: str | None, timeout: float) -> Measurement:
    """Compare the weights that a server has now with the model's. Changes nothing. Raises `VgenError`."""
    from .session import TOKENS, prompts_for

    prompts, connection = prompts_for(model), ServerConnection(timeout=timeout)
    with ServerGeneration(None, base_urls=url, api_key=api_key, connection=connection) as generation:
        subject = VgenSubject(model, generation)
        oracle = Oracle(model, subject.dtype, fp8=bool(subject.quantization))
        return oracle.measure(prompts, generate(subject, prompts, TOKENS, 1.0))


def server(url: str, *, api_key: str | None, control_key: str | None, timeout: float) -> Any:
    """A `SubjectFactory` for a server that runs already."""

    def make(model: Any, folder: str) -> VgenSubject:
        proxy = CuttingProxy(url)
        try:
            connection = ServerConnection(timeout=timeout)
            generation = ServerGeneration(
                model, base_urls=proxy.url, api_key=api_key, control_key=control_key, connection=connection
            )
        except BaseException as error:
            proxy.close()
            if isinstance(error, VgenError):
                problem = str(error).replace(proxy.url, url)
                raise CheckError(f"the server cannot be used: {problem}; start it with `vgen serve MODEL`") from error
            raise
        return ServerSubject(model, generation, proxy)

    return make
