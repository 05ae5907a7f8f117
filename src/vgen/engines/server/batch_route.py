"""vgen's batch route, in the server: one call for many completions, each with its timing and weight versions.

No endpoint of vLLM's reports everything about a completion (docs/servers.md has the table), and the endpoints that
report the most take one call for each completion. This route asks the same engine, and answers as each is finished.
"""

from __future__ import annotations

import asyncio
import functools
import io
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ... import completion_codec as codec
from ...completion_codec import Alive, BatchRequest, Done, End, Failed, Frame
from ...engine_protocol import Request as EngineRequest
from ...errors import PromptError
from .. import vllm_prompts
from ..vllm_outputs import completion_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from .core_health import CoreHealth


async def generate(request: Request) -> Response:
    """Answer with one frame for each completion; with a status of 4xx and JSON where the whole call is wrong.

    The status is 413 for a body of more than `completion_codec.BODY_LIMIT` bytes, and 400 for all else.
    """
    from starlette.responses import StreamingResponse

    try:
        batch = codec.decode_request(await _body(request))
        answer = await BatchAnswer.of(batch, request.app.state)
    except _TooLong as error:
        return _refusal(413, error)
    except (ValueError, TypeError) as error:
        return _refusal(400, error)
    return StreamingResponse(answer.frames(), media_type=codec.MEDIA_TYPE)


class _TooLong(Exception):
    """The body has more bytes than a call may have."""

    def __init__(self) -> None:
        super().__init__(f"the body is longer than {codec.BODY_LIMIT} bytes: send fewer prompts or images in one call")


async def _body(request: Request) -> bytearray:
    """Read the body. Raises `_TooLong` before it holds more than `completion_codec.BODY_LIMIT` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > codec.BODY_LIMIT:
        raise _TooLong
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > codec.BODY_LIMIT:
            raise _TooLong
        body += chunk
    return body


def _refusal(status: int, error: Exception) -> Response:
    from starlette.responses import JSONResponse

    # A client may still be sending the rest of a body that is too long: the connection is of no further use.
    headers = {"connection": "close"} if status == 413 else None
    body = {"error": {"message": str(error), "type": "BadRequestError", "code": status}}
    return JSONResponse(body, status, headers)


ROUTES = {codec.PATH: generate}
"""The function that answers a POST, by path."""
PIXEL_LIMIT = 1 << 26
"""How many pixels an image may have: 8,192 × 8,192. A file of some bytes can claim billions."""


class BatchAnswer:
    """The completions of one call, while the engine samples them."""

    def __init__(
        self,
        batch: BatchRequest,
        engine: Any,
        inputs: list[Any],
        parameters: list[Any],
        lora: Any,
        problem: Callable[[], str] = str,
    ) -> None:
        self._batch, self._engine, self._inputs, self._parameters = batch, engine, inputs, parameters
        self._lora, self._problem, self._finished = lora, problem, asyncio.Queue[Done | Failed]()
        self._unfinished = {index: f"{batch.id}-{index}" for index in range(len(batch.wanted))}
        """The IDs by which the engine knows the completions to come, by their indices."""

    @classmethod
    async def of(cls, batch: BatchRequest, state: Any) -> BatchAnswer:
        """Raises `ValueError` where the engine refuses the sampling parameters, or does not have the adapter."""
        from ...types import Sampling
        from ..sampling import sampling_params

        sampling = Sampling(**batch.sampling)
        _verify(sampling, state)
        parameters = [sampling_params(sampling, wanted.seed) for wanted in batch.wanted]
        lora = None
        if batch.lora_name is not None:
            adapters: Mapping[str, Any] = state.openai_serving_models.lora_requests
            if batch.lora_name not in adapters:
                raise ValueError(f"there is no LoRA adapter named {batch.lora_name!r} here")
            lora = adapters[batch.lora_name]
        inputs = await asyncio.gather(*(_input(batch, i, state) for i in range(len(batch.prompts))))
        health: CoreHealth | None = getattr(state, "vgen_health", None)
        problem = str if health is None else lambda: health.problem
        return cls(batch, state.engine_client, list(inputs), parameters, lora, problem)

    async def frames(self) -> AsyncIterator[bytes]:
        """The answer's frames. Leaving the iteration early aborts the unfinished completions."""
        tasks = [asyncio.create_task(self._sample(index, name)) for index, name in self._unfinished.items()]
        try:
            while self._unfinished:
                yield b"".join(map(codec.frame_bytes, await self._next()))
            yield codec.frame_bytes(End())
        finally:
            for task in tasks:
                task.cancel()

    async def _next(self) -> Sequence[Frame]:
        """The completions that have finished, or a sign of life; failures if the engine cannot work."""
        try:
            async with asyncio.timeout(codec.HEARTBEAT_SECONDS):
                ready = [await self._finished.get()]
        except TimeoutError:
            if not (problem := self._problem()):
                return [Alive(len(self._unfinished), self._tokens())]
            failed = [Failed(index, 503, problem) for index in self._unfinished]
            self._unfinished.clear()
            return failed
        while not self._finished.empty():  # what one scheduler step has finished goes out in one piece
            ready.append(self._finished.get_nowait())
        for frame in ready:
            del self._unfinished[frame.index]
        return ready

    def _tokens(self) -> int | None:
        """How many tokens the unfinished completions have."""
        try:
            states, own = self._engine.output_processor.request_states.values(), set(self._unfinished.values())
            return sum(s.stats.num_generation_tokens for s in states if s.external_req_id in own)
        except AttributeError:  # another version of vLLM, or one that runs without statistics
            return None

    async def _sample(self, index: int, request_id: str) -> None:
        wanted, parameters = self._batch.wanted[index], self._parameters[index]
        engine_input = self._inputs[wanted.prompt]
        try:
            if isinstance(engine_input, Exception):
                raise engine_input
            stream = self._engine.generate(
                engine_input,
                parameters,
                request_id,
                lora_request=self._lora,
                trace_headers={"traceparent": wanted.traceparent} if wanted.traceparent else None,
                priority=self._batch.priority,
            )
            outputs = [output async for output in stream]  # a single one: the parameters ask for the final output
            # The client numbers the completion itself, by `index`.
            request = EngineRequest(wanted.prompt, 0, (), wanted.seed)
            completion = completion_of(request, outputs[-1], top=bool(parameters.logprobs))
            self._finished.put_nowait(Done(index, codec.pack(completion), time.monotonic_ns()))
        except Exception as error:
            self._finished.put_nowait(_failed(index, error))


