"""vgen's batch route, in the server: one call for many completions, each with its timing and weight versions.

No endpoint of vLLM's gives all of a completion's numbers (docs/servers.md has the table), and those that give the most
take a call for each completion. This route asks the same engine for the same, and answers as each is done.
"""

from __future__ import annotations

import asyncio
import functools
import io
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import PromptError
from . import frames, prompts
from .frames import Alive, BatchRequest, Done, End, Failed, Wanted
from .timing import times_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


def install(app: Any) -> None:
    """Add the route to vLLM's application, behind vLLM's own middleware. May be called any number of times."""
    from starlette.routing import Route

    if not any(getattr(route, "path", None) == frames.PATH for route in app.router.routes):
        app.router.routes.insert(0, Route(frames.PATH, generate, methods=["POST"]))


async def generate(request: Request) -> Response:
    """Answer with a frame for each completion; 400 with JSON for what makes no sense as a whole."""
    from starlette.responses import JSONResponse, StreamingResponse

    state = request.app.state
    try:
        batch = frames.decode_request(await request.body())
        work = await _Work.of(batch, state)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
    return StreamingResponse(work.frames(), media_type=frames.MEDIA_TYPE)


class _Work:
    """One call's completions, on their way through the engine."""

    def __init__(self, batch: BatchRequest, engine: Any, inputs: list[Any], parameters: list[Any], lora: Any) -> None:
        self._batch, self._engine, self._inputs, self._parameters = batch, engine, inputs, parameters
        self._lora, self._done = lora, asyncio.Queue[Done | Failed]()

    @classmethod
    async def of(cls, batch: BatchRequest, state: Any) -> _Work:
        """Raises `ValueError` where the sampling makes no sense, or the adapter is not there."""
        from ..types import Sampling
        from .sampling import sampling_params

        sampling = Sampling(**batch.sampling)
        _verify(sampling, state)
        parameters = [_final(sampling_params(sampling, wanted.seed)) for wanted in batch.wanted]
        lora = None
        if batch.lora_name is not None:
            loaded: Mapping[str, Any] = state.openai_serving_models.lora_requests
            if batch.lora_name not in loaded:
                raise ValueError(f"there is no LoRA adapter named {batch.lora_name!r} here")
            lora = loaded[batch.lora_name]
        inputs = await asyncio.gather(*(_input(batch, i, state) for i in range(len(batch.prompts))))
        return cls(batch, state.engine_client, list(inputs), parameters, lora)

    async def frames(self) -> AsyncIterator[bytes]:
        """Leaving it early aborts what is not done."""
        left = len(self._batch.wanted)
        tasks = [asyncio.create_task(self._one(index, wanted)) for index, wanted in enumerate(self._batch.wanted)]
        try:
            while left:
                try:
                    async with asyncio.timeout(frames.HEARTBEAT_SECONDS):
                        ready = [await self._done.get()]
                except TimeoutError:
                    yield frames.pack(Alive(left, self._tokens()))
                    continue
                while not self._done.empty():  # those that one scheduler step has finished go out together
                    ready.append(self._done.get_nowait())
                left -= len(ready)
                yield b"".join(map(frames.pack, ready))
            yield frames.pack(End())
        finally:
            for task in tasks:
                task.cancel()

    def _tokens(self) -> int | None:
        """How many tokens those that are not done have."""
        prefix = f"{self._batch.id}-"
        try:
            states = self._engine.output_processor.request_states.values()
            return sum(s.stats.num_generation_tokens for s in states if s.external_req_id.startswith(prefix))
        except AttributeError:  # another vLLM's, or one without statistics
            return None

    async def _one(self, index: int, wanted: Wanted) -> None:
        engine_input = self._inputs[wanted.prompt]
        try:
            if isinstance(engine_input, Exception):
                raise engine_input
            stream = self._engine.generate(
                engine_input,
                self._parameters[index],
                f"{self._batch.id}-{index}",
                lora_request=self._lora,
                trace_headers={"traceparent": wanted.traceparent} if wanted.traceparent else None,
                priority=self._batch.priority,
            )
            outputs = [output async for output in stream]  # one alone: it asks for the final one
            self._done.put_nowait(_done(index, outputs[-1]))
        except Exception as error:
            self._done.put_nowait(_failed(index, error))


