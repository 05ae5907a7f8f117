"""One server over HTTP: typed errors, and keys that nothing repeats."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys

import pytest
from helpers.server_generation import COMPLETIONS, Model, generation

from vgen import (
    ServerConnection,
    ServerError,
    ServerGeneration,
)
from vgen.engines.client.event_loop_thread import EventLoopThread
from vgen.engines.client.http import (
    LEAST_CONNECTIONS,
    SPARE_DESCRIPTORS,
    HttpClient,
    connection_limit,
)
from vgen.testing import FaultyServer


@pytest.mark.parametrize("status", [302, 401, 403, 404])
@pytest.mark.fault(
    point="a request on its way to a server",
    did="The server answers 302, 401, 403 or 404",
    happens="`ServerError` with the server's own words; nothing is sent again",
    within=20,
)
def test_what_cannot_pass_is_a_typed_error_with_the_servers_own_words(server, status):
    with generation(server) as made:
        server.faults[COMPLETIONS] = [status]
        with pytest.raises(ServerError, match="the server says no") as caught:
            made.generate([[1]])
        assert caught.value.status == status
        assert len([1 for path, _, _ in server.seen if path == COMPLETIONS]) == 1
        assert len(made.generate([[1]])) == 1


def test_keys_travel_in_headers_and_are_never_repeated(server):
    url = server.url.replace("http://", "http://user:password@")
    keys = dict(api_key="the-api-key", control_key="the-control-key", connection=ServerConnection(timeout=3.0))
    with ServerGeneration(Model(), base_urls=[url], **keys) as made:
        made.sleep()
        made.wake_up()
        server.faults[COMPLETIONS] = ["reset"] * 9
        with pytest.raises(ServerError) as caught:
            made.generate([[1]])
    shown = str(caught.value) + repr(caught.value.__cause__)
    assert not [secret for secret in ("password", "the-api-key", "the-control-key") if secret in shown]
    for path, headers, _ in server.seen:
        if path == COMPLETIONS:
            assert headers["Authorization"] == "Bearer the-api-key"
            assert "X-Vgen-Control-Key" not in headers
        if path.startswith("/sleep"):
            assert headers["X-Vgen-Control-Key"] == "the-control-key"


@pytest.mark.parametrize(
    ("body", "reason", "message"),
    [
        (b'{"error": {"message": "no key", "type": "vgen_control_key"}}', "vgen_control_key", "no key"),
        (b'{"message": "old form"}', None, "old form"),
        (b'{"detail": [{"loc": ["n"], "msg": "bad", "input": "a prompt"}]}', None, '[{"loc": ["n"], "msg": "bad"}]'),
        (b"<html>gateway</html>", None, "<html>gateway</html>"),
        (b"", None, "no message"),
    ],
)
def test_an_error_has_the_servers_reason_and_message_and_never_the_input(loop, body, reason, message):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async def ask():
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        try:
            await client.get("/anything", timeout=10.0)
        finally:
            await client.close()
            listener.close()

    with pytest.raises(ServerError) as caught:
        loop.run(ask(), 20.0)
    assert (caught.value.status, caught.value.reason, caught.value.server_message) == (400, reason, message)


def test_a_post_that_is_not_json_is_an_error_unless_nothing_is_read_from_it(server, loop):
    client = HttpClient(server.url)
    server.faults["/pause"] = ["not json", "not json"]
    with pytest.raises(ServerError, match="not JSON"):
        loop.run(client.post("/pause"))
    assert loop.run(client.post("/pause", json_answer=False)) is None
    loop.run(client.close())


@pytest.mark.fault(
    point="a request on its way to a server",
    did="600 prompts are sent with 256 file descriptors",
    happens="Requests wait for a free connection; each completion comes once",
    within=60,
)
def test_more_prompts_than_descriptors_wait_their_turn(server):
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from vgen import Sampling, ServerGeneration\n"
        f"with ServerGeneration(None, base_urls=[{server.url!r}]) as made:\n"
        "    rollouts = made.generate([[i] for i in range(600)], Sampling(max_tokens=1, logprobs=None))\n"
        "assert [completion.token_ids for completion in rollouts] == [[i] for i in range(600)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("servers", [1, 8, 1000])
def test_connections_leave_descriptors_to_the_rest_of_the_process(servers, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    limit = connection_limit(servers)
    assert limit == LEAST_CONNECTIONS if servers == 1000 else limit * servers < 1000 - SPARE_DESCRIPTORS
    assert limit >= LEAST_CONNECTIONS


def test_without_a_limit_on_descriptors_there_is_none_on_connections(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert connection_limit(8) >= 1 << 20


def test_a_call_in_a_client_that_was_closed_is_an_error_that_says_so():
    with FaultyServer() as server:
        client, loop = HttpClient(server.url), EventLoopThread()
        loop.run(client.get("/health"))
        loop.run(client.close())
        with pytest.raises(ServerError, match="GET /health failed: the engine was closed"):
            loop.run(client.get("/health"))
        loop.close()
