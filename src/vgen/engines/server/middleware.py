"""Access control of a `vgen serve` server: a control key for all but inference, a lease for changes.

vLLM loads this ASGI middleware by `--middleware`. It reads the key from the file that `VGEN_CONTROL_KEY_FILE` names;
the server does not start without one. It decides by path and method, and so depends on nothing of vLLM but the names of
its routes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .. import server_api
from ..refusal_reasons import RefusalReason
from ..server_api import CONTROL_HEADER, INSTANCE, KEY_FILE_VARIABLE, LEASE_HEADER, Feature
from . import audit_log
from .lease import LeaseBook, LeaseConflict, LeaseRequest
from .server_facts import attribute, facts, features
from .server_process import INSTANCE_VARIABLE

if TYPE_CHECKING:
    from .core_health import CoreHealth

FEATURES = (Feature.BATCH, Feature.CONTROL_KEY, Feature.LEASE, Feature.PAUSE, Feature.WEIGHTS_STATE)
INFERENCE = ("/v1", "/v2", "/inference", "/cohere")
"""Prefixes of the routes that vLLM's own API key guards."""
READABLE = frozenset({"/health", "/ping", "/version", "/metrics"})
"""Routes that anyone may read, as `INSTANCE`: load balancers and Prometheus use them."""
HEALTH = frozenset({server_api.HEALTH, "/ping"})
ADAPTERS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Routes under an inference prefix that change what the server computes."""
HARMLESS = frozenset({"/tokenize", "/detokenize", "/score", "/rerank", "/pooling", "/classify", "/invocations"})
"""POST routes that change nothing. They need the control key, because vLLM's API key does not guard them."""
GRACEFUL_SECONDS = 5.0
"""How long a server that ends waits for its connections. vLLM has aborted their requests by then."""
_LEASE_LIMIT = 1 << 16
_CHANGE_LIMIT = 256 << 20
"""How many bytes the body of a call that changes the server may have. Weights do not travel in it, only their names,
shapes and handles."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Note = Callable[[int], None]
"""Writes a call to the audit log, with the status of its answer."""


class Refusal(Exception):
    """The middleware answers the request with an HTTP status and a reason, and does not pass it on."""

    def __init__(self, status: int, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class ControlMiddleware:
    """Guards one server, and answers vgen's own routes under `/vgen/`.

    While nobody holds the lease, every client with the control key may change the server, as a stock server. But a
    request with the token of an ended lease is refused even then. After a failed weight update, inference is refused
    until an update succeeds. During an update, `/resume` and `/wake_up` are refused. Once the update's client has lost
    its lease, `/wake_up` aborts what waits, and wakes the engine for the next update. While the engine cannot work, all
    calls that need it are refused, `/health` too.
    """

    def __init__(self, app: App, *, key: str | None = None, leases: LeaseBook | None = None) -> None:
        self.app = app
        self._key = _digest(key or _key_from_file())
        self._leases = leases or LeaseBook()
        self._instance = os.environ.get(INSTANCE_VARIABLE) or secrets.token_hex(8)
        """Tells this server process from others behind the same address, and its launcher that it is the right one."""
        self._weights = "ready"
        """`ready`, `updating`, or `failed`: some weights are old and some new."""
        self._updater: int | None = None
        """The epoch of the lease under which the last update was started; None if there was none."""
        self._health: CoreHealth | None = None
        self._resuming = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            async with self._serving(scope):
                await self.app(scope, receive, send)
            return
        try:
            await self._handle(scope, receive, send)
        except Refusal as refusal:
            await self._refuse(scope, send, refusal)
        except LeaseConflict as conflict:
            await self._refuse(scope, send, Refusal(409, RefusalReason.LEASE, str(conflict)))

    @asynccontextmanager
    async def _serving(self, scope: Scope) -> AsyncIterator[None]:
        """Runs the application's life in the block: with vgen's routes, its audit log, and a watch over its engine."""
        app = scope.get("app")
        if scope["type"] != "lifespan" or app is None:
            yield
            return
        _add_routes(app)
        audit_log.show()
        server = attribute(app, "state.server")
        if server is not None:
            server.config.timeout_graceful_shutdown = GRACEFUL_SECONDS  # uvicorn's default waits for ever
        if attribute(app, "state.engine_client") is None:
            yield
            return
        from .core_health import watched

        def end() -> None:
            if server is not None:
                server.should_exit = True

        self._health = app.state.vgen_health = watched(app)
        watch = asyncio.create_task(self._health.watch(end))
        try:
            yield
        finally:
            watch.cancel()

    @property
    def _weights_now(self) -> str:
        """The state of the weights. An update whose client has lost its lease will not be finished: it has failed."""
        abandoned = self._updater is not None and self._updater != (self._leases.describe() or {}).get("epoch")
        return "failed" if self._weights == "updating" and abandoned else self._weights

    def _require_engine(self) -> None:
        if self._health is not None and self._health.problem:
            raise Refusal(503, RefusalReason.ENGINE, self._health.problem)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _path(scope), scope.get("method", "")
        reads = method in ("GET", "HEAD")
        if path not in ADAPTERS and _under(path, INFERENCE):
            if self._weights_now == "failed" and not reads and method != "OPTIONS":
                message = "the last weight update failed: some weights are old and some new until an update succeeds"
                raise Refusal(503, RefusalReason.WEIGHTS, message)
            self._require_engine()
            await self.app(scope, receive, send)
        elif reads and path in HEALTH:
            if self._health is not None:
                self._health.look()
            self._require_engine()
            await self.app(scope, receive, send)
        elif reads and (path in READABLE or _under(path, ("/metrics",))):
            await self.app(scope, receive, send)
        elif reads and path == INSTANCE:
            await _answer(send, 200, {"instance": self._instance})
        else:
            self._authenticate(scope)
            await self._handle_control(path, method, scope, receive, send)

    async def _handle_control(self, path: str, method: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A request with the right control key to a route that is not inference."""
        if _under(path, ("/vgen",)) and path not in (server_api.PAUSE, server_api.WEIGHTS):
            await _answer(send, 200, await self._own_route(path, method, scope, receive))
            return
        self._require_engine()
        if method in ("GET", "HEAD") or path in HARMLESS:
            await self.app(scope, receive, send)
        else:
            token = _header(scope, LEASE_HEADER)
            if token is not None or not self._leases.free:
                self._leases.check(token)  # refuses before the body is read
            raw = b""
            if scope["type"] == "http":
                # A lease does not expire during a call. A client that never sends the rest of a body must not keep it.
                if (whole := await _body(receive, _CHANGE_LIMIT)) is None:
                    return
                raw, receive = whole, _again(whole, receive)
            with nullcontext() if token is None and self._leases.free else self._leases.using(token) as lease:
                if path == server_api.START_UPDATE:
                    self._updater = lease.epoch if lease is not None else None
                note = functools.partial(audit_log.changed, scope, path, lease and lease.holder, raw)
                if path in ("/resume", "/wake_up"):
                    await self._start_again(path, scope, receive, send, note)
                else:
                    await self._change(path, scope, receive, send, note)

    def _authenticate(self, scope: Scope) -> None:
        key = _header(scope, CONTROL_HEADER)
        if key is None or not hmac.compare_digest(_digest(key), self._key):
            problem = "no control key" if key is None else "a wrong control key"
            fix = f"send this server's key in the header {CONTROL_HEADER} (`vgen serve` prints which file holds it)"
            raise Refusal(401, RefusalReason.CONTROL_KEY, f"{problem}: {fix}")

    async def _start_again(self, path: str, scope: Scope, receive: Receive, send: Send, note: Note) -> None:
        """Resume or wake the engine, if it is paused or asleep.

        vLLM's data-parallel engines wait for each other when they resume, also if they run already. One that has taken
        a request meanwhile does not come, and then the others wait for ever.
        """
        if self._weights == "updating":
            # During an update, layers are on the meta device. One scheduler step would end the engine.
            if path == "/resume" or self._weights_now == "updating":
                raise Refusal(409, RefusalReason.WEIGHTS, "a weight update is in progress: finish it first")
            # Its trainer is gone. The next one cannot update a server that sleeps. vLLM resumes what it has woken.
            await _abort_all(scope)
        async with self._resuming:
            if await _is_stopped(scope, "is_paused" if path == "/resume" else "is_sleeping") is not False:
                await self._change(path, scope, receive, send, note)
                return
        await _answer(send, 200, {"status": "resumed" if path == "/resume" else "awake"})
        note(200)

    async def _change(self, path: str, scope: Scope, receive: Receive, send: Send, note: Note) -> None:
        """Pass a request on that changes the server, and keep track of the weights' state."""
        if path in (server_api.START_UPDATE, server_api.WEIGHTS) and await _is_stopped(scope, "is_paused") is False:
            message = "pause the server first: its layers are unusable during a weight update"
            raise Refusal(409, RefusalReason.WEIGHTS, message)
        status = 500  # if the app raises, a middleware outside this one answers with 500
        before = self._weights
        if path == server_api.WEIGHTS:
            self._weights = "updating"

        async def send_and_note_status(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._health.changing() if self._health is not None else nullcontext():
                await self.app(scope, receive, send_and_note_status)
        finally:
            if path == server_api.WEIGHTS:  # a status of 4xx means that nothing was changed
                self._weights = "ready" if status < 400 else before if status < 500 else "failed"
            else:
                self._weights = _state_after(self._weights, path, ok=status < 400)
            note(status)

    async def _own_route(self, path: str, method: str, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The answer of one of vgen's own routes."""
        token = _header(scope, LEASE_HEADER)
        if (method, path) == ("GET", server_api.INFO):
            problem = self._health.problem if self._health is not None else ""
            state = {"lease": self._leases.describe(), "weights": self._weights_now, "problem": problem}
            return {"features": [*FEATURES, *features(scope.get("app"))], **state, **facts(scope.get("app"))}
        if (method, path) == ("POST", server_api.LEASE):
            try:
                request = msgspec.json.decode(await _body(receive, _LEASE_LIMIT) or b"", type=LeaseRequest)
            except msgspec.DecodeError as error:
                raise Refusal(400, RefusalReason.BAD_REQUEST, f"this is no request for a lease: {error}") from None
            return self._take_lease(scope, request)
        if (method, path) == ("POST", server_api.LEASE_RENEW):
            return self._leases.renew(token)
        if (method, path) in (("POST", server_api.LEASE_RELEASE), ("DELETE", server_api.LEASE)):
            holder = self._leases.release(token)
            audit_log.write(scope, "release_lease", holder=holder)
            return {}
        raise Refusal(404, RefusalReason.NOT_FOUND, f"{method} {path} is not one of vgen's routes")

    def _take_lease(self, scope: Scope, request: LeaseRequest) -> dict[str, Any]:
        holder, current, expired = request.holder, self._leases.describe(), self._leases.expired_holder
        answer = self._leases.take(holder, request.ttl_seconds, takeover=request.takeover)
        event = "take_over_lease" if current else "retake_lease" if expired == holder else "take_lease"
        before = current["holder"] if current else expired
        audit_log.write(scope, event, holder=holder, epoch=answer["epoch"], before=before)
        return answer

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})
            return
        error: dict[str, Any] = {"message": str(refusal), "type": refusal.reason, "code": refusal.status}
        if refusal.reason == RefusalReason.LEASE:
            error["lease"] = self._leases.describe()
        await _answer(send, refusal.status, {"error": error})


