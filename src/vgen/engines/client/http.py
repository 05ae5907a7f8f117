"""HTTP client for one vLLM server: every call has a deadline and raises a typed error that quotes the server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from ...errors import MissingExtraError, ServerError
from ...profiling.content_capture import public_url
from ..server_api import CONTROL_HEADER, LEASE_HEADER

try:
    import aiohttp
    import msgspec
except ImportError as error:
    raise MissingExtraError("ServerGeneration", "aiohttp and msgspec", "server") from error

logger = logging.getLogger(__name__)

T = TypeVar("T")
Headers: TypeAlias = Mapping[str, str]

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same call may succeed: the server is busy, starting or stopping."""
_MESSAGE_LIMIT = 2000
"""An error quotes at most this many characters of the server's message."""
SPARE_DESCRIPTORS = 64
"""How many file descriptors connections leave to the rest of the process."""
LEAST_CONNECTIONS = 4


class EventLoopThread:
    """Runs an asyncio event loop on its own thread, for callers that are not asynchronous.

    The thread ends with `close` or `close_after`, or when nobody has this object any more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="vgen-http", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop, os.getpid())
        self._ending: asyncio.Future[None] | None = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine and return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run the coroutine and return its result.

        An exception in the calling thread (`KeyboardInterrupt`, for example) cancels the coroutine. Raises
        `TimeoutError` if it takes longer than `timeout` seconds.
        """
        future = self.start(coroutine)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # has no effect on a coroutine that has ended

    def run_all(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run the coroutines concurrently and return their results. All of them end before an error is raised."""

        async def together() -> list[T]:
            tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
            await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

        return self.run(together())

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._stop()
        self._thread.join(5.0)

    def close_after(self, last: Coroutine[Any, Any, object], then: Callable[[], object], timeout: float) -> None:
        """Have the loop's thread run `last`, for at most `timeout` seconds, then call `then`, and end. Returns at once.

        A finalizer may call it: it takes no lock and waits for nothing, whichever thread the finalizer runs in.
        """

        async def end() -> None:
            try:
                await asyncio.wait_for(last, timeout)
            except Exception as error:
                logger.warning("vgen: connections were left open: %s", type(error).__name__)
            try:
                then()
            finally:
                self._stop()

        def begin() -> None:
            self._ending = asyncio.ensure_future(end())

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:  # the loop is closed already
            last.close()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The loop's thread. It has no reference to the `EventLoopThread`, so that this can be collected."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_others())
    finally:
        loop.close()


async def _cancel_others() -> None:
    """Cancel all tasks of the loop but this one, and wait for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _stop(loop: asyncio.AbstractEventLoop, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the loop, and not its thread
        with suppress(RuntimeError):  # it is closed already
            loop.call_soon_threadsafe(loop.stop)


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
    This class never retries: only its caller knows which calls are safe to repeat.

    Args:
        base_url: Address of the server, `http://` or `https://`.
        api_key: Sent to all routes as a bearer token; vLLM requires it on its inference routes.
        control_key: Sent to all routes except inference, in the header `X-Vgen-Control-Key`.
        timeout: Seconds for a whole call, unless the call says otherwise.
        connect_timeout: Seconds for connecting.
        ssl: An `ssl.SSLContext` for `https`, or None for the system's certificates.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        control_key: str | None = None,
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
        self._authorization = _authorization(base_url, api_key)
        self._connect_timeout = connect_timeout
        self._ssl = ssl if ssl is not None else True
        self._control = {CONTROL_HEADER: control_key} if control_key else {}
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """GET `path` and return the JSON of the answer, or None if its body is empty."""
        return self._json("GET", path, await self._call("GET", path, None, timeout, self._control))

    async def get_text(self, path: str, *, timeout: float | None = None) -> str:
        """GET `path` and return the body of the answer as text."""
        return (await self._call("GET", path, None, timeout, self._control)).decode("utf-8", "replace")

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
        headers = {**self._control, **({LEASE_HEADER: self.lease} if self.lease else {})}
        content = None if body is None else msgspec.json.encode(body)
        raw = await self._call("POST", path, content, timeout, headers)
        return self._json("POST", path, raw) if json_answer else None

    async def infer(self, path: str, body: bytes, headers: Headers, decode: Callable[[bytes], T], timeout: float) -> T:
        """POST to an inference route, without the control key, and return the decoded answer."""
        raw = await self._call("POST", path, body, timeout, headers, reuse=True)
        try:
            return decode(raw)
        except (ValueError, TypeError, KeyError) as error:
            raise self._no_answer(f"POST {path} returned a body that is not in vLLM's format") from error

    async def frames(
        self, path: str, body: bytes, decode: Callable[[bytes], T], timeout: float, silence: float
    ) -> AsyncGenerator[T]:
        """POST to an inference route that answers with frames, and yield each decoded frame.

        A frame is its length in bytes (four bytes, big-endian) and its content. Raises `ServerError` also if no frame
        comes for `silence` seconds. Closing the generator early closes the connection, which aborts the call.
        """
        async with self._request("POST", path, body, timeout, {}, reuse_connection=True, silence=silence) as response:
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
                except ValueError as error:
                    raise self._no_answer(f"POST {path} returned an unknown frame") from error
                yield decoded

    async def close(self) -> None:
        """Close the pooled connections."""
        for session in self._sessions.values():
            await session.close()

    async def _call(
        self, method: str, path: str, body: bytes | None, timeout: float | None, headers: Headers, reuse: bool = False
    ) -> bytes:
        limit = self.timeout if timeout is None else timeout
        async with self._request(method, path, body, limit, headers, reuse_connection=reuse) as response:
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
        reuse_connection: bool = False,
        silence: float | None = None,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Send a request and yield the response to read its body. All failures become `ServerError`."""
        limits = aiohttp.ClientTimeout(
            total=limit, sock_connect=min(self._connect_timeout, limit), sock_read=min(silence or limit, limit)
        )
        try:
            async with self._session(reuse_connection).request(
                method,
                self.name + path,
                data=body,
                headers={**self._authorization, **headers, "Content-Type": "application/json"},
                timeout=limits,
                ssl=self._ssl,
                allow_redirects=False,  # a redirect would send the keys to another server
            ) as response:
                if response.status >= 300:
                    raise self._refusal(method, path, response.status, await response.read())
                yield response
        except TimeoutError as error:
            raise self._no_answer(f"{method} {path} was not answered within {limit:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._no_answer(f"{method} {path} failed: {_reason(error)}") from None

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
        except ValueError:
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


def _authorization(url: str, api_key: str | None) -> dict[str, str]:
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
    except ValueError:
        return None, text[:_MESSAGE_LIMIT] or "no message"
    error = content.get("error") if isinstance(content, dict) else None
    reason = error.get("type") if isinstance(error, dict) else None
    return reason if isinstance(reason, str) else None, _message_of(content)[:_MESSAGE_LIMIT] or "no message"


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
