"""One vLLM server over HTTP: deadlines, typed errors, and the server's own words in them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..errors import MissingExtraError, ServerError
from ..profiling.content import public_url

try:
    import aiohttp
except ImportError as error:
    raise MissingExtraError("ServerGeneration", "aiohttp", "server") from error

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
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON that `path` answers with; an empty body gives None."""
        return await self._call("GET", path, None, timeout, self._control)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Post to a route that changes the server; the control key and the lease go along."""
        lease = {LEASE_HEADER: self.lease} if self.lease else {}
        return await self._call("POST", path, body, timeout, {**self._control, **lease, **(headers or {})})

    async def infer(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        """Post to an inference route, which the API key guards."""
        return await self._call("POST", path, body, None, headers)

    async def close(self) -> None:
        """Close the pooled connections."""
        if self._session is not None:
            await self._session.close()

    async def _call(self, method: str, path: str, body: Any, timeout: float | None, headers: Mapping[str, str]) -> Any:
        limit = self.timeout if timeout is None else timeout
        try:
            async with self._open().request(
                method,
                self.name + path,
                data=None if body is None else json.dumps(body),
                headers={**self._authorization, **headers, "Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=limit, sock_connect=min(self._connect_timeout, limit)),
                ssl=self._ssl if self._ssl is not None else True,
            ) as response:
                raw = await response.read()
        except TimeoutError as error:
            raise self._error(f"{method} {path} was not answered within {limit:g} s", retryable=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._error(f"{method} {path} failed: {type(error).__name__}", retryable=True) from None
        if response.status >= 400:
            raise self._error(
                f"{method} {path} answered {response.status}: {_words(raw)}",
                status=response.status,
                retryable=response.status in RETRYABLE,
            )
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError:
            raise self._error(f"{method} {path} answered something that is not JSON", retryable=True) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit on connections: the engine's scheduler is the place where requests wait.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=75))
        return self._session

    def _error(self, problem: str, *, status: int | None = None, retryable: bool = False) -> ServerError:
        return ServerError(problem, url=self.name, status=status, retryable=retryable)


def _authorization(url: str, api_key: str | None) -> dict[str, str]:
    if api_key:
        return {"Authorization": f"Bearer {api_key}"}
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    return {"Authorization": aiohttp.BasicAuth(unquote(parts.username), unquote(parts.password or "")).encode()}


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