def _add_routes(app: Any) -> None:
    """Add vgen's routes to vLLM's application, behind vLLM's own middleware. A second call has no effect."""
    from starlette.routing import Route

    from . import batch_route, weights_route

    routes, present = app.router.routes, {getattr(route, "path", None) for route in app.router.routes}
    added = {**batch_route.ROUTES, **weights_route.ROUTES}
    routes[:0] = [Route(path, answer, methods=["POST"]) for path, answer in added.items() if path not in present]


def _state_after(weights: str, path: str, *, ok: bool) -> str:
    """The state of the weights after the server has answered a request to `path`."""
    if path == server_api.START_UPDATE:
        return "updating" if ok else weights
    if path in (server_api.UPDATE_WEIGHTS, server_api.FINISH_UPDATE) and weights == "updating":
        return "failed" if not ok else "ready" if path == server_api.FINISH_UPDATE else weights
    if path == server_api.SET_VERSION and ok:  # the weights came another way, and the caller has named their version
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
    """The path that the application routes by: without the prefix (`root_path`) of a proxy."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and path.startswith(root) and (path == root or path[len(root)] == "/"):
        return path[len(root) :]
    return path


def _under(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def _header(scope: Scope, name: str) -> str | None:
    encoded = name.lower().encode()
    return next((value.decode("latin-1") for key, value in scope.get("headers", ()) if key.lower() == encoded), None)


async def _is_stopped(scope: Scope, question: str) -> bool | None:
    """What the engine answers to `is_paused` or `is_sleeping`; None if it does not tell."""
    engine = attribute(scope.get("app"), "state.engine_client")
    if engine is None:
        return None
    try:
        return bool(await getattr(engine, question)())
    except RuntimeError:  # data-parallel engines that do not agree, because they are about to pause
        return None


async def _abort_all(scope: Scope) -> None:
    """Abort the requests that wait in the engine. It is paused afterwards."""
    engine = attribute(scope.get("app"), "state.engine_client")
    if engine is not None:
        await engine.pause_generation(mode="abort", clear_cache=False)


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client hangs up before it has sent all of it."""
    raw = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        raw += message.get("body", b"")
        if len(raw) > limit:
            raise Refusal(413, RefusalReason.BAD_REQUEST, f"the body is longer than {limit} bytes")
        if not message.get("more_body"):
            return bytes(raw)


def _again(raw: bytes, receive: Receive) -> Receive:
    """What the application calls instead of `receive`, of which the body has been read already."""
    left = [raw]

    async def replay() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replay


async def _answer(send: Send, status: int, body: Any) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
