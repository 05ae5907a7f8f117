"""An HTTP server that answers as vLLM does, and fails in the way that a test chooses."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias

from .fake_engine import SECONDS, echo

BATCH_PATHS = "/inference/vgen/"
BATCH_SECONDS = SECONDS | dict(admission=0.001, time_to_first_token=0.003, time_per_output_token=None, e2e=0.005)
"""The timing of each completion on the batch route."""
SILENCE_SECONDS = 60

Fault: TypeAlias = (
    'Literal["reset", "silent", "truncated", "not json", "not vllm"] | int | Callable[[dict[str, Any]], dict[str, Any]]'
)
"""What a `FaultyServer` does with one request instead of answering it well.

- an `int`: the answer is an error with this HTTP status
- `"reset"`: the connection is reset
- `"silent"`: nothing is answered until the server closes, for at most 60 seconds; then the connection is reset
- `"truncated"`: the connection ends after half of the answer
- `"not json"`: the answer is an HTML page, as of a proxy
- `"not vllm"`: the answer is JSON that vLLM would not send
- a function: it gets the request's body and returns the answer's; on the batch route it gets and returns each frame
"""
WRONG_CONTENT = {"not json": b"<html>a proxy's page</html>", "not vllm": b'{"something": "else"}'}


class FaultyServer:
    """A stand-in for a vLLM server: it answers well, except where `faults` says otherwise.

    - `faults` maps a path to a list of `Fault`s. Each request to the path takes the first from the list. None, or an
      empty list, is no fault.
    - `answers` maps a path to the JSON of its answer, or to `bytes`; change it as you need. A path without an entry is
      answered `{}`. Completions are not in it: each is the prompt's own tokens, cut at `max_tokens`.
    - `seen` lists path (with its query), headers and JSON body of each request, in the order in which they came.

    After a weight update it holds the version that the update brought, as `/weight_info` and the batch route tell.
    With `features` the server answers like one that `vgen serve` started, also on the batch route. A bias on a token
    beyond `vocabulary_size` is always refused, in vLLM's words, and is not in `seen`: a generation asks for the
    vocabulary's size in this way. `port` 0 takes a free port of 127.0.0.1.

        with FaultyServer() as server:
            server.faults["/v1/completions"] = ["silent"]
            connection = ServerConnection(timeout=1.0)
            generation = ServerGeneration(None, base_urls=[server.url], connection=connection)
            generation.generate([[1, 2]])   # raises ServerError
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
        self.faults: dict[str, list[Fault | None]] = {}
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        configs = {"device_config": {"device": "cpu"}, "model_config": {"logprobs_mode": "processed_logprobs"}}
        self.answers: dict[str, Any] = {
            "/v1/models": {"data": [{"id": model, "root": model, "max_model_len": max_model_len}]},
            "/server_info": {"vllm_config": configs},
            "/reset_prefix_cache": {"success": True},
        }
        if features:
            self.answers["/vgen/info"] = {"features": list(features)}
            self.answers["/vgen/lease"] = {"token": "a-token"}
        self._closing = threading.Event()
        self._server = _Server(port, self._handle)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening: from now on connections are refused."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, request: _Request) -> None:
        path = request.path.partition("?")[0]
        raw = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        batch = path.startswith(BATCH_PATHS)
        body: dict[str, Any] = {"batch": raw} if batch else json.loads(raw or "{}")
        if "logit_bias" in body:
            size = f"Vocabulary size: {self.vocabulary_size}" if self.vocabulary_size else ""
            request.refuse(400, f"token_id(s) in logit_bias contain out-of-vocab token ids. {size}")
            return
        self.seen.append((request.path, dict(request.headers), body))
        faults = self.faults.get(path)
        fault = faults.pop(0) if faults else None
        if fault == "silent":
            self._closing.wait(SILENCE_SECONDS)
        if fault in ("silent", "reset"):
            request.reset()
        elif isinstance(fault, int):
            request.refuse(fault, "the server says no")
        else:
            content = self._frames(raw, fault) if batch else self._json(path, body, fault)
            content = WRONG_CONTENT.get(fault, content) if isinstance(fault, str) else content
            version = body.get("weight_version") or body.get("new_version")
            if isinstance(version, str):  # the end of a weight update
                self.answers["/weight_info"] = {"weight_version": version}
            request.answer(200, content[: len(content) // 2] if fault == "truncated" else content, len(content))

    def _json(self, path: str, body: dict[str, Any], fault: Fault | None) -> bytes:
        if callable(fault):
            return json.dumps(fault(body)).encode()
        answer = _completions(body) if path == "/v1/completions" else self.answers.get(path, {})
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    def _frames(self, raw: bytes, fault: Fault | None) -> bytes:
        # Here and not above: the codec needs msgspec, which tests without the batch route do without.
        from .. import completion_codec as codec

        batch, now = codec.decode_request(raw), time.monotonic_ns()
        version = self.answers.get("/weight_info", {}).get("weight_version", "default")
        frames: list[codec.Frame] = []
        for index, wanted in enumerate(batch.wanted):
            ids = codec.to_ints(batch.prompts[wanted.prompt])[: batch.sampling.get("max_tokens", 256)]
            completion = echo(
                ids,
                seconds=BATCH_SECONDS,
                prompt_index=wanted.prompt,
                generation_index=0,
                weight_version=version,
                weight_versions=[(version, 0, len(ids))],
                request_id=f"{batch.id}-{index}",
            )
            frames.append(codec.Done(index, codec.pack(completion), now))
        change: Any = fault if callable(fault) else lambda frame: frame
        return b"".join(codec.frame_bytes(change(frame)) for frame in (*frames, codec.End()))


def _completions(body: dict[str, Any]) -> dict[str, Any]:
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = [_choice(index, prompt[: body["max_tokens"]]) for index, prompt in enumerate(prompts)]
    metrics = {"queue_time_ms": 1.0, "time_to_first_token_ms": 2.0, "generation_time_ms": 3.0, "mean_itl_ms": 1.0}
    return {"id": "cmpl-fake", "choices": choices, "metrics": metrics if len(prompts) == 1 else None, "usage": {}}


def _choice(index: int, ids: list[int]) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5 for _ in ids], "top_logprobs": [{f"token_id:{token}": -0.5} for token in ids]}
    return {"index": index, "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}


class _Request(http.server.BaseHTTPRequestHandler):
    """One request, and the ways to answer it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self.server.handle_with(self)

    do_POST = do_GET

    def answer(self, status: int, content: bytes, length: int) -> None:
        """Send `content`; fewer bytes than the promised `length` end the connection."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = len(content) < length

    def refuse(self, status: int, message: str) -> None:
        content = json.dumps({"error": {"message": message, "code": 0}}).encode()
        self.answer(status, content, len(content))

    def reset(self) -> None:
        # With a linger time of 0, close() sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted; a burst of requests overflows the default of 5

    def __init__(self, port: int, handle_with: Callable[[_Request], None]) -> None:
        super().__init__(("127.0.0.1", port), _Request)
        self.handle_with = handle_with

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients may hang up."""
