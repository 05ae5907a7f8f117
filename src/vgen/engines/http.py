"""One vLLM server over HTTP: deadlines, typed errors, and the server's own words in them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..errors import MissingExtraError, ServerError
from ..profiling.content import public_url

try:
    import aiohttp
    import msgspec
except ImportError as error:
    raise MissingExtraError("ServerGeneration", "aiohttp and msgspec", "server") from error

T = TypeVar("T")

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same call may succeed: the server is busy, starting or going."""
CONTROL_HEADER, LEASE_HEADER = "X-Vgen-Control-Key", "X-Vgen-Lease"
_SAID = 2000
"""Characters of a server's own words that an error repeats."""


class Loop:
    """An event loop on a thread of its own, for a client whose callers are not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vgen-http", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`; its result, error and cancellation are the future's."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Do `work` and return its result. An exception here, an interrupt too, cancels it."""
        future = self.start(work)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise TimeoutError from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()


class Server:
    """A vLLM server's routes. Every call has a deadline and raises `ServerError`, whatever goes wrong.

    Credentials in `base_url` are sent where there is no `api_key`; neither is ever repeated. Nothing is
    retried here: what is safe to repeat is its caller's to know.
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
        """The address, as it may be shown."""
        self._authorization = _authorization(base_url, api_key)
        self.timeout = timeout
        self._connect_timeout, self._ssl = connect_timeout, ssl
        self._control = {CONTROL_HEADER: control_key} if control_key else {}
        self.lease: str | None = None
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON that `path` answers with; an empty body gives None."""
        return self._json("GET", path, await self._call("GET", path, None, timeout, self._control))

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Post to a route that changes the server; the control key and the lease go along."""
        lease = {LEASE_HEADER: self.lease} if self.lease else {}
        content = None if body is None else msgspec.json.encode(body)
        return self._json("POST", path, await self._call("POST", path, content, timeout, {**self._control, **lease}))

    async def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """`post` where the answer says nothing, and need not be JSON."""
        lease = {LEASE_HEADER: self.lease} if self.lease else {}
        await self._call("POST", path, msgspec.json.encode(body), None, {**self._control, **lease})

    async def infer(
        self, path: str, body: bytes, headers: Mapping[str, str], decode: Callable[[bytes], T], timeout: float
    ) -> T:
        """Post to an inference route, which the API key guards, and decode what it answers."""
        raw = await self._call("POST", path, body, timeout, headers, once=False)
        try:
            return decode(raw)
        except (ValueError, TypeError, KeyError) as error:
            raise self._error(f"POST {path} answered in a shape that is not vLLM's", retryable=True) from error

    async def frames(
        self, path: str, body: bytes, decode: Callable[[bytes], T], timeout: float, silence: float
    ) -> AsyncGenerator[T]:
        """Post to an inference route that answers in frames: four bytes of length, big-endian, and so many bytes.

        Raises `ServerError` also where no frame comes for `silence` seconds. Leaving it early hangs up.
        """
        async with self._request("POST", path, body, timeout, {}, silence=silence) as response:
            if response.status >= 300:
                raise self._refusal("POST", path, response.status, await response.read())
            while True:
                try:
                    length = await response.content.readexactly(4)
                    frame = await response.content.readexactly(int.from_bytes(length, "big"))
                except asyncio.IncompleteReadError as error:
                    if error.partial or response.content.exception() is not None:
                        raise self._error(f"POST {path} was cut off", retryable=True) from None
                    return
                try:
                    decoded = decode(frame)
                except ValueError as error:
                    raise self._error(f"POST {path} answered something unknown", retryable=True) from error
                yield decoded

    async def close(self) -> None:
        """Close the pooled connections."""
        for session in self._sessions.values():
            await session.close()

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        headers: Mapping[str, str],
        *,
        once: bool = True,
    ) -> bytes:
        limit = self.timeout if timeout is None else timeout
        async with self._request(method, path, body, limit, headers, once=once) as response:
            raw = await response.read()
            if response.status >= 300:
                raise self._refusal(method, path, response.status, raw)
            return raw

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        limit: float,
        headers: Mapping[str, str],
        *,
        once: bool = False,
        silence: float | None = None,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """The answer's head; whatever goes wrong within is a `ServerError`."""
        limits = aiohttp.ClientTimeout(
            total=limit, sock_connect=min(self._connect_timeout, limit), sock_read=min(silence or limit, limit)
        )
        try:
            async with self._open(once).request(
                method,
                self.name + path,
                data=body,
                headers={**self._authorization, **headers, "Content-Type": "application/json"},
                timeout=limits,
                ssl=self._ssl if self._ssl is not None else True,
                allow_redirects=False,  # keys are not for others
            ) as response:
                yield response
        except TimeoutError as error:
            raise self._error(f"{method} {path} was not answered within {limit:g} s", retryable=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._error(f"{method} {path} failed: {_reason(error)}", retryable=True) from None

    def _refusal(self, method: str, path: str, status: int, raw: bytes) -> ServerError:
        said, retryable = _words(raw), status in RETRYABLE
        return ServerError(
            f"{method} {path} answered {status}: {said}", url=self.name, status=status, said=said, retryable=retryable
        )

    def _json(self, method: str, path: str, raw: bytes) -> Any:
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError:
            raise self._error(f"{method} {path} answered something that is not JSON", retryable=True) from None

    def _open(self, once: bool) -> aiohttp.ClientSession:
        """The pool of connections, or `once`, what opens one for a call that must not be sent twice.

        A server closes an idle connection (vLLM after five seconds), perhaps just as the next call is sent on it; then
        nobody knows whether that call has arrived.
        """
        if once not in self._sessions:
            # No limit on connections: the engine's scheduler is the place where requests wait.
            connector = aiohttp.TCPConnector(limit=0, force_close=once, keepalive_timeout=None if once else 2.0)
            self._sessions[once] = aiohttp.ClientSession(connector=connector)
        return self._sessions[once]

    def _error(self, problem: str, *, retryable: bool = False) -> ServerError:
        return ServerError(problem, url=self.name, retryable=retryable)


def _authorization(url: str, api_key: str | None) -> dict[str, str]:
    if api_key:
        return {"Authorization": f"Bearer {api_key}"}
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    return {"Authorization": aiohttp.BasicAuth(unquote(parts.username), unquote(parts.password or "")).encode()}


def _reason(error: Exception) -> str:
    """What kind of failure: never the error's own text, which may repeat what was sent."""
    system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    strerror = getattr(system, "strerror", None)
    return f"{type(error).__name__} ({strerror})" if strerror else type(error).__name__


def _words(raw: bytes) -> str:
    """What a server said of an error, out of the shapes that vLLM and proxies say it in."""
    text = raw.decode("utf-8", "replace").strip()
    try:
        found: Any = json.loads(text)
        while isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if key in found), json.dumps(found))
        if isinstance(found, list):  # a validation's: what was wrong and where, without the input that it repeats
            found = [
                {key: item[key] for key in ("loc", "msg") if key in item} for item in found if isinstance(item, dict)
            ]
        text = found if isinstance(found, str) else json.dumps(found)
    except ValueError:
        pass
    return text[:_SAID] or "nothing"
