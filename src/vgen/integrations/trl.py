"""vgen in the place of TRL's own generation object, for the trainers of TRL 1.16.

    from vgen.integrations.trl import enable

    enable(profiling=profiling)

This is the one thing in vgen that changes other libraries, for the whole process: TRL's trainers then generate through
`TRLGeneration`, and training opens a step for each optimizer step. TRL's own settings apply:
`GRPOConfig(use_vllm=True, vllm_mode="colocate", ...)`, or `vllm_mode="server"` for a server that `vgen serve` started.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from ..engine_protocol import EngineState
from ..errors import ServerError, VgenError, needs_extra
from ..generation import ColocateGeneration, Generation, ServerGeneration
from ..profiling import ProfilingContext
from ..profiling.aggregation import Row
from ..profiling.key_figures import key_figures, log_key
from ..types import Sampling

if TYPE_CHECKING:
    from ..engines.client.keys import KeyOrFile

logger = logging.getLogger(__name__)

TESTED = "1.16."

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
        self.model, self.accelerator, self.processing_class, self.mode = model, accelerator, processing_class, mode
        self.repetition_penalty, self.temperature, self.top_p, self.top_k = (
            repetition_penalty,
            temperature,
            top_p,
            top_k,
        )
        self.min_p, self.max_completion_length, self.logprobs = min_p, max_completion_length, logprobs
        self.generation_kwargs, self.structured_outputs_regex = dict(generation_kwargs or {}), structured_outputs_regex
        self.tensor_parallel_size, self.enable_sleep_mode = tensor_parallel_size, enable_sleep_mode
        self.sampling()  # refuses what cannot be sampled with before an engine is built
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
            self.vllm_client = Client(url, options.get("api_key"), options.get("control_key"))
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

    def sampling(self) -> Sampling:
        """The sampling parameters by this object's attributes, which a trainer may set between two calls."""
        extra = dict(self.generation_kwargs)
        if self.structured_outputs_regex is not None:
            extra.pop("structured_outputs", None)  # the regex goes before, as in TRL
        fields: dict[str, Any] = dict(
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p or 0.0,
            max_tokens=self.max_completion_length,
            logprobs=self.logprobs,
        )
        fields |= {name: extra.pop(name) for name in list(extra) if name in _SAMPLING_FIELDS}
        return Sampling(**fields, extra=extra)

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
        sampling = self.sampling()
        with profiler or nullcontext():
            rollouts = self.generation.generate(prompts, sampling, images=images)
        if self._sleep:
            self.generation.sleep(level=2)
        completion_ids = [completion.token_ids for completion in rollouts]
        if sampling.logprobs is None:
            return rollouts.prompt_ids, completion_ids, None, None
        pairs = [
            completion.top_logprobs
            or [[pair] for pair in zip(completion.token_ids, completion.logprobs or (), strict=True)]
            for completion in rollouts
        ]
        logprobs = [[[logprob for _, logprob in position] for position in sequence] for sequence in pairs]
        token_ids = [[[token for token, _ in position] for position in sequence] for sequence in pairs]
        return rollouts.prompt_ids, completion_ids, logprobs, token_ids

    def reset_prefix_cache(self) -> None:
        """Empty the engine's prefix cache. Every weight sync does that by itself. Raises `ServerError`."""
        if self.mode == "server":
            self.vllm_client.reset_prefix_cache()
        else:
            self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Shut the engine down, or release the server. A second call has no effect."""
        self.generation.close()


class Enabled:
    """What `enable` returns: undoes it, by `disable` or as a context manager."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def disable(self) -> None:
        """Give TRL and transformers their own classes and methods back. A second call has no effect."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable(
    *,
    profiling: ProfilingContext = ProfilingContext.disabled(),
    engine_kwargs: Mapping[str, Any] | None = None,
    server_kwargs: Mapping[str, Any] | None = None,
    client_keys: Mapping[str, Mapping[str, Any]] | None = None,
) -> Enabled:
    """Let TRL's trainers that are constructed from now on generate through vgen, in this process.

    These are GRPO, RLOO, Distillation, SDPO, GOLD, IW-OPD and SDFT, and what inherits from them. It may be called
    before or after they are imported. Each optimizer step becomes a step of `profiling`, under the number that the
    trainer's log has (`global_step`). The trainer's log and its `log_history` get the numbers of
    `vgen.profiling.key_figures` as `vgen/...`, for all steps since the last log. An evaluation belongs to no step: what
    it generates or syncs is in the run, and not in the log. Trainers that do not use vLLM stay as they are.

    Args:
        profiling: Receives spans and measurements. By default nothing is recorded.
        engine_kwargs: Further arguments of `vllm.LLM`, in colocate mode.
        server_kwargs: Further arguments of `ServerGeneration`, in server mode, such as `control_key` or `connection`.
        client_keys: By URL of a server, the `api_key` and `control_key` that TRL's own client sends to it, such as to
            the server of a teacher. They are sent nowhere else.

    Raises:
        VgenError: It is enabled already, or TRL has built a generation object of its own before.
        MissingExtraError: TRL is not installed.
    """
    with needs_extra("vgen.integrations.trl", "TRL", "trl"):
        import trl.generation.vllm_generation as home
        from transformers import Trainer
        from trl.generation.vllm_client import VLLMClient as stock_client

    stock = home.VLLMGeneration
    if issubclass(stock, TRLGeneration):
        raise VgenError("vgen.integrations.trl is enabled already: call disable() on what the first enable() returned")
    if _is_built(stock):
        raise VgenError(
            "a TRL trainer was built before enable(), and generates by itself: call enable() before that, or delete it"
        )
    if not version("trl").startswith(TESTED):
        engine = version("vllm") if find_spec("vllm") else "that is not installed"
        versions = f"TRL {version('trl')} with vLLM {engine}"
        logger.warning("vgen: its drop-in for TRL is tested with TRL %sx, not with %s", TESTED, versions)

    class VLLMGeneration(TRLGeneration):
        @functools.wraps(TRLGeneration.__init__)
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {"profiling": profiling, "engine_kwargs": engine_kwargs, "server_kwargs": server_kwargs}
            super().__init__(*args, **given | kwargs)

    class VLLMClient(stock_client):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "base_url" and (keys := (client_keys or {}).get(value.rstrip("/"))):
                self.session.headers.update(_key_headers(keys))
                self.session.max_redirects = 0  # a redirect would send the keys to another server

    train, log = Trainer.train, Trainer.log

    @functools.wraps(train)
    def train_in_steps(self: Any, *args: Any, **kwargs: Any) -> Any:
        if home.VLLMGeneration is not VLLMGeneration or not isinstance(
            getattr(self, "vllm_generation", None), TRLGeneration
        ):
            return train(self, *args, **kwargs)
        recorder, error = _step_recorder_class()(profiling), (None, None, None)
        self.add_callback(recorder)
        try:
            return train(self, *args, **kwargs)
        except BaseException:
            error = sys.exc_info()
            raise
        finally:
            recorder.end_step(*error)
            self.pop_callback(recorder)

    @functools.wraps(log)
    def log_with_figures(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:  # the log of the training, not of an evaluation or of the user
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, _step_recorder_class()):
                    logs.update(callback.take())
        log(self, logs, *args, **kwargs)

    replaced = {stock: VLLMGeneration, stock_client: VLLMClient}

    def undo() -> None:
        _replace_everywhere({new: old for old, new in replaced.items()})
        # Another library may have wrapped the methods meanwhile: it keeps ours, which do nothing from now on.
        if Trainer.train is train_in_steps:
            Trainer.train = train
        if Trainer.log is log_with_figures:
            Trainer.log = log

    _replace_everywhere(replaced)
    Trainer.train, Trainer.log = train_in_steps, log_with_figures
    return Enabled(undo)


def _is_built(kind: type) -> bool:
    """Whether there is an object of that class which is in use."""
    if not any(type(each) is kind for each in gc.get_objects()):
        return False
    gc.collect()
    return any(type(each) is kind for each in gc.get_objects())


def _replace_everywhere(classes: Mapping[type, type]) -> None:
    """In all modules of TRL that have imported them. Those that are imported later take them from their home."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trl":
            for old, new in classes.items():
                if vars(module).get(old.__name__) is old:
                    setattr(module, old.__name__, new)


