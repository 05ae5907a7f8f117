"""What a server lets its callers do: a control key for all but inference, a lease for what changes it.

An ASGI middleware by vLLM's `--middleware`; it reads `VGEN_CONTROL_KEY_FILE`, and a server without one does not
start. It looks at paths and methods alone, and so depends on nothing of vLLM's routes but their names.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from .. import __version__
from .lease import MAX_TTL_SECONDS, LeaseBook, LeaseConflict
from .weights_route import PAUSE, WHOLE

EXTENSION = "vgen.engines.memory.WorkerMemory"
"""What `vgen serve` gives a server's workers, to say how much memory there is, and on which GPU."""
KEY_FILE_VARIABLE = "VGEN_CONTROL_KEY_FILE"
CONTROL_HEADER, LEASE_HEADER = "X-Vgen-Control-Key", "X-Vgen-Lease"
FEATURES = ("batch", "control_key", "lease", "pause", "weights_state")

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Fields of a model's configuration that the trainer's model and the server's must have in common."""

INFERENCE = ("/v1", "/v2", "/inference", "/cohere")
"""Below these vLLM's own API key decides."""
INSTANCE = "/vgen/instance"
READABLE = frozenset({"/health", "/ping", "/version", "/metrics"})
"""May be read without any key, as may `INSTANCE`: what load balancers and Prometheus ask for."""
ADAPTERS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""They change what the server computes, so they are no inference."""
HARMLESS = frozenset({"/tokenize", "/detokenize", "/score", "/rerank", "/pooling", "/classify", "/invocations"})
"""Posts that need the control key, since vLLM's API key leaves them open, but change nothing."""
START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
NAME = "/update_weight_version"
_BODY_LIMIT = 1 << 16

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that goes no further, with its HTTP status and the kind of refusal."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class ControlMiddleware:
    """Guards one server. Routes of its own lie below `/vgen/`.

    While nobody holds the lease, whoever has the control key may act, as on a stock server; a token that is not
    the current one is refused even then. Weights of which an update failed, or is under way, are not inferred from.
    """

    def __init__(self, app: App, *, key: str | None = None, leases: LeaseBook | None = None) -> None:
        self.app = app
        self._key = _digest(key or _key_from_file())
        self._leases = leases or LeaseBook()
        self._instance = secrets.token_hex(8)
        """Tells this server from others behind the same address."""
        self._weights = "ready"
        """`ready`, `updating`, or `failed`: then their content is mixed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            if scope["type"] == "lifespan" and "app" in scope:
                _install(scope["app"])
            await self.app(scope, receive, send)
            return
        try:
            await self._handle(scope, receive, send)
        except Refused as refused:
            await self._refuse(scope, send, refused)
        except LeaseConflict as conflict:
            await self._refuse(scope, send, Refused(409, "lease", str(conflict)))

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _path(scope), scope.get("method", "")
        if path not in ADAPTERS and _below(path, INFERENCE):
            if self._weights == "failed" and method not in ("GET", "HEAD", "OPTIONS"):
                raise Refused(503, "weights", "the last weight update failed: the weights are mixed until one succeeds")
            await self.app(scope, receive, send)
            return
        reads = method in ("GET", "HEAD")
        if reads and (path in READABLE or _below(path, ("/metrics",))):
            await self.app(scope, receive, send)
            return
        if reads and path == INSTANCE:
            await _answer(send, 200, {"instance": self._instance})
            return
        self._authenticate(scope)
        if _below(path, ("/vgen",)) and path not in (PAUSE, WHOLE):
            await _answer(send, 200, await self._own(path, method, scope, receive))
        elif reads or path in HARMLESS:
            await self.app(scope, receive, send)
        else:
            token = _header(scope, LEASE_HEADER)
            with nullcontext() if token is None and self._leases.free else self._leases.used(token):
                await self._change(path, scope, receive, send)

    def _authenticate(self, scope: Scope) -> None:
        given = _header(scope, CONTROL_HEADER)
        if given is None or not hmac.compare_digest(_digest(given), self._key):
            raise Refused(
                401,
                "control_key",
                f"{'no' if given is None else 'a wrong'} control key: send this server's own in the header "
                f"{CONTROL_HEADER} (`vgen serve` says which file holds it)",
            )

    async def _change(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if path in ("/resume", "/wake_up") and self._weights == "updating":
            # One scheduler step with layers on the meta device ends the engine for good.
            raise Refused(409, "weights", "a weight update is under way: finish it first")
        if path in (START, WHOLE) and await _paused(scope) is False:
            raise Refused(409, "weights", "pause the server first: its layers are unusable during a weight update")
        status = 500  # an exception becomes an answer further out than here
        before = self._weights
        if path == WHOLE:
            self._weights = "updating"

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            if path == WHOLE:  # refused with a status of 4xx, it has changed nothing
                self._weights = "ready" if status < 400 else before if status < 500 else "failed"
            else:
                self._weights = _after(self._weights, path, ok=status < 400)

    async def _own(self, path: str, method: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        token = _header(scope, LEASE_HEADER)
        if (method, path) == ("GET", "/vgen/info"):
            return self._info(scope)
        if (method, path) == ("POST", "/vgen/lease"):
            wanted = _lease_request(await _body(receive))
            return self._leases.take(wanted["holder"], wanted["ttl_seconds"], takeover=wanted["takeover"])
        if (method, path) == ("POST", "/vgen/lease/renew"):
            return self._leases.renew(token)
        if (method, path) in (("POST", "/vgen/lease/release"), ("DELETE", "/vgen/lease")):
            self._leases.release(token)
            return {}
        raise Refused(404, "not_found", f"{method} {path} is not one of vgen's routes")

    def _info(self, scope: Scope) -> dict[str, Any]:
        state = getattr(scope.get("app"), "state", None)
        config = getattr(state, "vllm_config", None)
        model = getattr(config, "model_config", None)
        backend = getattr(getattr(config, "weight_transfer_config", None), "backend", None)
        ours = ["shared_memory", "group", "resident", "recorded"] if backend == "vgen_shm" else []
        extended = getattr(getattr(config, "parallel_config", None), "worker_extension_cls", "") == EXTENSION
        return {
            "vgen": __version__,
            "features": [*FEATURES, *ours, *(["memory"] if extended else [])],
            "lease": self._leases.describe(),
            "weights": self._weights,
            "model": getattr(model, "model", None),
            "max_model_len": getattr(model, "max_model_len", None),
            "logprobs_mode": getattr(model, "logprobs_mode", None),
            "dtype": str(getattr(model, "dtype", "")).removeprefix("torch.") or None,
            "quantization": getattr(model, "quantization", None),
            "device": getattr(getattr(config, "device_config", None), "device_type", None),
            "max_num_seqs": getattr(getattr(config, "scheduler_config", None), "max_num_seqs", None),
            "shape": _shape(model),
            "world_size": getattr(getattr(config, "parallel_config", None), "world_size_across_dp", None),
            "weight_transfer": backend,
            "shared_memory_directory": _shared_directory() if ours else None,
            "host": this_host(),
        }

    async def _refuse(self, scope: Scope, send: Send, refused: Refused) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refused.kind})
            return
        error: dict[str, Any] = {"message": str(refused), "type": f"vgen_{refused.kind}", "code": refused.status}
        if refused.kind == "lease":
            error["lease"] = self._leases.describe()
        await _answer(send, refused.status, {"error": error})


@functools.cache
def this_host() -> str:
    """Tells this machine from others, since it was started. Containers on it have it in common."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _shape(model: Any) -> dict[str, int]:
    """What tells one model from another, for a trainer that looks whether this is its own."""
    config = getattr(model, "hf_text_config", None)
    return {name: found for name in SHAPE if isinstance(found := getattr(config, name, None), int)}


