"""One vLLM server as the client sees it: what it can do, which weights it holds, how fast it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ...engine_protocol import Batch
from ...errors import ServerError
from ...types import Completion
from ..server_api import INFO, Feature
from .call_watch import ANSWER_SECONDS
from .http import HttpClient
from .lease_holder import LeaseHolder

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
"""Deadline of a call that only reads what a server is."""
STATE_SECONDS = 2.0
"""Deadline of a call that explains another failure."""
SERVER_INFO_SECONDS = 60.0
"""Deadline of `/server_info`: before its first answer vLLM lists all installed packages."""
RESET_PREFIX_CACHE = "/reset_prefix_cache?reset_external=true"
"""vLLM's route that empties the prefix cache, and the stores of KV connectors as well."""
STOCK_VERSION = "default"
"""vLLM's name for the weights that a server starts with."""
_ASLEEP = re.compile(r'^vllm:engine_sleep_state\{[^}]*sleep_state="awake"[^}]*\} 0(\.0)?$', re.MULTILINE)
"""What vLLM's metrics say while memory is asleep: `PrometheusStatLogger` in `vllm/v1/metrics/loggers.py`."""
TRAINERS_WAY_BACK = "another client has stopped it, and sync_weights() starts it again"
FROZEN_WAY_BACK = "its trainer must call wake_up() or resume(), or you POST to its route /wake_up or /resume"
SPEED_SMOOTHING = 0.7
"""Weight of earlier calls in `Endpoint.speed`."""


