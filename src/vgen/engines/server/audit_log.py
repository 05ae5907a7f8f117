"""The audit log of a server: who took its lease, synced, paused, resumed, put it to sleep or woke it.

One line of the logger `vgen.audit` for each such call: what, the HTTP status, then `name=value` pairs in which values
from callers are JSON strings. No key, token, prompt or weight is in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

import msgspec

from .. import server_api

logger = logging.getLogger("vgen.audit")

EVENTS: Mapping[str, str] = {
    "/pause": "pause",
    server_api.PAUSE: "pause",
    "/resume": "resume",
    "/sleep": "sleep",
    "/wake_up": "wake_up",
    server_api.FINISH_UPDATE: "sync",
    server_api.WEIGHTS: "sync",
    server_api.SET_VERSION: "set_weight_version",
    "/v1/load_lora_adapter": "load_adapter",
    "/v1/unload_lora_adapter": "unload_adapter",
}
"""What is written of a call, by its path."""
_SYNC_STEPS = (server_api.START_UPDATE, server_api.UPDATE_WEIGHTS)
"""A sync makes many such calls: one is written only if it failed, and so ended the sync."""
_PARAMETERS = ("mode", "level", "tags")


class _Body(msgspec.Struct):
    """What is written of a body."""

    weight_version: str | None = None
    new_version: str | None = None
    lora_name: str | None = None


def show() -> None:
    """Write the audit log to standard error, unless the server's logging configuration sends it elsewhere."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logger.addHandler(handler)


def changed(scope: MutableMapping[str, Any], path: str, holder: str | None, raw: bytes, status: int) -> None:
    """Write a call that changes the server, under the lease of `holder`, and that was answered with `status`."""
    event = EVENTS.get(path) or ("sync" if path in _SYNC_STEPS and status >= 400 else None)
    if event is None:
        return
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    details: dict[str, Any] = {name: ",".join(query[name]) for name in _PARAMETERS if name in query}
    with suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        body = msgspec.json.decode(raw or b"{}", type=_Body)
        details |= {"version": body.weight_version or body.new_version, "adapter": body.lora_name}
    write(scope, event, status=status, holder=holder, **details)


def write(scope: MutableMapping[str, Any], event: str, **details: Any) -> None:
    """Write one line. Details that are None are left out."""
    host, port = scope.get("client") or ("unknown", 0)
    pairs = {**details, "client": f"{host}:{port}"}
    line = " ".join(f"{name}={json.dumps(value)}" for name, value in pairs.items() if value is not None)
    logger.info("%s %s", event, line)
