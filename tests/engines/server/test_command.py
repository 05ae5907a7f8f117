"""`vgen serve` around other programs that run in place of vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
@pytest.mark.fault(
    point="`vgen serve` and who reads its output",
    did="SIGTERM or Ctrl-C while the server runs",
    happens="It ends with status 0 or 130, and its key file is gone",
    within=60,
)
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


@pytest.mark.fault(
    point="`vgen serve` and who reads its output",
    did="vLLM ends by itself",
    happens="Status 1; the end of its log is repeated",
    within=60,
)
def test_a_server_that_ends_by_itself_is_status_1_and_its_log_is_repeated(instead, model, capfd):
    instead("print('ValueError: the one reason', flush=True); raise SystemExit(3)")
    assert command.run(model) == 1
    error = capfd.readouterr().err
    assert "vgen serve: vLLM ended with status 3 before it was ready" in error
    assert error.count("ValueError: the one reason") == 3  # in the log, as the cause, and at the log's end


CHATTY = """
import sys
from vgen.engines.server import command, launcher
code = sys.argv[2]
launcher.server_command = lambda *_, port, **__: [sys.executable, "-c", code.replace("PORT", str(port))]
raise SystemExit(command.run(sys.argv[1], host="127.0.0.1", quiet="--quiet" in sys.argv))
"""
"""A `vgen serve` whose vLLM is the program in its second argument."""


def chatty(model: str, code: str, *arguments: str, stderr: int) -> subprocess.Popen[bytes]:
    called = [sys.executable, "-c", CHATTY, model, "print('x' * (1 << 20), flush=True)\n" + code, *arguments]
    return subprocess.Popen(called, stdout=subprocess.PIPE, stderr=stderr)


@pytest.mark.parametrize("arguments", [[], ["--quiet"]])
@pytest.mark.fault(
    point="`vgen serve` and who reads its output",
    did="Nobody reads its standard error",
    happens="It ends all the same",
    within=60,
)
def test_standard_error_that_nobody_reads_does_not_block_its_end(instead, model, arguments):
    unread, stderr = os.pipe()
    os.set_blocking(stderr, False)
    while True:  # full already, so that the first line of the command's own does not fit either
        try:
            os.write(stderr, bytes(1 << 16))
        except BlockingIOError:
            break
    os.set_blocking(stderr, True)
    with chatty(model, SERVER, *arguments, stderr=stderr) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"http://")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            os.close(unread)
            os.close(stderr)


@pytest.mark.fault(
    point="`vgen serve` and who reads its output",
    did="Its standard error is closed",
    happens="It goes on",
    within=60,
)
def test_standard_error_that_is_closed_does_not_end_it(instead, model):
    unread, stderr = os.pipe()
    os.close(unread)
    with chatty(model, SERVER, stderr=stderr) as process:
        os.close(stderr)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"http://")
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_a_long_log_arrives_whole_with_a_slow_reader(instead, model):
    with chatty(model, "raise SystemExit(3)", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        text = b""
        while chunk := os.read(process.stderr.fileno(), 1 << 12):
            text += chunk
    assert text.count(b"x") >= 1 << 20
    assert b"vgen serve: vLLM ended with status 3" in text


def test_a_key_comes_from_a_file_or_else_from_the_command_line(tmp_path):
    (tmp_path / "key").write_text("from-the-file\n")
    assert command.key("given", tmp_path / "key") == "from-the-file"
    assert command.key("given", None) == "given"
    assert command.key(None, None) is None