@dataclass(slots=True)
class Endpoint:
    """One server. `discovery.discover` makes it; the fields that are not constructor arguments change over time."""

    http: HttpClient
    model: str
    """The name that the server gives to its model."""
    max_model_length: int
    """Tokens of a prompt and its completion together."""
    device_type: str = "unknown"
    dtype: str = "unknown"
    """Of the weights, by torch's name: `bfloat16`, for example."""
    quantization: str | None = None
    features: frozenset[str] = frozenset()
    """vgen's extensions, if `vgen serve` started the server: `batch`, `lease`, `shared_memory`, …"""
    controlled: bool = False
    """Whether this client can sync weights, pause and sleep: development mode is on and the keys are right."""
    fix: str = ""
    """What the user can do to make an uncontrolled server controlled."""
    shape: dict[str, int] = field(default_factory=dict[str, int])
    """Sizes of the model: `vocab_size`, `hidden_size`, …, as far as the server tells them."""
    max_num_seqs: int = 256
    """How many requests the server's scheduler runs at once."""
    weight_version: str | None = None
    """The version that the server should hold; None if it does not tell versions."""
    moves_experts: bool = False
    """Whether it balances the load of experts while it runs (`enable_eplb`)."""
    kv_store_refusal: str = ""
    """Why it may use keys and values of old weights after a weight sync; empty if it does not. See `kv_stores`."""
    host: str = ""
    """Identifier of the server's machine; empty if unknown."""
    workers: int = 1
    """Worker processes of all data-parallel engines together."""
    backend: str | None = None
    """vLLM's own weight-transfer engine (`nccl`, `ipc`) that a stock server was started with."""
    definition: dict[str, Any] = field(default_factory=dict[str, Any])
    """The arguments of vLLM by which a stock server in development mode has its model; see `definition_audit`."""
    devices: frozenset[str] | None = None
    """UUIDs of the workers' GPUs, once the server was asked."""

    restarts: int = field(default=0, init=False)
    load_report: dict[str, str] = field(default_factory=dict[str, str], init=False)
    """How the server loaded its last weights: `way`, and `reason` if that was a reload. Empty if unknown."""
    audit: dict[str, Any] = field(default_factory=dict[str, Any], init=False)
    """What the audit of the present weights says, if they came by vLLM's own ways; else that is in `load_report`."""
    audited: tuple[str, dict[str, Any]] = field(default=("", {}), init=False)
    """The name of the tensors that the last such audit was of, and its result."""
    adapters: set[str] = field(default_factory=set[str], init=False)
    """The versions of LoRA adapters that it has loaded: see `ServerAdapters`."""
    verified: bool = field(default=False, init=False)
    """Whether its log-probabilities were compared with the trainer's model since it started."""
    slept: set[int] = field(default_factory=set[int], init=False)
    """The levels of its sleeps since it started."""
    lost: bool = field(default=False, init=False)
    """Whether it was unreachable, so that it may have restarted with other weights. It then gets no requests."""
    unknown: bool = field(default=False, init=False)
    """Whether another client may have written its weights. It is then `lost` until a sync, by whatever version."""
    unchecked: bool = field(default=True, init=False)
    """Whether another client may have put it to sleep. The next weight sync then asks it, and wakes it."""
    aborts: int = field(default=0, init=False)
    """How often this client has had the server abort all its requests."""
    stopped: bool = field(default=False, init=False)
    """Whether this client has paused it or put it to sleep."""
    updating: bool = field(default=False, init=False)
    """Whether this client replaces its weights now."""
    frozen: bool = field(default=False, init=False)
    """Whether this client changes nothing of it, so that only another one can start it again; the engine sets it."""
    speed: float | None = field(default=None, init=False)
    """Completion tokens per second, smoothed over the calls; None before the first."""
    lease: LeaseHolder | None = field(default=None, init=False)
    """Set if the server has leases and this process may change it."""
    vocabulary_size: int = field(default=1 << 31, init=False)
    """Of the trainer's model; the engine sets it."""
    sampler: Callable[[Batch, Sequence[Endpoint]], Generator[Completion]] | None = field(default=None, init=False)
    """Samples a batch with the given endpoints; the engine sets it."""

    @property
    def name(self) -> str:
        """The server's URL without credentials."""
        return self.http.name

    @property
    def kind(self) -> str:
        """The name, because a check of log-probabilities calls engines by their `kind`."""
        return self.http.name

    @property
    def stock(self) -> bool:
        """Whether weights go to a server that has nothing of vgen."""
        return self.controlled and not self.features

    @property
    def reports_load(self) -> bool:
        """Whether the workers have vgen's methods, which tell how weights were loaded."""
        return {"recorded", "memory"} <= self.features

    @property
    def omits_version(self) -> bool:
        """Whether the server holds synced weights but its completions do not tell the weight version."""
        return self.controlled and "batch" not in self.features and self.weight_version not in (None, STOCK_VERSION)

    def stream(self, batch: Batch) -> Generator[Completion]:
        """Sample the batch with this server only. A check of log-probabilities uses it."""
        if self.sampler is None:
            raise RuntimeError(f"no engine has been constructed with the endpoint {self.name}")
        return self.sampler(batch, [self])

    def record_speed(self, tokens: int, seconds: float) -> None:
        """Update `speed` after a call that returned `tokens` completion tokens in `seconds`."""
        if tokens and seconds > 0:
            rate, old = tokens / seconds, self.speed
            self.speed = rate if old is None else SPEED_SMOOTHING * old + (1 - SPEED_SMOOTHING) * rate

    def mark_stale(self, held: str | None) -> None:
        """Exclude a reachable server, which holds the weight version `held` instead of the expected one."""
        self.lost = True
        message = "vgen: %s is back with weights %r, not %r: it gets no requests until the next weight sync"
        logger.warning(message, self.name, held, self.weight_version)

    def mark_unknown(self) -> None:
        """Exclude a server that another client may have changed while this one did not have the lease."""
        self.lost = self.unknown = self.unchecked = True
        message = "vgen: another trainer may have held %s meanwhile: it gets no requests until the next weight sync"
        logger.warning(message, self.name)

    def rejoin(self) -> None:
        """Reset what was known of a server that has restarted."""
        self.unchecked = True
        self.adapters.clear()
        self.verified, self.devices, self.audited = False, None, ("", {})
        self.slept.clear()
        self.restarts += 1

    async def check_restarted(self) -> None:
        """Set `lost` if the server has restarted. Only needed if it `omits_version`."""
        with suppress(ServerError):  # if it is unreachable, the next request finds out
            self.lost = was_restarted(await held_version(self.http), self.weight_version)

    async def has_returned(self) -> bool:
        """Whether a lost server is reachable again and holds the expected weights. Then it is not `lost` any more."""
        if self.unknown:
            return False
        try:
            await self.http.get("/health", timeout=ANSWER_SECONDS)
            held = await held_version(self.http)
            half_updated = await self._is_half_updated()
            asleep = self.controlled and await self.is_asleep()
            stuck = await self.why_stuck()
        except ServerError:
            return False
        if asleep:
            self.unchecked = not self.stopped
            logger.warning("vgen: %s is asleep and gets no requests: %s", self.name, self._advice())
            return False
        if stuck:
            logger.warning("vgen: %s gets no requests: %s", self.name, stuck)
            return False
        if half_updated:
            logger.warning("vgen: a weight update of %s has failed: it gets no requests until one succeeds", self.name)
            return False
        if self.controlled and held != self.weight_version:
            self.mark_stale(held)
            return False
        self.lost = False
        self.adapters.clear()  # it may have restarted
        return True

    async def _is_half_updated(self) -> bool:
        """Whether some of its weights are old and some new, as far as it tells."""
        if not self.controlled or Feature.WEIGHTS_STATE not in self.features:
            return False
        info = await self.http.get(INFO, timeout=PROBE_SECONDS)
        return isinstance(info, dict) and info.get("weights") == "failed"

    async def why_stopped(self) -> str:
        """Why the server runs no requests, and what to do; empty if it runs, or does not tell."""
        if not self.controlled:
            return ""
        if await self.is_asleep(STATE_SECONDS):
            self.unchecked = not self.stopped
            return f"the server is asleep: {self._advice()}"
        if await _is(self.http, "paused", STATE_SECONDS):
            return f"the server is paused: {self._advice()}"
        return ""

    async def why_stuck(self) -> str:
        """Why it samples nothing before somebody acts; empty if it runs, or whoever has stopped it may start it again.

        A trainer pauses its servers for each weight sync.
        """
        if self.stopped or self.updating or not (reason := await self.why_stopped()):
            return ""
        leased = "lease" in self.features
        if self.frozen:
            return reason if leased and await self.holder() == "" else ""
        return reason if leased or await self.is_asleep(STATE_SECONDS) else ""

    async def holder(self) -> str | None:
        """Who has its lease: empty if nobody, None if it does not tell."""
        with suppress(ServerError, KeyError, TypeError):
            lease = (await self.http.get(INFO, timeout=PROBE_SECONDS))["lease"]
            return "" if lease is None else str(lease["holder"])
        return None

    def _advice(self) -> str:
        if self.stopped:
            return "call wake_up() or resume()"
        return FROZEN_WAY_BACK if self.frozen else TRAINERS_WAY_BACK

    async def is_asleep(self, timeout: float = PROBE_SECONDS) -> bool:
        """Whether memory of the server is asleep, as far as it tells.

        vLLM's `/is_sleeping` is also true for a server that is only paused. Its gauge tells them apart.
        """
        if not await _is(self.http, "sleeping", timeout):
            return False
        with suppress(ServerError):
            return _ASLEEP.search(await self.http.get_text("/metrics", timeout=timeout)) is not None
        return False

    async def wake(self) -> None:
        """Wake a server that another client has left asleep. Raises `ServerError`."""
        if self.unchecked and await self.is_asleep():
            logger.warning("vgen: another client has left %s asleep: this trainer wakes it", self.name)
            await self.http.post("/wake_up")
        self.unchecked = False


async def _is(http: HttpClient, state: str, timeout: float) -> bool:
    """What vLLM's route `/is_paused` or `/is_sleeping` answers; False if there is no answer."""
    with suppress(ServerError, KeyError, TypeError):
        return bool((await http.get(f"/is_{state}", timeout=timeout))[f"is_{state}"])
    return False


def was_restarted(held: str | None, expected: str | None) -> bool:
    """Whether a server holds its initial weights although it should hold the version `expected`."""
    return held == STOCK_VERSION and expected not in (None, STOCK_VERSION)


async def stock_config(http: HttpClient) -> Any:
    """vLLM's configuration of a server in development mode. Raises `ServerError`, `KeyError` or `TypeError`."""
    return (await http.get("/server_info?config_format=json", timeout=SERVER_INFO_SECONDS))["vllm_config"]


async def held_version(http: HttpClient) -> str | None:
    """The version of the weights that the server holds now; None if it does not tell."""
    try:
        return (await http.get("/weight_info", timeout=PROBE_SECONDS))["weight_version"]
    except ServerError as error:
        if error.status == 404:
            return None
        raise
    except (KeyError, TypeError):
        return None