def _install(app: Any) -> None:
    from . import batch_route, weights_route

    batch_route.install(app)
    weights_route.install(app)


def _shared_directory() -> str:
    from ..weights.shared_memory import shared_directory

    return str(shared_directory())


def _after(weights: str, path: str, *, ok: bool) -> str:
    """The state of the weights once `path` has been answered."""
    if path == START:
        return "updating" if ok else weights
    if path in (UPDATE, FINISH) and weights == "updating":
        return "failed" if not ok else "ready" if path == FINISH else weights
    if path == NAME and ok:  # the caller vouches for them: they came another way
        return "ready"
    return weights


def _key_from_file() -> str:
    name = os.environ.get(KEY_FILE_VARIABLE)
    key = Path(name).read_text().strip() if name else ""
    if not key:
        raise RuntimeError(f"{KEY_FILE_VARIABLE} must name a file that holds this server's control key")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _path(scope: Scope) -> str:
    """The path as it will be routed: without the prefix that a proxy has put before it."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and (path == root or path[len(root)] == "/"):
        return path[len(root) :]
    return path


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key.lower() == wanted), None)


async def _paused(scope: Scope) -> bool | None:
    """Whether the engine is paused; None where it cannot be asked."""
    engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
    return None if engine is None else bool(await engine.is_paused())


async def _body(receive: Receive) -> Any:
    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if len(raw) > _BODY_LIMIT:
            raise Refused(413, "bad_request", "the body is too long")
        if message["type"] != "http.request" or not message.get("more_body"):
            break
    try:
        return json.loads(raw or b"{}")
    except ValueError:
        raise Refused(400, "bad_request", "the body is not JSON") from None


def _lease_request(body: Any) -> dict[str, Any]:
    wanted = {"ttl_seconds": 60.0, "takeover": False, **(body if isinstance(body, dict) else {})}
    holder, ttl = wanted.get("holder"), wanted["ttl_seconds"]
    if not isinstance(holder, str) or not holder.strip() or len(holder) > 200:
        raise Refused(400, "bad_request", "`holder` must say who asks, in at most 200 characters")
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 1 <= ttl <= MAX_TTL_SECONDS:
        raise Refused(400, "bad_request", f"`ttl_seconds` must lie between 1 and {MAX_TTL_SECONDS:.0f}")
    if not isinstance(wanted["takeover"], bool):
        raise Refused(400, "bad_request", "`takeover` must be true or false")
    return wanted


async def _answer(send: Send, status: int, body: Any) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