def _key_headers(server_kwargs: Mapping[str, Any]) -> dict[str, str]:
    from ..engines.client.keys import Key
    from ..engines.server_api import CONTROL_HEADER

    api_key, control_key = (Key(name, server_kwargs.get(name)).value for name in ("api_key", "control_key"))
    return ({"Authorization": f"Bearer {api_key}"} if api_key else {}) | (
        {CONTROL_HEADER: control_key} if control_key else {}
    )


@functools.cache
def _step_recorder_class() -> Any:
    from transformers import TrainerCallback

    class StepRecorder(TrainerCallback):
        """Opens a step at the first batch of each optimizer step, and keeps the rows of those that are not logged."""

        def __init__(self, profiling: ProfilingContext) -> None:
            self._profiling, self._row, self._steps = profiling, Row(), 0
            self._scope: Any = None
            self._step: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.end_step(None, None, None)  # of a step that transformers gave up, as when a batch did not fit
            self._scope = self._profiling.step(state.global_step + 1)
            self._step = self._scope.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.end_step(None, None, None)

        def end_step(self, *error: Any) -> None:
            if self._scope is not None:
                scope, self._scope = self._scope, None
                scope.__exit__(*error)
                if self._profiling.enabled:
                    self._row.merge(self._step.row)
                    self._steps += 1

        def take(self) -> dict[str, float]:
            """The figures of all steps since the last call, and how many these were."""
            row, steps = self._row, self._steps
            self._row, self._steps = Row(), 0
            if not steps:
                return {}
            figures = key_figures(row.summary()) | {"steps": steps}
            return {log_key(name): value for name, value in figures.items()}

    return StepRecorder


