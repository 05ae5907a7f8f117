from __future__ import annotations

from importlib.util import find_spec

import pytest

from vgen.testing import FaultyServer

if not (find_spec("torch") and find_spec("aiohttp")):  # pip install 'vgen[server]'
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def server():
    """A stock server in development mode."""
    with FaultyServer() as made:
        yield made


@pytest.fixture
def ours():
    """A server that `vgen serve` started."""
    with FaultyServer(features=["batch", "lease"]) as made:
        yield made


@pytest.fixture
def loop():
    from vgen.engines.client.event_loop_thread import EventLoopThread

    made = EventLoopThread()
    yield made
    made.close()
