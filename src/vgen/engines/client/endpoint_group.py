"""Calls to several servers at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ...errors import ServerError
from ...profiling import Span, semconv
from ...weights.transports.buckets import FORMS, FORMS_NAME, TIES
from ...weights.transports.sync_errors import as_sync_error
from .. import server_api
from .endpoint import Endpoint
from .event_loop_thread import EventLoopThread


def call_all(
    loop: EventLoopThread,
    endpoints: Sequence[Endpoint],
    phase: str,
    call: Callable[[Endpoint], Coroutine[Any, Any, Any]],
) -> list[float]:
    """Make a call to every server at once, and return the seconds that each took.

    All calls have ended before an error is raised. A `ServerError` is raised as a `WeightSyncError` of `phase`.
    """

    async def timed(endpoint: Endpoint) -> float:
        start = time.monotonic()
        try:
            await call(endpoint)
        except ServerError as error:
            raise as_sync_error(error, phase=phase, receiver=endpoint.name) from error
        return time.monotonic() - start

    return loop.run_all([timed(endpoint) for endpoint in endpoints])


class ServerGroup:
    """Servers that get weights together: an `EndpointGroup` of the transports."""

    def __init__(self, loop: EventLoopThread, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self._loop = loop
        self._seconds: dict[str, list[float]] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server gets the rank of its first worker, if there is a process group."""
        ranks, rank = dict[str, int](), 1
        for endpoint in self.endpoints:
            ranks[endpoint.name] = rank
            rank += endpoint.workers

        def body(endpoint: Endpoint) -> dict[str, Any]:
            info = dict(init_info)
            if {"group", "rank_offset"} & info.keys():  # vLLM's own engine sets the rank of the first server
                info["rank_offset"] = ranks[endpoint.name]
            if "recorded" not in endpoint.features:  # a server of an older vgen refuses fields that it does not know
                info = {name: value for name, value in info.items() if name not in (FORMS, FORMS_NAME, TIES)}
            return {"init_info": info}

        self._post("init_weight_transfer_engine", server_api.INIT_TRANSFER, "transfer", body)

    def start_weight_update(self) -> None:
        self._post("start_weight_update", server_api.START_UPDATE, "transfer")

    def update_weights(self, update_info: Any) -> None:
        self._post("update_weights", server_api.UPDATE_WEIGHTS, "transfer", lambda _: {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {"weight_version": weight_version}
        self._post("finish_weight_update", server_api.FINISH_UPDATE, "load", lambda _: body)

    def update_in_one_call(
        self, update_info: Any, weight_version: str | None, init_info: dict[str, Any] | None = None
    ) -> None:
        body: dict[str, Any] = {"update_info": update_info, "weight_version": weight_version}
        body |= {} if init_info is None else {"init_info": init_info}
        self._post("update_in_one_call", server_api.WEIGHTS, "load", lambda _: body)

    def reload_checkpoint(self, folder: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._post("reload_checkpoint", "/collective_rpc", "load", lambda _: body)

    def set_version(self, weight_version: str) -> None:
        self._post("set_version", server_api.SET_VERSION, "load", lambda _: {"new_version": weight_version})

    def record_seconds(self, span: Span, method: str) -> None:
        if seconds := self._seconds.get(method):
            span.set(
                {
                    semconv.RECEIVER_MIN: min(seconds),
                    semconv.RECEIVER_MEDIAN: statistics.median(seconds),
                    semconv.RECEIVER_MAX: max(seconds),
                }
            )

    def _post(self, method: str, path: str, phase: str, body: Callable[[Endpoint], Any] = lambda _: None) -> None:
        seconds = call_all(self._loop, self.endpoints, phase, lambda endpoint: endpoint.http.post(path, body(endpoint)))
        before = self._seconds.get(method) or [0.0] * len(seconds)
        self._seconds[method] = [total + new for total, new in zip(before, seconds, strict=True)]