def _verify(sampling: Any, state: Any) -> None:
    """Raise for what the engine would take of no prompt, and name the parameter."""
    from dataclasses import replace

    problem = _problem(sampling, state)
    if problem is None:
        return
    if sampling.structured_outputs is not None and not _problem(replace(sampling, structured_outputs=None), state):
        raise ValueError(f"Sampling.structured_outputs was refused by vLLM: {problem}")
    raise ValueError(f"vLLM refused the sampling parameters: {problem}")


def _problem(sampling: Any, state: Any) -> str | None:
    from .sampling import sampling_params

    config, engine = state.vllm_config, state.engine_client
    try:
        parameters = sampling_params(sampling, None)
        parameters.verify(
            config.model_config, config.speculative_config, config.structured_outputs_config, engine.get_tokenizer()
        )
    except _refusals() as error:
        return str(error)
    return None


async def _input(batch: BatchRequest, index: int, state: Any) -> Any:
    """The prompt as the engine takes it, or the error that it is refused with."""
    config, renderer = state.vllm_config.model_config, state.engine_client.renderer
    try:
        images = _opened(index, batch.images[index]) if batch.images else []
        prompt = prompts.model_prompt(index, frames.to_ints(batch.prompts[index]), images, config)
        if not images:
            return (await renderer.render_cmpl_async([prompt]))[0]
        try:
            (found,) = await renderer.render_cmpl_async([prompt], skip_mm_cache=True)
        except prompts.refusals() as error:
            return prompts.misplaced(index, error)
        return prompts.rendered(index, found, config)
    except _refusals() as error:
        return error


def _opened(index: int, pictures: list[bytes]) -> list[Any]:
    from PIL import Image

    try:
        return [Image.open(io.BytesIO(raw)) for raw in pictures]
    except Exception as error:  # PIL has many
        raise PromptError(index, f"has an image that PIL does not open ({type(error).__name__})") from error


@functools.cache
def _refusals() -> tuple[type[Exception], ...]:
    """What the engine raises for a request that is not right."""
    return (*prompts.said(), TypeError)


def _final(parameters: Any) -> Any:
    from vllm.sampling_params import RequestOutputKind

    parameters.output_kind = RequestOutputKind.FINAL_ONLY
    return parameters


def _failed(index: int, error: Exception) -> Failed:
    """A refusal travels without the place that its prompt has here: the client knows its own."""
    if isinstance(error, PromptError):
        return Failed(index, 400, error.problem, error.limit)
    return Failed(index, 400 if isinstance(error, _refusals()) else 503, f"{type(error).__name__}: {error}")


def _done(index: int, output: Any) -> Done:
    """The engine's output as it travels."""
    result, stats = output.outputs[0], output.metrics
    token_ids = list(result.token_ids)
    logprobs = top = prompt_logprobs = None
    if result.logprobs is not None:
        logprobs = frames.floats(at[token].logprob for at, token in zip(result.logprobs, token_ids, strict=True))
        if any(len(at) > 1 for at in result.logprobs):
            top = [_likeliest(at) for at in result.logprobs]
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        prompt_logprobs = frames.floats(float("nan") if at is None else at[token].logprob for at, token in pairs)
    return Done(
        index=index,
        finish_reason=result.finish_reason,
        token_ids=frames.ints(token_ids),
        logprobs=logprobs,
        top=top,
        prompt_logprobs=prompt_logprobs,
        versions=[(span.version, span.start, span.end) for span in result.weight_versions or ()] or None,
        times=times_of(stats),
        now=time.monotonic(),
        preemptions=0 if stats is None else stats.num_preemptions,
        cached_tokens=output.num_cached_tokens or 0,
    )


def _likeliest(at: Mapping[int, Any]) -> tuple[bytes, bytes]:
    ordered = sorted(at.items(), key=lambda item: item[1].rank)
    return frames.ints(token for token, _ in ordered), frames.floats(found.logprob for _, found in ordered)
