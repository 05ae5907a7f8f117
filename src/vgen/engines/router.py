"""Whether an address is one server, or a router in front of several."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ..errors import ServerError
from .http import Server

ASKED = 8
"""How often an address is asked who answers. One pair in 128 stays unseen where two take turns at random."""
PROBE_SECONDS = 10.0
STOCK_SECONDS = 60.0
"""vLLM lists all installed packages before it describes itself for the first time."""


async def is_router(server: Server, *, stock: bool) -> bool:
    """Whether several servers answer here, or vLLM's own router does, which can be told however it chooses.

    A `stock` server is asked for what development mode alone says.
    """
    with suppress(ServerError, KeyError, TypeError):
        if isinstance((await server.get("/workers", timeout=PROBE_SECONDS))["workers"], list):
            return True
    first = await _instance(server, stock)
    for _ in range(ASKED - 1 if first else 0):
        if await _instance(server, stock) != first:
            return True
    return False


async def _instance(server: Server, stock: bool) -> Any:
    """What tells the server that answers from others; None where it does not say."""
    with suppress(ServerError, KeyError, TypeError):
        if not stock:
            return (await server.get("/vgen/instance", timeout=PROBE_SECONDS))["instance"]
        info = await server.get("/server_info?config_format=json", timeout=STOCK_SECONDS)
        return info["vllm_config"]["instance_id"]
    return None
