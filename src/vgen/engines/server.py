"""One or more vLLM servers as one engine."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import EngineError, ServerError, WeightSyncError
from ..profiling import names
from ..types import Completion, RequestTiming, Sampling, SleepReport
from ..weights.checkpoint import write_checkpoint
from .base import Phase, Request, Source
from .http import Loop, Server

T = TypeVar("T")
logger = logging.getLogger("vgen.engines.server")

CONCURRENCY = 1024
"""Calls that one server is given at a time."""
ATTEMPTS = 4
"""How often a request is sent in all before its error is the caller's. Only what was not answered is sent again."""
PROBE_TIMEOUT = 10.0


@dataclass(slots=True)
class _Call:
    """Requests that are sent together."""

    requests: Sequence[Request]
    attempts: int = 0


@dataclass(slots=True)
class _Work:
    """One `stream`: what is still to be sent, what has arrived."""

    sampling: Sampling
    headers: Mapping[str, str]
    waiting: deque[_Call]
    arrived: queue.SimpleQueue[Completion | BaseException] = field(default_factory=queue.SimpleQueue)
    unanswered: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, done: Future[None]) -> None:
        """Wake whoever waits for what will not arrive any more."""
        if not done.cancelled():
            error = done.exception()
            if isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.arrived.put(error or EngineError("the servers answered fewer completions than were asked for"))