def _retry_until_up(build: Callable[[], ServerGeneration], seconds: float) -> ServerGeneration:
    """Call `build` until a server answers, for at most that many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return build()
        except ServerError as error:
            if error.status == 401:
                problem = f"{error.problem}; pass the server's keys in server_kwargs, as api_key and control_key"
                raise ServerError(problem, url=error.url, status=401, reason=error.reason) from error
            if error.status is not None or time.monotonic() > deadline:
                raise
        time.sleep(min(1.0, seconds))


class Client:
    """The part of TRL's own client that TRL's trainers use."""

    def __init__(self, url: str, api_key: KeyOrFile, control_key: KeyOrFile) -> None:
        self.base_url, self._api_key, self._control_key = url, api_key, control_key

    def get_server_info(self) -> dict[str, Any]:
        """The server's configuration from vLLM's `/server_info`. Raises `ServerError`."""
        return self._ask(lambda server: server.get("/server_info?config_format=json"))["vllm_config"]

    def get_world_size(self) -> int:
        """The number of the server's workers. Raises `ServerError`."""
        return self._ask(lambda server: server.get("/get_world_size"))["world_size"]

    def reset_prefix_cache(self) -> None:
        """Empty the server's prefix cache. Raises `ServerError`."""
        self._ask(lambda server: server.post("/reset_prefix_cache", json_answer=False))

    def _ask(self, call: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        from ..engines.client.event_loop_thread import EventLoopThread
        from ..engines.client.http import HttpClient

        server = HttpClient(self.base_url, api_key=self._api_key, control_key=self._control_key, timeout=60.0)
        loop = EventLoopThread()
        try:
            return loop.run(call(server))
        finally:
            loop.run(server.close())
            loop.close()
