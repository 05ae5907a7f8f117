"""Addresses and ports of this machine."""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from .errors import EngineError


def free_port(host: str, port: int = 0) -> int:
    """Return `port`, or a free port at `host` if `port` is 0. Raises `EngineError` if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        return probe.getsockname()[1]


def own_address(url: str) -> str:
    """The address of this machine that the server at `url` can connect to."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket chooses a route and sends nothing
        probe.connect(address)
        return probe.getsockname()[0]


def address_for_all(urls: Iterable[str]) -> str:
    """The address of this machine that all these servers can connect to: its loopback interface if all are here."""
    addresses = [own_address(url) for url in urls]
    return next((each for each in addresses if not ip_address(each.partition("%")[0]).is_loopback), addresses[0])


@functools.cache
def this_host() -> str:
    """An identifier of this machine that changes when it reboots. Containers on one machine share it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