class ServerEngine:
    """An `Engine` in front of vLLM servers that hold the same model.

    Each server takes the next call when it has finished one, so the faster one gets more. With
    `request_timing` every completion is a call of its own, because vLLM reports the timing of one prompt
    with one completion only; without it, each server is sent one batch. A server that does not answer, or
    answers that it cannot, hands its unfinished calls to the others; a completion that has arrived is
    never asked for again.
    """

    kind = "server"

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        model: str | None = None,
        vocabulary_size: int | None = None,
        request_timing: bool = True,
        pause_mode: str = "keep",
        folder: str | None = None,
    ) -> None:
        if not servers:
            raise ValueError("base_urls must name at least one server")
        self._servers, self._request_timing, self._pause_mode = tuple(servers), request_timing, pause_mode
        self._folder = folder
        self._loop = Loop()
        try:
            described = self._each(self._describe)
            for server, found in zip(self._servers, described, strict=True):
                if model is not None and model not in (found["id"], found.get("root")):
                    raise EngineError(f"{server.name} serves {found['id']!r}, not {model!r}: start it with that model")
        except BaseException:
            self.close()
            raise
        self.model: str = described[0]["id"]
        self.max_model_length: int = min(found["max_model_len"] for found in described)
        self.vocabulary_size = vocabulary_size or 1 << 31
        self.device_type = str(described[0]["device_type"])

    def stream(
        self, requests: Sequence[Request], sampling: Sampling, headers: Mapping[str, str]
    ) -> Generator[Completion]:
        """Yield each completion as it arrives. Leaving early closes the connections, which aborts the rest."""
        work = _Work(sampling, headers, deque(self._calls(requests, sampling)))
        future = self._loop.start(self._serve(work))
        future.add_done_callback(work.finish)
        try:
            for _ in requests:
                arrived = work.arrived.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            future.cancel()

    def sync(self, source: Source, version: str, phase: Phase) -> None:
        """Write a checkpoint, then pause, have every server reload it, reset the caches, resume.

        A server that failed in the middle stays paused: its weights are unknown.
        """
        with tempfile.TemporaryDirectory(prefix="vgen-weights-", dir=self._folder) as folder:
            with phase("transfer") as span:
                write_checkpoint(source, folder)
                span.set({names.GATHER_SECONDS: source.seconds})
            with phase("pause"):
                self._all("pause", lambda server: server.post(f"/pause?mode={self._pause_mode}"))
            with phase("load"):
                reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                self._all("load", lambda server: server.post("/collective_rpc", reload))
        with phase("reset_cache"):
            self._all("reset_cache", self._reset_caches)
            self._all("reset_cache", lambda server: server.post("/update_weight_version", {"new_version": version}))
        with phase("resume"):
            self._all("resume", lambda server: server.post("/resume"))

    async def _reset_caches(self, server: Server) -> None:
        answer = await server.post("/reset_prefix_cache")
        if answer is not None and answer.get("success") is False:
            raise WeightSyncError("the prefix cache could not be reset", phase="reset_cache", receiver=server.name)

    def _all(self, phase: str, call: Callable[[Server], Coroutine[Any, Any, Any]]) -> None:
        """`call` for every server, side by side; any error is a `WeightSyncError` of that phase."""
        try:
            self._each(call)
        except ServerError as error:
            raise WeightSyncError(str(error), phase=phase, receiver=error.url) from error

    def sleep(self, level: int) -> SleepReport:
        """Put every server to sleep."""
        self._each(lambda server: server.post(f"/sleep?level={level}"))
        return SleepReport(memory_freed=self.device_type != "cpu")

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        """Wake every server."""
        query = "&".join(f"tags={tag}" for tag in tags)
        self._each(lambda server: server.post(f"/wake_up?{query}"))
        return SleepReport(memory_freed=self.device_type != "cpu")

    def close(self) -> None:
        """Close the connections. The servers go on."""
        for server in self._servers:
            self._loop.run(server.close(), 5.0)
        self._loop.close()

    def _each(self, call: Callable[[Server], Coroutine[Any, Any, T]]) -> list[T]:
        """The results of `call` for all servers, side by side. All have answered before the first error is raised."""

        async def together() -> list[T | BaseException]:
            return await asyncio.gather(*(call(server) for server in self._servers), return_exceptions=True)

        results = self._loop.run(together())
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def _describe(self, server: Server) -> dict[str, Any]:
        try:
            found = dict((await server.get("/v1/models", timeout=PROBE_TIMEOUT))["data"][0])
            if not isinstance(found["max_model_len"], int):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{server.name} does not answer as a vLLM server does: is it one?") from error
        found["device_type"] = "unknown"
        try:
            config = (await server.get("/server_info?config_format=json", timeout=60.0))["vllm_config"]
            found["device_type"] = config["device_config"]["device"]
            mode = config["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                logger.warning(
                    "vgen: %s returns %s: its log-probabilities are not those that tokens were sampled with; "
                    "start it with --logprobs-mode processed_logprobs",
                    server.name,
                    mode,
                )
        except (ServerError, KeyError, TypeError):
            logger.warning(
                "vgen: %s is not in development mode: no weight sync, sleep or pause; start it with `vgen serve`, "
                "or with VLLM_SERVER_DEV_MODE=1",
                server.name,
            )
        return found

    def _calls(self, requests: Sequence[Request], sampling: Sampling) -> list[_Call]:
        if self._request_timing or sampling.seed is not None:
            return [_Call([request]) for request in requests]
        size = -(-len(requests) // len(self._servers)) or 1
        return [_Call(requests[start : start + size]) for start in range(0, len(requests), size)]

    async def _serve(self, work: _Work) -> None:
        """Have all servers work on `work` until nothing is left, or nobody."""
        work.unanswered = len(work.waiting)
        lost: list[ServerError] = []
        async with asyncio.TaskGroup() as group:
            for server in self._servers:
                group.create_task(self._keep_busy(server, work, lost))
        if work.unanswered:
            raise lost[-1]  # every server has been lost

    async def _keep_busy(self, server: Server, work: _Work, lost: list[ServerError]) -> None:
        """Send `server` calls, `CONCURRENCY` at a time, until all are answered or it is lost."""
        busy: set[asyncio.Task[ServerError | None]] = set()
        while work.unanswered:
            while work.waiting and len(busy) < CONCURRENCY:
                busy.add(asyncio.create_task(self._send(server, work.waiting.popleft(), work)))
            work.changed.clear()
            change = asyncio.create_task(work.changed.wait())
            done, _ = await asyncio.wait({*busy, change}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            busy -= done
            errors = [error for task in done - {change} if isinstance(error := task.result(), ServerError)]
            if errors:
                # The others in flight fail by themselves if it is gone; what they bring is welcome.
                lost += errors
                for task in busy:
                    await task
                return

    async def _send(self, server: Server, call: _Call, work: _Work) -> ServerError | None:
        """One call; an error that may be the server's puts it back for others and is returned."""
        call.attempts += 1
        try:
            completions = await _complete(server, self.model, call.requests, work.sampling, work.headers)
        except ServerError as error:
            if not error.retryable or call.attempts >= ATTEMPTS:
                raise
            work.waiting.append(call)
            work.changed.set()
            return error
        for completion in completions:
            work.arrived.put(completion)
        work.unanswered -= 1
        work.changed.set()
        return None


async def _complete(
    server: Server, model: str, requests: Sequence[Request], sampling: Sampling, headers: Mapping[str, str]
) -> list[Completion]:
    """Sample `requests` by one call of `/v1/completions`."""
    prompts = [list(request.token_ids) for request in requests]
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "seed": requests[0].seed,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        **sampling.extra,
    }
    if sampling.structured_outputs_regex is not None:
        body["structured_outputs"] = {"regex": sampling.structured_outputs_regex}
    answer = await server.infer("/v1/completions", body, headers)
    now = time.monotonic_ns()
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        timing = _timing(answer.get("metrics"), now, answer.get("usage"))
        return [
            _completion(request, choice, f"{answer['id']}-{index}", timing)
            for index, (request, choice) in enumerate(zip(requests, choices, strict=True))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError("answered completions in a shape that is not vLLM's", url=server.name) from error


def _completion(
    request: Request, choice: Mapping[str, Any], request_id: str, timing: RequestTiming | None
) -> Completion:
    found = choice.get("logprobs")
    logprobs = top = None
    if found is not None:
        logprobs = [_number(value) for value in found["token_logprobs"]]
        if any(len(position or ()) > 1 for position in found["top_logprobs"] or ()):
            top = [
                sorted(
                    ((int(token.removeprefix("token_id:")), _number(value)) for token, value in position.items()),
                    key=lambda pair: -math.inf if pair[1] is None else -pair[1],
                )
                for position in found["top_logprobs"]
            ]
    return Completion(
        prompt_index=request.prompt_index,
        generation_index=request.generation_index,
        token_ids=choice["token_ids"],
        logprobs=logprobs,
        top_logprobs=top,
        prompt_logprobs=_prompt_logprobs(request, choice.get("prompt_logprobs")),
        finish_reason=choice["finish_reason"],
        request_id=request_id,
        timing=timing,
    )


def _prompt_logprobs(request: Request, found: Sequence[Mapping[str, Any] | None] | None) -> list[float | None] | None:
    if found is None:
        return None
    pairs = zip(found, request.token_ids, strict=True)
    return [None if at is None else _number(at[str(token)]["logprob"]) for at, token in pairs]


def _number(logprob: float | None) -> float | None:
    return None if logprob is None or math.isnan(logprob) else logprob


def _timing(metrics: Mapping[str, Any] | None, now: int, usage: Mapping[str, Any] | None) -> RequestTiming | None:
    """The engine's own intervals, laid so that they end when the answer arrived: its clock is not this one."""
    if not metrics or metrics.get("time_to_first_token_ms") is None:
        return None
    queued, prefill = (metrics.get("queue_time_ms") or 0.0) / 1e3, metrics["time_to_first_token_ms"] / 1e3
    decode = (metrics.get("generation_time_ms") or 0.0) / 1e3
    per_token = metrics.get("mean_itl_ms")
    cached = ((usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    e2e = queued + prefill + decode
    return RequestTiming(
        queued_ns=now - int(e2e * 1e9),
        finished_ns=now,
        queue=queued,
        prefill=prefill,
        decode=decode,
        time_to_first_token=queued + prefill,
        time_per_output_token=None if per_token is None else per_token / 1e3,
        e2e=e2e,
        cached_tokens=cached,
    )
