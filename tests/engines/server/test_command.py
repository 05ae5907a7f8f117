"""`vgen serve` around other programs that run in place of vLLM."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
from helpers.waiting import wait_until

from vgen.engines.server import command

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"instance": os.environ["VGEN_INSTANCE"]}).encode())

HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
"""


def signal_once(capfd, printed: list[str], number: int) -> threading.Thread:
    """A thread that sends this process a signal once something was printed on standard output."""

    def send() -> None:
        def has_printed() -> bool:
            printed.append(capfd.readouterr().out)
            return bool("".join(printed))

        wait_until(has_printed)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_prints_where_the_server_is_and_ends_with_a_signal(instead, model, capfd, number, status):
    instead(SERVER)
    before, printed = signal.getsignal(number), list[str]()
    thread = signal_once(capfd, printed, number)
    assert command.run(model, as_json=True, quiet=True, host="127.0.0.1") == status
    thread.join()
    described = json.loads("".join(printed))
    assert described["model"] == model
    assert described["url"].startswith("http://127.0.0.1:")
    assert not os.path.exists(described["control_key_file"])  # it went with the server
    assert signal.getsignal(number) == before


def test_a_server_that_ends_by_itself_is_status_1_and_its_log_is_repeated(instead, model, capfd):
    instead("print('ValueError: the one reason', flush=True); raise SystemExit(3)")
    assert command.run(model) == 1
    error = capfd.readouterr().err
    assert "vgen serve: vLLM ended with status 3 before it was ready" in error
    assert error.count("ValueError: the one reason") == 3  # in the log, as the cause, and at the log's end


def test_a_key_comes_from_a_file_or_else_from_the_command_line(tmp_path):
    (tmp_path / "key").write_text("from-the-file\n")
    assert command.key("given", tmp_path / "key") == "from-the-file"
    assert command.key("given", None) == "given"
    assert command.key(None, None) is None
