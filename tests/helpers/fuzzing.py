"""Four readers of what strangers and peers send, for a coverage-guided fuzzer: `fuzzing.py TARGET SECONDS [FOLDER]`.

A target is a function of bytes. It raises where a rule is broken: an error that is not typed, an answer that is not
whole, an engine that would be lost. `fuzz` runs one under atheris, which counts the branches of vgen that an input
reaches and goes on from those that reach new ones. What it found before is in `regressions`, and runs in every round.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

REGRESSIONS = Path(__file__).parents[1] / "fuzz" / "regressions"
HANG_SECONDS = 20
"""An input that takes longer is a hang."""
MEMORY_MB = 4096
LONGEST = 8192
"""The most bytes of an input."""
RAW = 0x80
"""An input whose first byte is as large is read as it is; another one chooses changes of an example."""


class Choices:
    """Bytes as a sequence of choices. When they are used up, each choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def bytes(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def number(self, below: int) -> int:
        return int.from_bytes(self.bytes(1 if below <= 256 else 4), "big") % below

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.number(len(options))]


EDGES = (0, 1, -1, 2, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.5, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "0", "a", "\0", "é", "\x1b[2J", "x" * 300, "-1", "1e5", "nan", "</script>", "2" * 5000)


def anything(choices: Choices, names: Sequence[str], nested: int = 3) -> Any:
    """A value of any kind, with keys and texts out of `names` among others."""
    kind = choices.number(12 if nested else 9)
    if kind < 9:
        return (
            lambda: None,
            lambda: bool(choices.number(2)),
            lambda: choices.of(EDGES),
            lambda: int.from_bytes(choices.bytes(8), "big", signed=True),
            lambda: choices.of(FLOATS),
            lambda: choices.of(TEXTS),
            lambda: choices.of(names),
            lambda: choices.bytes(choices.number(17)).decode("latin-1"),
            lambda: choices.bytes(choices.number(33)),
        )[kind]()
    inner = [anything(choices, names, nested - 1) for _ in range(choices.number(4))]
    if kind < 11:
        return inner
    return {choices.of(names) if choices.number(4) else choices.of(TEXTS): each for each in inner}


def changed(choices: Choices, example: Any, names: Sequence[str]) -> Any:
    """A copy of `example` in which some values are others, missing, repeated or additional."""
    value = copy.deepcopy(example)
    for _ in range(1 + choices.number(4)):
        if not isinstance(value, dict | list) or not value:
            return anything(choices, names)
        holder: Any = value
        while True:
            place = choices.of(list(holder)) if isinstance(holder, dict) else choices.number(len(holder))
            inner = holder[place]
            if not isinstance(inner, dict | list) or not inner or not choices.number(4):
                break
            holder = inner
        act = choices.number(6)
        if act == 0:
            del holder[place]
        elif act == 1 and isinstance(holder, dict):
            holder[choices.of(names)] = anything(choices, names)
        elif act == 1:
            holder.insert(place, copy.deepcopy(inner))
        elif act == 2:
            holder[place] = anything(choices, names)
        else:
            holder[place] = alike(choices, inner, names)
    return value


def alike(choices: Choices, value: Any, names: Sequence[str]) -> Any:
    """Another value of the same kind, which a typed decoder lets through."""
    if isinstance(value, bytes):
        return (value[:-1], value + b"\0", b"", choices.bytes(len(value)), value * 2)[choices.number(5)]
    if isinstance(value, bool) or value is None:
        return anything(choices, names)
    if isinstance(value, int):
        return choices.of(EDGES)
    if isinstance(value, float):
        return choices.of(FLOATS)
    if isinstance(value, str):
        return choices.of(TEXTS + tuple(names))
    if isinstance(value, list):
        return (value[:-1], value * 2, [], value[::-1])[choices.number(4)]
    return {}