def _verify(sampling: Any, state: Any) -> None:
    """Raise `ValueError` for parameters that the engine refuses with any prompt, and name the parameter."""
    problem = _problem(sampling, state)
    if problem is None:
        return
    if sampling.structured_outputs is not None and not _problem(replace(sampling, structured_outputs=None), state):
        raise ValueError(f"Sampling.structured_outputs was refused by vLLM: {problem}")
    raise ValueError(f"vLLM refused the sampling parameters: {problem}")


def _problem(sampling: Any, state: Any) -> str | None:
    from ..sampling import require_readable, sampling_params

    config, engine = state.vllm_config, state.engine_client
    try:
        parameters = sampling_params(sampling, None)
        require_readable(parameters)
        parameters.verify(
            config.model_config, config.speculative_config, config.structured_outputs_config, engine.get_tokenizer()
        )
    except _refusals() as error:
        return str(error)
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        # vLLM checks few types, and stumbles over values of a wrong one.
        return f"it cannot read them ({type(error).__name__})"
    return None


async def _input(batch: BatchRequest, index: int, state: Any) -> Any:
    """The prompt as the engine takes it, or the error with which it is refused."""
    config, renderer = state.vllm_config.model_config, state.engine_client.renderer
    try:
        files = batch.images[index] if batch.images else []
        images = await asyncio.to_thread(_opened, index, files) if files else []
        prompt = vllm_prompts.model_prompt(index, codec.to_ints(batch.prompts[index]), images, config)
        if not images:
            return (await renderer.render_cmpl_async([prompt]))[0]
        try:
            (rendered,) = await renderer.render_cmpl_async([prompt], skip_mm_cache=True)
        except vllm_prompts.prompt_errors() as error:
            return vllm_prompts.images_refused(index, error)
        return vllm_prompts.checked_length(index, rendered, config)
    except _refusals() as error:
        return error


def _opened(index: int, files: list[bytes]) -> list[Any]:
    """Decode the prompt's PNG files. Raises `PromptError` for other formats, broken files and too many pixels."""
    try:
        return [_decoded(index, file) for file in files]
    except PromptError:
        raise
    except Exception as error:  # PIL raises many kinds
        raise PromptError(index, f"has an image that PIL does not open as PNG ({type(error).__name__})") from error


def _decoded(index: int, file: bytes) -> Any:
    from PIL import Image

    # The client sends PNG. PIL's parsers of all other formats stay out of an attacker's reach.
    image = Image.open(io.BytesIO(file), formats=["PNG"])  # reads the header only
    if image.width * image.height > PIXEL_LIMIT:
        raise PromptError(index, f"has an image of {image.width} × {image.height} pixels; the limit is {PIXEL_LIMIT}")
    image.load()
    return image


@functools.cache
def _refusals() -> tuple[type[Exception], ...]:
    """What the engine raises for a request that is not right."""
    return (*vllm_prompts.request_errors(), TypeError)


def _failed(index: int, error: Exception) -> Failed:
    """The frame for `error`. It leaves out the prompt's place in this batch, which means nothing to the caller."""
    if isinstance(error, PromptError):
        return Failed(index, 400, error.problem, error.limit)
    return Failed(index, 400 if isinstance(error, _refusals()) else 503, f"{type(error).__name__}: {error}")
