"""One server as the engine in front of it knows it: what it can do, its lease, whether its weights are known."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..errors import EngineError, ServerError
from .http import CONTROL_HEADER, Server
from .router import is_router

logger = logging.getLogger("vgen.engines.server")

PROBE_SECONDS = 10.0
SERVER_INFO_SECONDS = 60.0
"""vLLM lists all installed packages before it answers for the first time."""
OLDEST_VLLM = 0, 30
LEASE_SECONDS = 60.0
"""A trainer that is gone holds its servers for so long."""
STOCK_VERSION = "default"
"""What vLLM calls the weights that it has started with."""


class LeaseHolder:
    """Holds one server's lease, renewed in the background, until `release`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._renewing: asyncio.Task[None] | None = None

    async def take(self, timeout: float, *, takeover: bool) -> None:
        """Take it. A dead holder's is waited for until it expires; a living one's is an `EngineError`."""
        if self._renewing is not None:
            self._renewing.cancel()
        self._server.lease = None
        holder = f"{socket.gethostname()}:{os.getpid()}"
        wanted = {"holder": holder, "ttl_seconds": LEASE_SECONDS, "takeover": takeover}
        give_up = time.monotonic() + min(timeout, LEASE_SECONDS + PROBE_SECONDS)
        while True:
            try:
                self._server.lease = (await self._server.post("/vgen/lease", wanted, timeout=PROBE_SECONDS))["token"]
                break
            except ServerError as error:
                if error.status != 409:
                    raise
                if time.monotonic() > give_up:
                    raise EngineError(
                        f"{self._server.name} serves another trainer, which is alive: {error.said or error}; "
                        "construct with takeover=True to take it from there"
                    ) from None
                await asyncio.sleep(1.0)
        self._renewing = asyncio.create_task(self._renew())

    async def release(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
            with suppress(ServerError):
                await self._server.post("/vgen/lease/release", {}, timeout=PROBE_SECONDS)
            self._server.lease = None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            try:
                await self._server.post("/vgen/lease/renew", {}, timeout=PROBE_SECONDS)
            except ServerError as error:
                if error.status == 409:  # another trainer has taken over; whatever this one sends is refused
                    logger.warning("vgen: %s has been taken over: %s", self._server.name, error.said)
                    return


@dataclass(slots=True)
class Peer:
    """A server, and what it has said of itself."""

    server: Server
    model: str
    max_model_length: int
    device_type: str = "unknown"
    dtype: str = "unknown"
    """Of its weights, under torch's name."""
    quantization: str | None = None
    features: frozenset[str] = frozenset()
    """Of vgen's own, where `vgen serve` started it: `batch`, `lease`, `shared_memory`, …; none on a stock server."""
    controlled: bool = False
    """Whether its weights, sleep and pause can be had: it is in development mode, and the keys are right."""
    fix: str = ""
    """What to do so that they can."""
    shape: dict[str, int] = field(default_factory=dict[str, int])
    """Of its model: `hidden_size` and the like, as far as it can be had."""
    max_num_seqs: int = 256
    weight_version: str | None = None
    """What it should hold; None where it cannot say."""
    host: str = ""
    """Tells the machine that it is on, where it says so."""
    workers: int = 1
    """Of all its data parallel engines together."""
    backend: str | None = None
    """Of vLLM's own weight-transfer engines the one that a stock server was started with."""
    starts: int = 0
    """How often it was found to have been started anew."""
    devices: frozenset[str] | None = None
    """The GPUs of its workers, once they were asked for."""
    loaded: dict[str, str] = field(default_factory=dict[str, str])
    """The `way` that its last weights were loaded in, and the `reason` where it was a reload; empty if not known."""
    adapters: dict[str, Any] = field(default_factory=dict[str, Any])
    """LoRA adapters that were loaded here, and what tells each from what it was before."""
    verified: bool = False
    """Whether its weights were looked at end to end since it was started."""
    slept: bool = False
    """Whether its weights were discarded since it was started."""
    lost: bool = False
    """It was out of reach: it may have been started anew since, with other weights."""
    speed: float | None = None
    """Completion tokens for each second, smoothed over the last calls."""
    lease: LeaseHolder | None = None
    """Where it knows leases, and this process may change it."""

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def stock(self) -> bool:
        """Whether its weights can be had without anything of vgen's in it."""
        return self.controlled and not self.features

    @property
    def tells(self) -> bool:
        """Whether it says how its weights were loaded: it has vgen's methods in its workers."""
        return {"recorded", "memory"} <= self.features

    @property
    def silent(self) -> bool:
        """Whether it has been given weights, and its completions do not say which they come from."""
        return self.controlled and "batch" not in self.features and self.weight_version not in (None, STOCK_VERSION)

    async def rejoin(self, timeout: float) -> None:
        """Be again the one who may change a server that was started anew."""
        self.adapters.clear()
        self.verified, self.slept, self.devices = False, False, None
        self.starts += 1
        if self.lease is not None:
            await self.lease.take(timeout, takeover=False)

    def measured(self, tokens: int, seconds: float) -> None:
        """It has answered a call with so many tokens."""
        if tokens and seconds > 0:
            rate = tokens / seconds
            self.speed = rate if self.speed is None else 0.7 * self.speed + 0.3 * rate

    def stray(self, holds: str | None) -> None:
        """It is there, and holds other weights than it should."""
        self.lost = True
        problem = "vgen: %s is back with weights %r, not %r: it is left out until the next sync"
        logger.warning(problem, self.name, holds, self.weight_version)

    async def look(self) -> None:
        """Whether a `silent` server was started anew while nobody looked: it is lost then."""
        with suppress(ServerError):  # what it is asked next says so as well
            self.lost = started_anew(await held_version(self.server), self.weight_version)

    async def back(self) -> bool:
        """Whether a server that was lost is there again, with the weights that it should hold."""
        try:
            await self.server.get("/health", timeout=PROBE_SECONDS)
            holds = await held_version(self.server)
        except ServerError:
            return False
        if self.controlled and holds != self.weight_version:
            self.stray(holds)
            return False
        self.lost = False
        return True


def started_anew(holds: str | None, expected: str | None) -> bool:
    """Whether a server that should hold `expected` has the weights again that it starts with."""
    return holds == STOCK_VERSION and expected not in (None, STOCK_VERSION)


async def describe(server: Server, shape: Collection[str] = ()) -> Peer:
    """Ask a server what it is, and the `shape` of its model. Raises `ServerError` or `EngineError`, with what to do."""
    try:
        found = dict((await server.get("/v1/models", timeout=PROBE_SECONDS))["data"][0])
        peer = Peer(server, str(found["id"]), int(found["max_model_len"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"{server.name} does not answer as a vLLM server does: is it one?") from error
    await _check_version(server)
    info = await _info(server)
    peer.features = frozenset(info.get("features", ()))
    mode = None
    if "lease" in peer.features:  # the control key is right
        peer.controlled, mode = True, info.get("logprobs_mode")
        peer.device_type, peer.dtype = str(info.get("device")), str(info.get("dtype"))
        peer.quantization = info.get("quantization")
        peer.max_num_seqs = int(info.get("max_num_seqs") or peer.max_num_seqs)
        peer.shape = dict(info.get("shape") or {})
        peer.host, peer.workers = str(info.get("host") or ""), int(info.get("world_size") or 1)
    elif not peer.features:
        try:
            config = (await server.get("/server_info?config_format=json", timeout=SERVER_INFO_SECONDS))["vllm_config"]
            peer.controlled, mode = True, config["model_config"]["logprobs_mode"]
            peer.device_type = str(config["device_config"]["device"])
            peer.dtype = str(config["model_config"].get("dtype")).removeprefix("torch.")
            peer.quantization = config["model_config"].get("quantization")
            peer.max_num_seqs = int(config.get("scheduler_config", {}).get("max_num_seqs") or peer.max_num_seqs)
            if transfer := config.get("weight_transfer_config"):
                peer.backend = str(transfer["backend"])
                peer.workers = int((await server.get("/get_world_size", timeout=PROBE_SECONDS))["world_size"])
        except (ServerError, KeyError, TypeError, ValueError):
            pass
    if not peer.shape:
        peer.shape = await _shape(peer, shape)
    if mode not in (None, "processed_logprobs"):
        logger.warning(
            "vgen: %s returns %s: its log-probabilities are not those that tokens were sampled with; "
            "start it with --logprobs-mode processed_logprobs",
            server.name,
            mode,
        )
    if (peer.features or peer.controlled) and await is_router(server, stock=not peer.features):
        # What changes a server would reach one of them, and the batch route, which is not JSON, perhaps none.
        peer.features, peer.controlled, peer.fix = frozenset(), False, "name the servers behind it in base_urls"
        logger.warning("vgen: %s is a router: it generates; no weight sync, sleep or pause; %s", server.name, peer.fix)
    elif not peer.controlled:
        what = "not in development mode" if not peer.features else "asking for a control key"
        stock = "start it with `vgen serve`, or with VLLM_SERVER_DEV_MODE=1"
        peer.fix = "pass control_key" if peer.features else stock
        logger.warning("vgen: %s is %s: no weight sync, sleep or pause; %s", server.name, what, peer.fix)
    if peer.controlled:
        if not peer.features:
            logger.info(
                "vgen: %s was not started by `vgen serve`: weights travel by %s, and completions have either timing or "
                "weight versions",
                server.name,
                f"checkpoints, or vLLM's own {peer.backend} engine" if peer.backend else "checkpoints",
            )
        with suppress(ServerError):
            peer.weight_version = await held_version(server)
    return peer


async def _shape(peer: Peer, wanted: Collection[str]) -> dict[str, int]:
    """What a server that does not describe its model lets on about it. Nothing is generated for it.

    A bias on a token that the model does not have is refused with the size of its vocabulary, by any vLLM. How wide
    its embeddings are is in what it prints of its modules, in development mode.
    """
    found: dict[str, int] = {}
    nowhere = {"model": peer.model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(2**31 - 1): 1.0}}
    try:
        await peer.server.infer("/v1/completions", msgspec.json.encode(nowhere), {}, len, PROBE_SECONDS)
    except ServerError as error:
        if match := re.search(r"Vocabulary size: (\d+)", error.said):
            found["vocab_size"] = int(match[1])
    if "embedding_dim" in wanted and peer.controlled and not peer.features:
        with suppress(ServerError, KeyError, TypeError, IndexError):
            inspect = {"method": "get_model_inspection"}
            said = (await peer.server.post("/collective_rpc", inspect, timeout=PROBE_SECONDS))["results"][0]
            if match := re.search(r"VocabParallelEmbedding\([^)]*\bembedding_dim=(\d+)", said):
                found["embedding_dim"] = int(match[1])
    return found


async def _check_version(server: Server) -> None:
    """Refuse a vLLM that is too old; one that does not say its version, behind a router, is taken at its word."""
    try:
        version = str((await server.get("/version", timeout=PROBE_SECONDS))["version"])
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except (ServerError, KeyError, TypeError, ValueError):
        return
    if numbers < OLDEST_VLLM:
        least = ".".join(map(str, OLDEST_VLLM))
        raise EngineError(f"{server.name} runs vLLM {version}, and vgen needs {least} or newer: upgrade the server")


async def held_version(server: Server) -> str | None:
    """The version of the weights that it holds now; None where it does not say."""
    try:
        return (await server.get("/weight_info", timeout=PROBE_SECONDS))["weight_version"]
    except ServerError as error:
        if error.status == 404:
            return None
        raise
    except (KeyError, TypeError):
        return None


async def _info(server: Server) -> dict[str, Any]:
    """What a server that `vgen serve` started says of itself; empty of another."""
    try:
        found = await server.get("/vgen/info", timeout=PROBE_SECONDS)
        return found if isinstance(found, dict) else {}
    except ServerError as error:
        if error.status == 401 and CONTROL_HEADER in error.said:
            return {"features": ["batch"]}  # inference needs no control key
        if error.status is None:
            raise
    return {}