def input_of(data: bytes, examples: Sequence[Any], names: Sequence[str], encode: Callable[[Any], bytes]) -> bytes:
    """The bytes that a target reads: those of `data` as they are, or a changed example."""
    if not data or data[0] >= RAW:
        return data[1:]
    choices = Choices(data[1:])
    return encode(changed(choices, choices.of(examples), names))


def seeds(examples: Sequence[Any], encode: Callable[[Any], bytes]) -> list[bytes]:
    kinds = range(max(8, len(examples)))
    raw = [bytes([RAW + kind]) + encode(examples[kind % len(examples)]) for kind in kinds]
    return raw + [bytes([kind]) + Random(kind).randbytes(32) for kind in kinds]


# --- the batch route in the server -----------------------------------------------------------------------------------

SAMPLING_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop", "stop_token_ids", "seed", "extra"),
    *("logprobs", "prompt_logprobs", "ignore_eos", "structured_outputs", "n", "bad_words", "logit_bias", "json"),
    *("allowed_token_ids", "id", "prompts", "wanted", "sampling", "images", "lora_name", "priority", "skip_clone"),
)


@cache
def _batch_examples() -> list[Any]:
    from PIL import Image

    from vgen import completion_codec as codec

    file = BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    prompt = codec.ints([1, 2, 3])
    plain = {"id": "x", "prompts": [prompt], "wanted": [[0, None, None]], "sampling": {}}
    sampling = {"temperature": 0.5, "max_tokens": 4, "stop": ["a"], "logprobs": 2, "extra": {"bad_words": ["b"]}}
    wanted = [[0, 7, "00-" + "a" * 32 + "-" + "b" * 16 + "-01"], [1, None, None]]
    return [
        plain,
        plain | {"prompts": [prompt, b""], "wanted": wanted, "sampling": sampling, "priority": 3},
        plain | {"images": [[file.getvalue()]], "lora_name": "adapter"},
    ]


class _Engine:
    """A server's engine. Its core is lost if it cannot decode a request's parameters."""

    def __init__(self) -> None:
        self.renderer = SimpleNamespace(render_cmpl_async=self._render)
        self.output_processor = SimpleNamespace(request_states={})

    def get_tokenizer(self) -> None: ...

    async def _render(self, prompts: list[Any], **_: Any) -> list[Any]:
        return [prompt["prompt_token_ids"] for prompt in prompts]

    async def generate(self, prompt: Any, parameters: Any, request_id: str, **_: Any) -> Any:
        from vllm import SamplingParams
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(parameters))
        result = SimpleNamespace(token_ids=prompt, logprobs=None, finish_reason="length", weight_versions=None)
        result = SimpleNamespace(outputs=[result], request_id=request_id, prompt_logprobs=None, metrics=None)
        result.num_cached_tokens = 0
        yield result


def batch_route(data: bytes) -> None:
    """The body of a call of the batch route: refused with 400, or answered with a frame for each completion."""
    from starlette.requests import Request
    from vllm import SamplingParams

    from vgen import completion_codec as codec
    from vgen.engines.server import batch_route as route

    SamplingParams.verify = lambda *_: None  # it needs a model's whole configuration
    body = input_of(data, _batch_examples(), SAMPLING_NAMES, codec.encode)
    model = SimpleNamespace(is_multimodal_model=True, is_encoder_decoder=False, hf_config=None, max_model_len=64)
    config = SimpleNamespace(model_config=model, speculative_config=None, structured_outputs_config=None)
    models = SimpleNamespace(lora_requests={"adapter": object()})
    state = SimpleNamespace(vllm_config=config, engine_client=_Engine(), openai_serving_models=models)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def call() -> None:
        scope = {"type": "http", "method": "POST", "headers": [], "app": SimpleNamespace(state=state)}
        response: Any = await route.generate(Request(scope, receive))
        if response.status_code != 200:
            assert response.status_code == 400, response.status_code
            assert json.loads(response.body)["error"]["message"]
            return
        answer = b"".join([chunk async for chunk in response.body_iterator])
        *frames, end = _frames(answer)
        assert isinstance(end, codec.End)
        assert sorted(frame.index for frame in frames) == list(range(len(codec.decode_request(body).wanted)))
        lost = [frame.message for frame in frames if isinstance(frame, codec.Failed) and frame.status >= 500]
        assert not lost, f"the engine's core cannot read what the route let through: {lost}"

    asyncio.run(call())


