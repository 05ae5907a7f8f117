"""`stock_server` where no server comes up; that it serves is tested in `tests/real/test_stock_server.py`."""

from __future__ import annotations

import psutil
import pytest

from vgen.testing import stock_server


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Put a script in the place of vLLM's API server."""

    def put(script: str) -> None:
        package = tmp_path / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for folder in (package, package.parent, package.parent.parent):
            (folder / "__init__.py").touch()
        (package / "api_server.py").write_text(script)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


SERVES = """
import http.server, os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
arguments = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        names = ("VLLM_SERVER_DEV_MODE", "VLLM_PLUGINS", "EXTRA")
        self.wfile.write(repr([worker.pid, arguments, [os.environ[name] for name in names]]).encode())
http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


def test_it_gives_the_url_of_a_healthy_server_and_ends_it_with_its_workers(instead):
    import ast
    import urllib.request

    from helpers.waiting import wait_until

    instead(SERVES)
    with stock_server("a-model", arguments=["--more", "1"], environment={"EXTRA": "x"}, timeout=60) as url:
        with urllib.request.urlopen(url, timeout=5) as answer:
            worker, arguments, environment = ast.literal_eval(answer.read().decode())
        assert arguments[:2] == ["--model", "a-model"]
        assert arguments[-2:] == ["--more", "1"]
        assert environment == ["1", "", "x"]
        process = psutil.Process(worker)
        assert process.is_running()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_a_server_that_ends_is_an_error_with_the_end_of_its_log(instead):
    instead("print('no such model')")
    with pytest.raises(RuntimeError, match="no such model"), stock_server("a-model", timeout=60):
        raise AssertionError("it has come up")


@pytest.mark.slow
def test_a_server_that_never_answers_is_ended_after_the_timeout(instead, tmp_path):
    pid = tmp_path / "pid"
    instead(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(RuntimeError, match="did not become healthy"), stock_server("a-model", timeout=3):
        raise AssertionError("it has come up")
    assert not psutil.pid_exists(int(pid.read_text()))
