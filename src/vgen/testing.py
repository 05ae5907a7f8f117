"""For tests, yours too: models small enough to make on the spot, an engine without a model, a server
that goes wrong, one without anything of vgen's in it, a sink that remembers."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from .engines.base import Batch, PauseMode, Request, Source, SyncTrace, Verify
from .engines.launch import free_port
from .profiling import names
from .profiling.sinks.memory import MemorySink
from .types import Completion, RequestTiming, Sampling, SleepReport

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

__all__ = [
    "FakeEngine",
    "Fault",
    "FaultyServer",
    "MemorySink",
    "byte_tokenizer",
    "stock_server",
    "tiny_model",
    "tiny_vision_model",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer made without any download: one token for each byte (0 to 255), `<eos>` 256 and `<pad>` 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256, "<pad>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_model(
    directory: str | Path, *, seed: int = 0, **config: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Qwen2 with random float32 weights and 0.3 M parameters, saved with its tokenizer so that vLLM can load it.

    `config` overrides fields of `Qwen2Config`. The head size is 32, the least that vLLM's CPU attention takes.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields: dict[str, Any] = dict(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**fields | config)).float()
    tokenizer = byte_tokenizer()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.config._name_or_path = str(directory)
    return model, tokenizer


VISION_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %};"
    "{% endfor %}{% if tools %}T{{ tools|length }}{% endif %}a:"
)


def tiny_vision_model(directory: str | Path, *, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An Idefics3 with random float32 weights, saved with its processor so that vLLM can load it.

    Its placeholder is `<image>` (token id 259). Images are tiles of 32 × 32 pixels, of 4 tokens each: one, or with
    more pixels up to 2 × 2 and the whole. It is the kind of model that vLLM runs where there is no torchvision.
    """
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer()
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=VISION_TEMPLATE)
    text = dict(
        model_type="llama",
        vocab_size=304,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    vision = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = Idefics3Config(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        pad_token_id=257,
        architectures=["Idefics3ForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config).float().eval()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    model.config._name_or_path = str(directory)
    return model, processor


class FakeEngine:
    """An `Engine` without a model, for injecting faults: `raises["sleep"] = OSError()` makes `sleep` raise that.

    It answers every request with the request's own prompt, keeps the weights it was sent in `weights`,
    and the names of the calls in `calls`; `reports` says what sleeping and waking give back and take.
    `Generation(FakeEngine(), source=[])` is all it takes.
    """

    kind = "fake"
    device_type = "cpu"
    concurrent = False
    verifications: tuple[Verify, ...] = ("none",)

    def __init__(self, *, max_model_length: int = 64, vocabulary_size: int = 100) -> None:
        self.max_model_length, self.vocabulary_size = max_model_length, vocabulary_size
        self.raises: dict[str, BaseException] = {}
        self.calls: list[str] = []
        freed = SleepReport(memory_freed=True, device_bytes=1 << 20)
        self.reports: dict[str, SleepReport] = {"sleep": freed, "wake_up": freed}
        self.requests: Sequence[Request] = ()
        """Of the last batch."""
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "0"

    def stream(self, batch: Batch) -> Generator[Completion]:
        self.requests = batch.requests
        self._called("stream")
        for request in batch.requests:
            if batch.cancellation.cancelled:
                raise asyncio.CancelledError
            yield self._completion(request, batch.sampling)

    def pause(self, mode: PauseMode) -> None:
        self._called("pause")

    def resume(self) -> None:
        self._called("resume")

    def sync(self, source: Source, version: str, trace: SyncTrace, verify: Verify | None = None) -> None:
        trace.set({names.TRANSPORT: "fake"})
        with trace.phase("load"):
            self._called("load")
            self.weights = dict(source)
        with trace.phase("reset_cache"):
            self._called("reset_cache")
        self.version = version

    def verify(self, trace: SyncTrace) -> None:
        """It never leaves anything to be verified."""

    def sleep(self, level: int) -> SleepReport:
        self._called("sleep")
        return self.reports["sleep"]

    def wake_up(self, tags: Sequence[str]) -> SleepReport:
        self._called("wake_up")
        return self.reports["wake_up"]

    def close(self) -> None:
        self._called("close")

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if call in self.raises:
            raise self.raises[call]

    def _completion(self, request: Request, sampling: Sampling) -> Completion:
        now = time.monotonic_ns()
        token_ids = list(request.token_ids)[: sampling.max_tokens]
        timing = RequestTiming(
            queued_ns=now - 4_000_000,
            finished_ns=now,
            queue=0.001,
            prefill=0.001,
            decode=0.002,
            time_to_first_token=0.002,
            time_per_output_token=0.001,
            e2e=0.004,
        )
        return Completion(
            prompt_index=request.prompt_index,
            generation_index=request.generation_index,
            token_ids=token_ids,
            logprobs=[0.0 for _ in token_ids],
            finish_reason="length",
            weight_version=self.version,
            request_id=f"fake-{request.prompt_index}-{request.generation_index}",
            timing=timing,
        )


Fault: TypeAlias = (
    'Literal["reset", "silent", "truncated", "not json", "not vllm"] | int | Callable[[dict[str, Any]], dict[str, Any]]'
)
"""What a `FaultyServer` does with one request: an HTTP status, or a way to go wrong; a function makes the answer."""


class FaultyServer:
    """A stand-in for a vLLM server that goes wrong on demand: `faults["/v1/completions"] = [503, "reset"]`.

    Each request to a path takes the next of its faults; without one it is answered well, completions with
    each prompt's own tokens. `seen` keeps every request's path, headers and body. With `features` it answers as a
    server that `vgen serve` started, on the batch route `/inference/vgen/generate` too. A bias on a token beyond
    `vocabulary_size` is refused in vLLM's words, beside all faults and not in `seen`: it is how a generation asks
    for that size.

        with FaultyServer() as server:
            server.faults["/v1/completions"] = ["silent"]
            ServerGeneration(model, base_urls=[server.url], timeout=1.0).generate([[1, 2]])   # ServerError
    """

    def __init__(
        self,
        *,
        model: str = "tiny",
        max_model_len: int = 64,
        vocabulary_size: int | None = None,
        features: Sequence[str] = (),
        port: int = 0,
    ) -> None:
        self.vocabulary_size = vocabulary_size
        self.faults: dict[str, list[Fault]] = {}
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.answers: dict[str, Any] = {
            "/v1/models": {"data": [{"id": model, "root": model, "max_model_len": max_model_len}]},
            "/server_info": {
                "vllm_config": {
                    "device_config": {"device": "cpu"},
                    "model_config": {"logprobs_mode": "processed_logprobs"},
                }
            },
            "/reset_prefix_cache": {"success": True},
        }
        if features:
            self.answers["/vgen/info"] = {"features": list(features)}
            self.answers["/vgen/lease"] = {"token": "a-token"}
        self._closing = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Threads(http.server.ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hung up, as it may

            daemon_threads = True
            request_queue_size = 1024  # of five, the standard library's, a burst of requests overflows

        self._server = Threads(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Go away: connections are refused from now on."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        batch = path.startswith("/inference/vgen/")
        body: dict[str, Any] = {} if batch or not raw else json.loads(raw)
        if batch:
            body = {"batch": raw}
        if "logit_bias" in body:
            size = f"Vocabulary size: {self.vocabulary_size}" if self.vocabulary_size else ""
            said = f"token_id(s) in logit_bias contain out-of-vocab token ids. {size}"
            self._send(handler, 400, json.dumps({"error": {"message": said}}).encode())
            return
        self.seen.append((handler.path, dict(handler.headers), body))
        waiting = self.faults.get(path)
        fault = waiting.pop(0) if waiting else None
        if fault == "silent":
            self._closing.wait(60)
        if fault in ("reset", "silent"):
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if isinstance(fault, int):
            self._send(handler, fault, b'{"error": {"message": "the server says no", "code": 0}}')
            return
        if batch:
            self._send_frames(handler, raw, fault)
            return
        good = fault(body) if callable(fault) else self._completions(body) if path == "/v1/completions" else None
        content = json.dumps(good if good is not None else self.answers.get(path, {})).encode()
        if fault == "not json":
            content = b"<html>a proxy's page</html>"
        if fault == "not vllm":
            content = b'{"something": "else"}'
        self._send(handler, 200, content, cut=fault == "truncated")

    def _send_frames(self, handler: http.server.BaseHTTPRequestHandler, raw: bytes, fault: Any) -> None:
        """Each completion is its prompt's own tokens; a function given as fault makes other frames of them."""
        from .engines import frames

        batch, now = frames.decode_request(raw), time.monotonic()
        version = self.answers.get("/weight_info", {}).get("weight_version", "default")
        sent: list[frames.Frame] = []
        for index, wanted in enumerate(batch.wanted):
            ids = frames.to_ints(batch.prompts[wanted.prompt])[: batch.sampling.get("max_tokens", 256)]
            times = (now - 0.005, now - 0.004, now - 0.003, now - 0.002, now - 0.002, now)
            own = frames.ints(ids), frames.floats(0.0 for _ in ids), None, None, [(version, 0, len(ids))], times
            sent.append(frames.Done(index, "length", *own, now, 0, 0))
        change: Any = fault if callable(fault) else lambda frame: frame
        content = b"".join(frames.pack(change(frame)) for frame in (*sent, frames.End()))
        if fault in ("not json", "not vllm"):
            content = b"<html>a proxy's page</html>"
        self._send(handler, 200, content, cut=fault == "truncated")

    def _send(
        self, handler: http.server.BaseHTTPRequestHandler, status: int, content: bytes, *, cut: bool = False
    ) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if cut else content)
        handler.close_connection = cut

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = [
            {
                "index": index,
                "text": "",
                "token_ids": prompt[: body["max_tokens"]],
                "logprobs": {
                    "token_logprobs": [-0.5 for _ in prompt[: body["max_tokens"]]],
                    "top_logprobs": [{f"token_id:{token}": -0.5} for token in prompt[: body["max_tokens"]]],
                },
                "finish_reason": "length",
            }
            for index, prompt in enumerate(prompts)
        ]
        metrics = {"queue_time_ms": 1.0, "time_to_first_token_ms": 2.0, "generation_time_ms": 3.0, "mean_itl_ms": 1.0}
        return {"id": "cmpl-fake", "choices": choices, "metrics": metrics if len(prompts) == 1 else None, "usage": {}}


@contextmanager
def stock_server(
    model: str | Path,
    *,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 240.0,
) -> Generator[str]:
    """Run `vllm serve` in development mode, without anything of vgen's in it; gives its URL once it is healthy.

    Raises `RuntimeError`, with what it said last, where it ends or does not get there within `timeout` seconds.
    """
    port = free_port("127.0.0.1")
    # `vllm serve` does not exist with the CPU build; this is what it runs.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    variables = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "", **(environment or {})}
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"the server has not come up: {log.read()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()