def _frames(answer: bytes) -> Generator[Any]:
    from vgen import completion_codec as codec

    while answer:
        length = int.from_bytes(answer[:4], "big")
        yield codec.decode_frame(answer[4 : 4 + length])
        answer = answer[4 + length :]


# --- the ranks' codec ------------------------------------------------------------------------------------------------

RANK_NAMES = ("ask", "begun", "alive", "done", "data", "error", "probe", "terms", "carrier", "result", "clock_ns")
RANK_NAMES += ("refused", "at", "code", "fields", "problem", "prompt", "rank", "index", "traceparent", "vgen", "RGB")


@cache
def _rank_examples() -> list[Any]:
    import msgspec

    from vgen import PromptError
    from vgen.completion_codec import pack
    from vgen.distributed.rank_consensus import pack_error
    from vgen.profiling import ProfilingContext

    error = pack_error(PromptError(3, "is empty"), 1)
    completion = msgspec.to_builtins(pack(_completion()), builtin_types=(bytes,))
    pixels = [["RGB", [1, 1], None, b"abc"], ["P", [1, 1], [0, 0, 0], b"a"]]
    prompt = [0, struct.pack("<2i", 1, 2), pixels]
    clock = {"clock_ns": 5, "refused": error}
    carrier = ProfilingContext.disabled().carrier()
    return [
        ["ask", 1, 1, {"terms": {}}, [prompt], []],
        ["begun", 1, 0, {"carrier": carrier}, [], []],
        ["error", 1, 1, {"error": error, "at": 1.5}, [], []],
        ["data", 1, 0, clock, [], [completion, completion]],
        ["data", 1, 0, {"result": {"a": [1]}}, [], []],
        ["alive", 1, 0, {}, [], []],
        ["done", 1, 0, {}, [], []],
    ]


def _completion() -> Any:
    from vgen.types import Completion, RequestTiming

    return Completion(
        rank=1,
        prompt_index=0,
        generation_index=1,
        token_ids=[1, 2],
        logprobs=[-0.5, None],
        top_logprobs=[[(1, -0.5)], [(2, -0.25), (3, -0.75)]],
        prompt_logprobs=[None, -1.0],
        finish_reason="length",
        weight_version="1",
        weight_versions=[("1", 0, 2)],
        request_id="x-0",
        timing=RequestTiming(
            queued_ns=5,
            finished_ns=9,
            queue=0.1,
            prefill=0.1,
            decode=0.1,
            time_to_first_token=0.1,
            time_per_output_token=0.1,
            e2e=0.3,
        ),
    )


class _Pipe:
    """A connection to a rank that has sent these messages and is gone."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self.messages = list(messages)

    def send(self, content: bytes, timeout: float) -> int:
        return len(content)

    def receive(self, timeout: float) -> tuple[bytearray, int]:
        if not self.messages:
            raise ConnectionError("gone")
        message = bytearray(self.messages.pop(0))
        return message, len(message)


def rank_messages(data: bytes) -> None:
    """Messages of other ranks, to the leader and to another rank: understood, or an error of vgen's."""
    import msgspec

    from vgen import ProfilingContext
    from vgen.distributed import collective_call
    from vgen.distributed.collective_call import Channel
    from vgen.distributed.rank_consensus import fail_together

    # Whoever waits for a message learns that the rank is gone; whoever only looks finds nothing.
    collective_call.ready = lambda peers, timeout: [rank for rank, pipe in peers.items() if timeout or pipe.messages]
    encode = msgspec.msgpack.Encoder().encode
    messages = [input_of(part, _rank_examples(), RANK_NAMES, encode) for part in data.split(b"\xff\xff\xff")]
    for index, peer in ((0, 1), (1, 0)):
        channel = Channel(index, {peer: _Pipe(messages)}, 1.0, ProfilingContext.disabled())  # pyright: ignore
        with _typed(passed_on=True), channel.taken("generate") as call, fail_together(call):
            prompts = call.gather([], {})
            call.lead(list)
            if index == 0:
                call.raise_reported()
            call.scatter([]) if len(messages) % 2 or index == 0 else call.share(dict)
            for prompt in prompts:
                assert all(type(token) is int for token in prompt.token_ids)


