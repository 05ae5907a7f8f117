"""A server's end: by itself, at its deadline, by force. Other programs run in place of vLLM."""

from __future__ import annotations

import signal
import socket
import time

import psutil
import pytest
from helpers.waiting import wait_until

from vgen import EngineError
from vgen.engines.server.launcher import start_server


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_dies_at_its_start_says_why(instead, model):
    instead(
        """
        print("(EngineCore pid=1) ERROR 01-02 03:04:05 [core.py:1] ValueError: the one reason")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
        """
    )
    with pytest.raises(EngineError, match=r"ended with status 1 before it was ready, serving .*: ValueError: the one"):
        start_server(model)


def test_a_server_that_never_answers_is_ended_at_its_deadline(instead, model):
    instead("import time; print('still loading', flush=True); time.sleep(600)")
    start, began = time.monotonic(), time.time() - 1.0
    with pytest.raises(EngineError, match=r"not ready to serve .* within 1 s(.|\n)*still loading"):
        start_server(model, timeout=1.0)
    assert time.monotonic() - start < 10
    assert [child for child in psutil.Process().children() if child.create_time() > began] == []


def test_a_server_that_does_not_want_to_end_is_killed_with_its_children(instead, model):
    instead(
        """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
        """
    )
    server = start_server(model, wait=False)
    process = psutil.Process(server.process.pid)
    children = wait_until(process.children)
    folder = server.control_key_file.parent
    server.stop(timeout=0.5)
    server.stop()  # a second time it does nothing
    assert server.process.returncode == -signal.SIGKILL
    wait_until(lambda: not any(alive(child) for child in children))
    assert not folder.exists()


def test_another_server_is_not_taken_for_it(instead, model):
    instead(
        """
        import sys
        from http.server import BaseHTTPRequestHandler, HTTPServer

        class Healthy(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

        HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
        """
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EngineError, match=r"cannot listen on .*in use"),
    ):
        start_server(model, port=taken.getsockname()[1])
    with pytest.raises(EngineError, match=r"not ready to serve .* within 2 s(.|\n)*GET /vgen/info"):
        start_server(model, timeout=2.0)
