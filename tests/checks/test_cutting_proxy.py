"""A proxy that forwards, and cuts when it is told to."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from vgen.checks.cutting_proxy import CuttingProxy
from vgen.errors import CheckError


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    server.bodies = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(server):
    with CuttingProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
        yield proxy


def post(proxy, body, connection=None):
    connection = connection or http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    connection.request("POST", "/x", body)
    return connection.getresponse().read()


def test_it_forwards_large_bodies_and_kept_connections(proxy):
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    for body in (b"a", b"b" * 300_000, b"c"):
        assert post(proxy, body, connection) == body


def test_it_cuts_at_the_call_that_it_was_armed_for_and_forwards_again(proxy, server):
    proxy.arm(2)
    assert post(proxy, b"first") == b"first"
    assert not proxy.cut.is_set()
    with pytest.raises((http.client.HTTPException, OSError)):
        post(proxy, b"second")
    assert proxy.cut.wait(5)
    proxy.disarm()
    assert post(proxy, b"third") == b"third"
    assert server.bodies[0] == b"first"
    assert server.bodies[-1] == b"third"


def test_it_refuses_what_is_no_plain_address():
    with pytest.raises(CheckError, match="not an address like http"):
        CuttingProxy("https://host:1")


def test_a_server_that_is_not_there_closes_the_connection(server):
    server.shutdown()
    server.server_close()
    with (
        CuttingProxy(f"http://127.0.0.1:{server.server_port}") as proxy,
        pytest.raises((http.client.HTTPException, OSError)),
    ):
        post(proxy, b"x")


def test_credentials_and_paths_stay_in_the_address():
    with CuttingProxy("http://user:key@127.0.0.1:9/base") as proxy:
        assert proxy.url.startswith("http://user:key@127.0.0.1:")
        assert proxy.url.endswith("/base")
