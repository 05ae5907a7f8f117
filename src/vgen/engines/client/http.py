"""HTTP client for one vLLM server: every call has a deadline and raises a typed error that quotes the server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from ...errors import MissingExtraError, ServerError
from ...profiling.content_capture import public_url
from ..server_api import CONTROL_HEADER, LEASE_HEADER
from .call_watch import ANSWER_SECONDS, CallWatch
from .keys import Key, KeyOrFile

try:
    import aiohttp
    import msgspec
except ImportError as error:
    raise MissingExtraError("ServerGeneration", "aiohttp and msgspec", "server") from error

T = TypeVar("T")
Headers: TypeAlias = Mapping[str, str]

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same call may succeed: the server is busy, starting or stopping."""
_MESSAGE_LIMIT = 2000
"""An error quotes at most this many characters of the server's message."""
WATCHED_SECONDS = 10.0
"""A call with a longer deadline asks for the server's health while it waits."""
SPARE_DESCRIPTORS = 64
"""How many file descriptors connections leave to the rest of the process."""
LEAST_CONNECTIONS = 4


def connection_limit(servers: int = 1) -> int:
    """How many connections to each of `servers` this process can have open, by its limit on file descriptors."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        is_open = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError, ValueError):  # not Linux
        return 1024
    if most == resource.RLIM_INFINITY:
        return 1 << 20
    return max((most - is_open - SPARE_DESCRIPTORS) // servers, LEAST_CONNECTIONS)


class HttpClient:
    """Calls the routes of one vLLM server. Every call has a deadline, and every failure is a `ServerError`.

    Credentials in `base_url` are sent if there is no `api_key`. No error or log line contains a key or a password.
    This class repeats a call only when a key was refused and its file holds another one: only the caller knows which
    other calls are safe to repeat.

    Args:
        base_url: Address of the server, `http://` or `https://`.
        api_key: Sent to all routes as a bearer token; vLLM requires it on its inference routes.
        control_key: Sent to all routes except inference, in the header `X-Vgen-Control-Key`. Both keys may be files,
            as a `pathlib.Path`: they are read again when the server refuses a key, and the call is repeated once.
        timeout: Seconds for a whole call, unless the call says otherwise.
        connect_timeout: Seconds for connecting.
        ssl: An `ssl.SSLContext` for `https`, or None for the system's certificates.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: KeyOrFile = None,
        control_key: KeyOrFile = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        ssl: Any = None,
    ) -> None:
        self.name = public_url(base_url.rstrip("/"))
        """The address without credentials."""
        self.timeout = timeout
        self.lease: str | None = None
        """The lease token, sent with every call that changes the server."""
        self.connections: int | None = None
        """The most inference calls at a time; the others wait. None: as many as this process has descriptors for."""
        self.watch = CallWatch(self.name, self._health_problem)
        """Ends the calls that wait when the server is gone or stopped."""
        self._url = base_url
        self._api_key, self._control_key = Key("api_key", api_key), Key("control_key", control_key)
        self._connect_timeout = connect_timeout
        self._ssl = ssl if ssl is not None else True
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """GET `path` and return the JSON of the answer, or None if its body is empty."""
        return self._json("GET", path, await self._call("GET", path, timeout))

    async def get_text(self, path: str, *, timeout: float | None = None) -> str:
        """GET `path` and return the body of the answer as text."""
        return (await self._call("GET", path, timeout)).decode("utf-8", "replace")

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        json_answer: bool = True,
    ) -> Any:
        """POST to a route that changes the server, with the control key and the lease.

        Returns the JSON of the answer, or None if its body is empty or `json_answer` is False.
        """
        headers = {LEASE_HEADER: self.lease} if self.lease else {}
        content = None if body is None else msgspec.json.encode(body)
        raw = await self._call("POST", path, timeout, body=content, headers=headers)
        return self._json("POST", path, raw) if json_answer else None

    async def infer(self, path: str, body: bytes, headers: Headers, decode: Callable[[bytes], T], timeout: float) -> T:
        """POST to an inference route, without the control key, and return the decoded answer."""
        raw = await self._call("POST", path, timeout, body=body, headers=headers, inference=True)
        try:
            return decode(raw)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._no_answer(f"POST {path} returned a body that is not in vLLM's format") from error

    async def frames(
        self, path: str, body: bytes, decode: Callable[[bytes], T], timeout: float, silence: float
    ) -> AsyncGenerator[T]:
        """POST to an inference route that answers with frames, and yield each decoded frame.

        A frame is its length in bytes (four bytes, big-endian) and its content. Raises `ServerError` also if no frame
        comes for `silence` seconds. Closing the generator early closes the connection, which aborts the call.
        """
        async with self._request("POST", path, body, timeout, {}, inference=True, silence=silence) as response:
            while True:
                try:
                    length = await response.content.readexactly(4)
                    frame = await response.content.readexactly(int.from_bytes(length, "big"))
                except asyncio.IncompleteReadError as error:
                    if error.partial or response.content.exception() is not None:
                        raise self._no_answer(f"POST {path} was cut off") from None
                    return
                try:
                    decoded = decode(frame)
                except (ValueError, RecursionError) as error:
                    raise self._no_answer(f"POST {path} returned an unknown frame") from error
                yield decoded

    async def _health_problem(self) -> ServerError | None:
        """Why the server cannot answer any call, as far as its `/health` says so."""
        try:
            await self._call("GET", "/health", ANSWER_SECONDS)
        except ServerError as error:
            return error if error.status is None or error.status >= 500 else None
        return None

    async def close(self) -> None:
        """Close the pooled connections."""
        for session in self._sessions.values():
            await session.close()

    async def _call(
        self,
        method: str,
        path: str,
        timeout: float | None,
        *,
        body: bytes | None = None,
        headers: Headers | None = None,
        inference: bool = False,
    ) -> bytes:
        limit = self.timeout if timeout is None else timeout
        async with self._request(method, path, body, limit, headers or {}, inference=inference) as response:
            return await response.read()

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        limit: float,
        headers: Headers,
        *,
        inference: bool = False,
        silence: float | None = None,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Send a request and yield the response to read its body. All failures become `ServerError`."""
        limits = aiohttp.ClientTimeout(
            total=limit, sock_connect=min(self._connect_timeout, limit), sock_read=min(silence or limit, limit)
        )
        watched = self.watch.guarding(inference=inference) if limit > WATCHED_SECONDS else nullcontext()
        try:
            async with watched:
                for attempt in range(2):
                    keys = self._keys(control=not inference)
                    async with self._session(inference).request(
                        method,
                        self.name + path,
                        data=body,
                        headers={**keys, **headers, "Content-Type": "application/json"},
                        timeout=limits,
                        ssl=self._ssl,
                        allow_redirects=False,  # a redirect would send the keys to another server
                    ) as response:
                        if response.status == 401 and not attempt and self._replaced(keys, control=not inference):
                            continue  # the server has refused the call, so that it may be repeated
                        if response.status >= 300:
                            raise self._refusal(method, path, response.status, await response.read())
                        yield response
                        return
        except TimeoutError as error:
            raise self._no_answer(f"{method} {path} was not answered within {limit:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._no_answer(f"{method} {path} failed: {_reason(error)}") from None
        except RuntimeError:  # aiohttp's, for a session that is closed
            if not any(session.closed for session in self._sessions.values()):
                raise
            raise self._no_answer(f"{method} {path} failed: the engine was closed") from None

    def _keys(self, *, control: bool) -> dict[str, str]:
        """The headers with the keys. Inference routes do not get the control key."""
        key = self._control_key.value if control else ""
        return _authorization(self._url, self._api_key.value) | ({CONTROL_HEADER: key} if key else {})

    def _replaced(self, keys: Headers, *, control: bool) -> bool:
        """Whether the files hold other keys than these, which the server has refused."""
        self._api_key.read_again()
        self._control_key.read_again()
        return self._keys(control=control) != keys

    def _session(self, reuse_connection: bool) -> aiohttp.ClientSession:
        """The connection pool, or the session that opens a new connection for each call.

        vLLM closes a connection that was idle for five seconds, perhaps at the moment when the next call is sent on
        it. Then the caller cannot know whether that call arrived, so calls that must not be repeated use a new one.
        """
        if reuse_connection not in self._sessions:
            # Requests wait in the engine's scheduler, and here only where this process may open no more connections.
            # Calls that change the server are few, and must not wait behind inference.
            limit = (self.connections or connection_limit()) if reuse_connection else 0
            self._sessions[reuse_connection] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=limit, force_close=not reuse_connection, keepalive_timeout=2.0 if reuse_connection else None
                )
            )
        return self._sessions[reuse_connection]

    def _json(self, method: str, path: str, raw: bytes) -> Any:
        try:
            return json.loads(raw) if raw.strip() else None
        except (ValueError, RecursionError):
            raise self._no_answer(f"{method} {path} returned a body that is not JSON") from None

    def _refusal(self, method: str, path: str, status: int, raw: bytes) -> ServerError:
        reason, message = _error_of(raw)
        return ServerError(
            f"{method} {path} answered {status}: {message}",
            url=self.name,
            status=status,
            reason=reason,
            server_message=message,
            retryable=status in RETRYABLE,
        )

    def _no_answer(self, problem: str) -> ServerError:
        """The error for a call without a usable answer: the same call may succeed later or elsewhere."""
        return ServerError(problem, url=self.name, retryable=True)


def _authorization(url: str, api_key: str) -> dict[str, str]:
    if api_key:
        return {"Authorization": f"Bearer {api_key}"}
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    return {"Authorization": aiohttp.BasicAuth(unquote(parts.username), unquote(parts.password or "")).encode()}


def _reason(error: Exception) -> str:
    """The kind of failure. The error's own text is left out, because it may repeat the request."""
    system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    strerror = getattr(system, "strerror", None)
    return f"{type(error).__name__} ({strerror})" if strerror else type(error).__name__


def _error_of(raw: bytes) -> tuple[str | None, str]:
    """The reason (`error.type`) and the message of an error's body, in the formats of vLLM, FastAPI and proxies."""
    text = raw.decode("utf-8", "replace").strip()
    try:
        content: Any = json.loads(text)
        message = _message_of(content).encode("utf-8", "replace").decode()  # JSON can hold what no terminal can print
    except (ValueError, RecursionError):
        return None, text[:_MESSAGE_LIMIT] or "no message"
    error = content.get("error") if isinstance(content, dict) else None
    reason = error.get("type") if isinstance(error, dict) else None
    return reason if isinstance(reason, str) else None, message[:_MESSAGE_LIMIT] or "no message"


def _message_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        key = next((key for key in ("error", "message", "detail") if key in content), None)
        return json.dumps(content) if key is None else _message_of(content[key])
    if isinstance(content, list):
        # FastAPI's validation errors: what is wrong and where. They also hold the input, which stays private.
        items = [item for item in content if isinstance(item, dict)]
        content = [{key: item[key] for key in ("loc", "msg") if key in item} for item in items]
    return json.dumps(content)
