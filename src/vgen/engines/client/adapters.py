"""LoRA adapters of servers: each state of an adapter's folder is loaded once, under a name of its own."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...engine_protocol import Batch
from ...errors import ServerError
from ...types import LoRARequest
from ..lora_adapters import AdapterCopy, fingerprint, is_newer
from .endpoint import PROBE_SECONDS, Endpoint
from .event_loop_thread import EventLoopThread


@dataclass(slots=True, eq=False)
class _Version:
    """One state of an adapter's folder."""

    copy: AdapterCopy
    name: str
    """The name that the servers know it by. No two versions share one, so that no cache mistakes one for another."""
    users: int = 0
    """Batches in flight that use it."""
    superseded: bool = False


class ServerAdapters:
    """Loads adapters into servers, and removes old versions when no request uses them any more.

    vLLM can also load an adapter again under its name. Each later request then carries the order to do so, and reads
    the files once more in the middle of the others; and requests in flight go on with the new one.

    Args:
        loop: Runs the HTTP calls.
        endpoints: All servers.
    """

    def __init__(self, loop: EventLoopThread, endpoints: Sequence[Endpoint]) -> None:
        self._loop, self._endpoints = loop, endpoints
        self._lock = threading.RLock()
        """Held while an adapter is loaded. Reentrant, because the collector may close a stream in any thread."""
        self._counting = threading.Lock()
        self._versions: dict[str, _Version] = {}
        """The last version of each adapter, by the caller's name."""

    @contextmanager
    def served(self, batch: Batch, endpoints: Sequence[Endpoint]) -> Iterator[Batch]:
        """`batch` with the name by which the servers know the present state of its adapter, which they have then.

        Raises `ValueError`, with what to do, if a server does not load the adapter.
        """
        if (adapter := batch.lora_request) is None:
            yield batch
            return
        with self._lock:
            version = self._current(adapter, endpoints)
            if version is not None:
                with self._counting:
                    version.users += 1
        if version is None:  # the servers were started with it
            yield batch
            return
        try:
            yield replace(batch, lora_request=LoRARequest(lora_name=version.name, lora_path=version.copy.path))
        finally:
            with self._counting:
                version.users -= 1
            self._retire(version)

    def close(self) -> None:
        """Remove the copies."""
        for version in self._versions.values():
            version.copy.remove()

    def _current(self, adapter: LoRARequest, endpoints: Sequence[Endpoint]) -> _Version | None:
        """The version for the present state of the adapter's folder, which the servers have then."""
        path, name = adapter.lora_path, adapter.lora_name
        before = version = self._versions.get(name)
        if path and (version is None or is_newer(fingerprint(path), version.copy.fingerprint)):
            # Next to the folder, because the servers can read that: they may run on another machine.
            copy = AdapterCopy(path, Path(path).absolute().parent)
            version = _Version(copy, f"{name}@{secrets.token_hex(4)}")
        if version is None:
            return None
        if missing := [endpoint for endpoint in endpoints if version.name not in endpoint.adapters]:
            self._load(name, version, missing)
        self._versions[name] = version
        if before is not None and before is not version:
            before.superseded = True
            self._retire(before)
        return version

    def _load(self, name: str, version: _Version, endpoints: Sequence[Endpoint]) -> None:
        """Load a version into these servers. Those that cannot be reached are `lost`, unless none can."""
        copy, path = version.copy.path, version.copy.fingerprint[0]
        errors = self._post_load(version.name, copy, endpoints)
        refusing = [i for i, error in enumerate(errors) if error is not None and error.status is not None]
        if refusing and copy != path:
            # Perhaps they have the folder, and not its copy. If not, the errors name the folder that the caller knows.
            again = self._post_load(version.name, path, [endpoints[i] for i in refusing])
            for i, error in zip(refusing, again, strict=True):
                errors[i] = error
        unreachable = [error is not None and error.status is None for error in errors]
        for endpoint, error, gone in zip(endpoints, errors, unreachable, strict=True):
            if error is None:
                endpoint.adapters.add(version.name)
            elif gone and not all(unreachable):
                endpoint.lost = True
            else:
                raise ValueError(
                    f"LoRA adapter {name!r} was not loaded from {path!r}: {error}; start the server by "
                    "`vgen serve` with --enable-lora and --max-lora-rank, and pass its control_key"
                ) from error

    def _post_load(self, name: str, path: str, endpoints: Sequence[Endpoint]) -> list[ServerError | None]:
        body = {"lora_name": name, "lora_path": path}

        async def load(endpoint: Endpoint) -> ServerError | None:
            try:
                if endpoint.lease is not None:
                    await endpoint.lease.hold()
                await endpoint.http.post("/v1/load_lora_adapter", body, json_answer=False)
            except ServerError as error:
                # vLLM refuses a name that it has already, as after a connection was lost for a moment. No other has it.
                return None if error.status is not None and await has_it(endpoint) else error
            return None

        async def has_it(endpoint: Endpoint) -> bool:
            with suppress(ServerError, LookupError, TypeError):
                return any(each["id"] == name for each in (await endpoint.http.get("/v1/models"))["data"])
            return False

        return self._loop.run_all([load(endpoint) for endpoint in endpoints])

    def _retire(self, version: _Version) -> None:
        """Have the servers forget a version that no request uses any more, and that none will ask for."""
        if not version.superseded or version.users:
            return
        holders = [each for each in self._endpoints if version.name in each.adapters]
        body = {"lora_name": version.name}

        async def forget() -> None:
            calls = [
                each.http.post("/v1/unload_lora_adapter", body, timeout=PROBE_SECONDS, json_answer=False)
                for each in holders
            ]
            await asyncio.gather(*calls, return_exceptions=True)

        for each in holders:
            each.adapters.discard(version.name)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.start(forget())
        version.copy.remove()
