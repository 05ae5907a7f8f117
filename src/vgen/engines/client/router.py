"""Tells whether a URL is one server, or a router in front of several."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ...errors import ServerError
from ..server_api import INSTANCE
from .endpoint import PROBE_SECONDS, stock_config
from .http import HttpClient

PROBES = 8
"""How often a URL is asked which server answers. Two servers behind a random choice stay unnoticed 1 in 128 times."""


async def is_router(http: HttpClient, *, stock: bool) -> bool:
    """Whether several servers answer at this URL, or vLLM's own router does, whatever its routing policy.

    vLLM's router lists its servers at `/workers`. Any other router is noticed because the answers come from different
    server instances. A `stock` server tells its instance only in development mode.
    """
    with suppress(ServerError, KeyError, TypeError):
        if isinstance((await http.get("/workers", timeout=PROBE_SECONDS))["workers"], list):
            return True
    first = await _instance(http, stock)
    for _ in range(PROBES - 1 if first else 0):
        if await _instance(http, stock) != first:
            return True
    return False


async def _instance(http: HttpClient, stock: bool) -> Any:
    """An identifier of the server process that answers; None if it does not tell."""
    with suppress(ServerError, KeyError, TypeError):
        if not stock:
            return (await http.get(INSTANCE, timeout=PROBE_SECONDS))["instance"]
        return (await stock_config(http))["instance_id"]
    return None
