"""Notices that another trainer has replaced the weights of servers that a frozen engine uses."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress

from ...errors import EngineError, ServerError
from ...types import Completion
from .endpoint import Endpoint, held_version
from .event_loop_thread import EventLoopThread


class FrozenWeights:
    """The weight version of each server, which must stay as it was at the start.

    A server that tells no version then is expected to keep the version of its first completion. A sync that keeps the
    version's name is not noticed.
    """

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._expected = {each.name: each.weight_version for each in endpoints if each.weight_version is not None}

    def ask(self, loop: EventLoopThread, endpoints: Sequence[Endpoint]) -> None:
        """Ask those servers whose completions carry no version. Raises `EngineError` if one has other weights."""

        async def ask(endpoint: Endpoint) -> None:
            with suppress(ServerError):  # if it is unreachable, the next request finds out
                self._check(endpoint.name, [await held_version(endpoint.http)])

        loop.run_all(
            [ask(endpoint) for endpoint in endpoints if endpoint.controlled and "batch" not in endpoint.features]
        )

    def checked(self, completions: Iterable[Completion]) -> Generator[Completion]:
        """The completions. Raises `EngineError` at the first that other weights have sampled."""
        for completion in completions:
            if completion.server is not None:
                versions = [version for version, _, _ in completion.weight_versions or ()]
                self._check(completion.server, [*versions, completion.weight_version])
            yield completion

    def _check(self, server: str, versions: Iterable[str | None]) -> None:
        for version in versions:
            if version is not None and version != (expected := self._expected.setdefault(server, version)):
                raise EngineError(
                    f"{server} has got other weights from another trainer ({version!r}, not {expected!r}), so it is no "
                    "longer the model that this frozen engine stands for: give the trainer a server of its own, and "
                    "restart this one"
                )