@contextmanager
def _typed(*, passed_on: bool = False) -> Generator[None]:
    """A block that may raise vgen's errors; with `passed_on` also what another process has raised."""
    from vgen.errors import VgenError

    try:
        yield
    except VgenError as error:
        str(error).encode()  # it can be printed
    except Exception as error:
        if not (passed_on and (hasattr(error, "raised_on") or "with another" in str(error))):
            raise


# --- what servers reply ----------------------------------------------------------------------------------------------

REPLY_NAMES = (
    *("id", "choices", "index", "token_ids", "finish_reason", "logprobs", "token_logprobs", "top_logprobs", "usage"),
    *("prompt_logprobs", "metrics", "time_to_first_token_ms", "queue_time_ms", "generation_time_ms", "error", "type"),
    *("message", "detail", "loc", "msg", "data", "max_model_len", "features", "version", "vllm_config", "lease"),
    *("model_config", "shape", "weights", "world_size", "max_num_seqs", "workers", "instance", "prompt_tokens"),
    *("completion_tokens", "prompt_tokens_details", "cached_tokens", "weight_version", "problem", "fields", "code"),
)


@cache
def _reply_examples() -> list[Any]:
    choice = {"index": 0, "token_ids": [4, 5], "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5, None]}}
    choice["logprobs"]["top_logprobs"] = [{"token_id:4": -0.5, "token_id:5": -1.5}, None]
    choice["prompt_logprobs"] = [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -1.0}}]
    metrics = {"time_to_first_token_ms": 3.0, "queue_time_ms": 1.0, "generation_time_ms": 5.0}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    error = {"error": {"message": "says no", "type": "BadRequestError", "code": 400}}
    config = {"model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "model": "m"}}
    config |= {"device_config": {"device": "cpu"}, "scheduler_config": {"max_num_seqs": 4}, "instance_id": "i"}
    vgen = {"features": ["batch", "lease"], "device": "cpu", "dtype": "float32", "max_num_seqs": 4, "world_size": 1}
    return [
        {"id": "x", "choices": [choice], "metrics": metrics, "usage": usage},
        {"id": "x", "choices": [choice]},
        error,
        {"detail": [{"loc": ["body"], "msg": "missing", "input": "private"}]},
        {"data": [{"id": "m", "max_model_len": 64}], "version": "0.32.0", "vllm_config": config, "workers": 1} | vgen,
        {"shape": {"vocab_size": 100}, "host": "h", "lease": {"holder": "x"}, "weights": "failed", "version": "0.1"},
    ]


@cache
def _frame_examples() -> list[Any]:
    import msgspec

    from vgen import completion_codec as codec

    done = codec.Done(0, codec.pack(_completion()), 5)
    other = codec.Done(1, codec.pack(_completion()), 5)
    frames = [done, other, codec.Failed(1, 400, "is too long", 5), codec.Failed(1, 503, "broke"), codec.Alive(2, 5)]
    plain = [msgspec.to_builtins(frame, builtin_types=(bytes,)) for frame in (*frames, codec.End())]
    return [plain[:2] + plain[-1:], plain[:1] + plain[2:3] + plain[-1:], plain[3:5] + plain[-1:], plain]


class _Replies:
    """Stands for an `aiohttp.ClientSession` whose server sends these bodies, one after the other, the last for ever."""

    def __init__(self, replies: Sequence[tuple[int, bytes]]) -> None:
        self._replies, self.count = list(replies), 0

    def request(self, method: str, url: str, **_: Any) -> _Replies:
        return self

    async def __aexit__(self, *_: Any) -> None: ...

    async def __aenter__(self) -> Any:
        self.count += 1
        assert self.count < 100, "the client asks for ever"
        status, body = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        content = asyncio.StreamReader()
        content.feed_data(body)
        content.feed_eof()

        async def read() -> bytes:
            return body

        return SimpleNamespace(status=status, read=read, content=content)


STATUSES = (200, 200, 200, 400, 404, 500, 503, 307)


def http_replies(data: bytes) -> None:
    """What a server answers to a client: completions, frames, errors, and what it says of itself."""
    from vgen import Sampling
    from vgen.completion_codec import encode
    from vgen.engine_protocol import Batch, Request
    from vgen.engines.client import batch_client, discovery, openai_client
    from vgen.engines.client.http import HttpClient
    from vgen.types import Completion

    def framed(frames: Any) -> bytes:
        each = [encode(frame) for frame in (frames if isinstance(frames, list) else [frames])]
        return b"".join(len(frame).to_bytes(4, "big") + frame for frame in each)

    def as_json(value: Any) -> bytes:
        return json.dumps(value, default=lambda each: each.decode("latin-1")).encode("utf-8", "surrogatepass")

    kind, *parts = data[:1] or b"\0", *data[1:].split(b"\xff\xff\xff")
    route = kind[0] % 4
    replies = []
    for part in parts:
        if route == 1:
            content = input_of(part[1:], _frame_examples(), REPLY_NAMES, framed)
        else:
            content = input_of(part[1:], _reply_examples(), REPLY_NAMES, as_json)
        replies.append((STATUSES[(part or b"\0")[0] % len(STATUSES)], content))

    requests = [Request(0, generation, [1, 2, 3], None) for generation in range(1 if kind[0] & 4 else 2)]
    batch = Batch(requests, Sampling(logprobs=2 if kind[0] & 8 else 0))

    async def call() -> None:
        client = HttpClient("http://server", api_key="key")
        session = _Replies(replies)
        client._session = lambda reuse: session  # pyright: ignore
        try:
            if route == 0:
                found = await openai_client.complete(client, "m", batch, requests, 5.0)
                assert [type(each) for each in found] == [Completion] * len(requests)
            elif route == 1:
                answers = [each async for each in batch_client.complete(client, batch, requests, 5.0)]
                keys = [each[0].key if isinstance(each, tuple) else each.key for each in answers]
                assert sorted(keys) == [request.key for request in requests]
            elif route == 2:
                endpoint = await discovery.discover(client, ("vocab_size", "embedding_dim"))
                await discovery.require_running(endpoint)
            else:
                await client.post("/pause", {})
        finally:
            await client.close()

    with _typed():
        asyncio.run(call())


# --- recorded runs ---------------------------------------------------------------------------------------------------


@cache
def _run_examples() -> list[Any]:
    from vgen import ProfilingContext
    from vgen.profiling import semconv
    from vgen.profiling.sinks.jsonl import JsonlSink

    with tempfile.TemporaryDirectory() as folder:
        with ProfilingContext([JsonlSink(folder)]) as profiling:
            for step in (5,):
                with profiling.step(step), profiling.span(semconv.GENERATE, **{semconv.RANK: 0}) as span:
                    span.event("event", {"a": 1})
                    with profiling.span(semconv.ENGINE_GENERATE), profiling.span(semconv.REQUEST):
                        profiling.record(semconv.REQUEST_E2E, 0.5)
                    with profiling.span(semconv.WEIGHT_SYNC, **{semconv.WEIGHT_VERSION: "1"}):
                        pass
        (file,) = Path(folder).glob("*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]


RUN_NAMES = (
    *("type", "header", "start", "end", "measurement", "step", "format", "vgen", "host", "pid", "part", "name"),
    *("trace_id", "span_id", "parent_id", "start_unix_ns", "end_unix_ns", "attributes", "events", "links", "error"),
    *(
        "values",
        "summary",
        "number",
        "unix_ns",
        "vgen.step",
        "vgen.rank",
        "vgen.request",
        "vgen.generate",
        "train.step",
    ),
)


def recorded_run(data: bytes) -> None:
    """The lines of a recorded run: the reader, the report and every exporter."""
    from vgen.cli import EXPORTS, main
    from vgen.recordings.reader.recording import Recording

    examples = _run_examples()

    def as_lines(records: Any) -> bytes:
        listed = records if isinstance(records, list) else [records]
        return b"".join(
            json.dumps(record, default=lambda each: each.decode("latin-1")).encode() + b"\n" for record in listed
        )

    content = input_of(data, [examples, examples[:4]], RUN_NAMES, as_lines)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        run = Path(folder, "run")
        run.mkdir()
        (run / "vgen-host-1-1795961611556009837-0000.jsonl").write_bytes(content)
        Recording(run)
        # One command for each input, and mostly none: all of them take a quarter of a second.
        commands = [["report"], ["report", "--json"], ["trace"], *(["trace", f"--{form}"] for form in EXPORTS)]
        chosen = (data or b"\0")[0] % (4 * len(commands))
        if chosen >= len(commands):
            return
        command, *options = commands[chosen]
        file = Path(folder, "exported")
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            assert main([command, str(run), *options, *([str(file)] if options and command == "trace" else [])]) in (
                0,
                1,
            )
        if options in (["--chrome"], ["--jaeger"], ["--otlp"]) and file.exists():
            json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# --- running them ----------------------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[[bytes], None]] = {
    "batch_route": batch_route,
    "rank_messages": rank_messages,
    "http_replies": http_replies,
    "recorded_run": recorded_run,
}


def first_inputs(target: str) -> list[bytes]:
    """Where the fuzzer starts: examples that are right, and what it once found."""
    from vgen import completion_codec as codec

    made: dict[str, Callable[[], list[bytes]]] = {
        "batch_route": lambda: seeds(_batch_examples(), codec.encode),
        "rank_messages": lambda: seeds(_rank_examples(), codec.encode),
        "http_replies": lambda: [
            bytes([route, status]) + seed
            for route in (0, 1, 2, 3, 4, 5, 8, 12)
            for status in (0, 3)
            for seed in seeds(_reply_examples(), lambda value: json.dumps(value).encode())
        ],
        "recorded_run": lambda: seeds(
            [_run_examples()], lambda lines: "".join(json.dumps(line) + "\n" for line in lines).encode()
        ),
    }
    return made[target]() + [path.read_bytes() for path in sorted(REGRESSIONS.glob(f"{target}-*"))]


def fuzz(target: str, seconds: int, folder: Path) -> None:
    """Run one target for so long. An input that breaks a rule ends the process with status 77, and is in `folder`."""
    import atheris

    logging.disable()
    corpus = folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["vgen"]):
        inputs = first_inputs(target)
        for number, data in enumerate(inputs):
            (corpus / f"seed-{number}").write_bytes(data)
            TARGETS[target](data)  # and so imports what is to be instrumented
    end, count = time.monotonic() + seconds, 0

    def once(data: bytes) -> None:
        nonlocal count
        if time.monotonic() > end:
            # By itself: libFuzzer's own end has been seen to hang while the interpreter was torn down.
            print(f"Done {count} runs", file=sys.stderr, flush=True)
            os._exit(0)
        TARGETS[target](data)
        count += 1

    options = [f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", "-verbosity=1"]
    options += [f"-artifact_prefix={folder}/{target}-", f"-max_len={LONGEST}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    name, limit, *where = sys.argv[1:]
    fuzz(name, int(limit), Path(where[0] if where else tempfile.mkdtemp(prefix="vgen-fuzz-")))
