"""Routers in front of servers: a round-robin proxy, and vLLM's own router."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
from aiohttp import web

from helpers.waiting import wait_until

SESSION = web.AppKey("session", aiohttp.ClientSession)


@contextlib.contextmanager
def round_robin(urls: Sequence[str]) -> Iterator[str]:
    """A reverse proxy that hands each request, whatever it is, to the next of `urls`. Yields its address."""
    turn, loop = itertools.cycle(urls), asyncio.new_event_loop()

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        session = request.app[SESSION]
        url, body = next(turn) + request.path_qs, await request.read()
        async with session.request(request.method, url, headers=headers, data=body) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app[SESSION] = aiohttp.ClientSession()
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner

    async def stop(runner: web.AppRunner) -> None:
        await runner.app[SESSION].close()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    asyncio.run_coroutine_threadsafe(stop(runner), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)


def is_healthy(port: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
        return True
    return False


@contextlib.contextmanager
def vllm_router(urls: Sequence[str], policy: str) -> Iterator[str]:
    """vLLM's own router, of the package `vllm-router`."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(str(free.getsockname()[1]))
    command = [str(Path(sys.executable).with_name("vllm-router")), "--worker-urls", *urls, "--policy", policy]
    command += ["--host", "127.0.0.1", "--port", ports[0], "--prometheus-port", ports[1]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or is_healthy(ports[0]), 60, every=0.1)
        assert process.poll() is None
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(20)
