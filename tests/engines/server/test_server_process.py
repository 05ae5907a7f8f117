"""A server's end: by itself, at its deadline, by force. Other programs run in place of vLLM."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers.waiting import wait_until

from vgen import EngineError, ServerError
from vgen.engines.client.http import HttpClient
from vgen.engines.server import launcher
from vgen.engines.server.launcher import start_server
from vgen.testing import FaultyServer


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.fault(
    point="the server's launcher",
    did="The server dies while it starts",
    happens="`EngineError` with the end of its log",
    within=60,
)
def test_a_server_that_dies_at_its_start_says_why(instead, model):
    instead(
        """
        print("(EngineCore pid=1) ERROR 01-02 03:04:05 [core.py:1] ValueError: the one reason")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
        """
    )
    with pytest.raises(EngineError, match=r"ended with status 1 before it was ready, serving .*: ValueError: the one"):
        start_server(model)


@pytest.mark.fault(
    point="the server's launcher",
    did="The server never answers",
    happens="It is ended at the deadline, and the error says so",
    within=60,
)
def test_a_server_that_never_answers_is_ended_at_its_deadline(instead, model):
    instead("import time; print('still loading', flush=True); time.sleep(600)")
    start, began = time.monotonic(), time.time() - 1.0
    with pytest.raises(EngineError, match=r"not ready to serve .* within 1 s(.|\n)*still loading"):
        start_server(model, timeout=1.0)
    assert time.monotonic() - start < 10
    assert [child for child in psutil.Process().children() if child.create_time() > began] == []


@pytest.mark.fault(
    point="the server's launcher",
    did="The server ignores SIGTERM",
    happens="It is killed with its children",
    within=60,
)
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


ANSWERS = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.path, dict(self.headers), flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"INSTANCE")

HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
"""


def test_a_port_that_is_taken_is_an_error(instead, model):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EngineError, match=r"cannot listen on .*in use"),
    ):
        start_server(model, port=taken.getsockname()[1])


@pytest.mark.parametrize("answer", ['{"instance": "another"}', '{"vgen": "1"}', "{}", "[]", "<html>", "[" * 9000, ""])
@pytest.mark.fault(
    point="the port of a server",
    did="Another server of vgen gets the port during the start",
    happens="It gets no control key, and the launcher fails",
    within=60,
)
def test_another_server_that_has_got_the_port_gets_no_key_and_is_an_error_at_once(instead, model, answer, tmp_path):
    instead(ANSWERS.replace('b"INSTANCE"', repr(answer.encode())))
    log, start = tmp_path / "log", time.monotonic()
    with pytest.raises(EngineError, match=r"another process answers on port \d+, at http://127\.0\.0\.1") as caught:
        start_server(model, timeout=60.0, control_key="the-control-key", log_file=log)
    assert time.monotonic() - start < 20
    assert "choose another port" in str(caught.value)
    assert "/vgen/instance" in log.read_text()
    assert "the-control-key" not in log.read_text()


@pytest.mark.fault(
    point="the port of a server",
    did="A second `vgen serve` starts on the port",
    happens="It fails at once; the first goes on",
    within=60,
)
def test_the_second_of_two_launchers_at_one_port_fails_at_once(instead, model, monkeypatch):
    instead("import time; time.sleep(600)")  # it has bound the port, too, and cannot listen
    with FaultyServer(features=["control_key"]) as first:
        first.answers["/vgen/instance"] = {"instance": "the-first"}
        port = int(first.url.rpartition(":")[2])
        monkeypatch.setattr(launcher, "free_port", lambda *_: port)  # when it looked, nobody listened
        start = time.monotonic()
        with pytest.raises(EngineError, match=f"another process answers on port {port}, .*another server of vgen's"):
            start_server(model, port=port, timeout=15.0, control_key="the-control-key")
        assert time.monotonic() - start < 10
        assert "the-control-key" not in str(first.seen)


@pytest.mark.fault(
    point="the port of a server",
    did="Another program gets the port during the start",
    happens="The launcher fails at once",
    within=60,
)
def test_another_program_that_has_got_the_port_is_an_error_at_once(instead, model):
    instead(
        """
        import socket
        server = socket.create_server(("127.0.0.1", PORT))
        while True:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail ready\\r\\n")
        """
    )
    with pytest.raises(EngineError, match=r"another process answers on port \d+"):
        start_server(model, timeout=60.0)


def test_the_server_answers_with_what_its_launcher_has_drawn_and_no_key_is_sent(instead, model, tmp_path):
    instead(ANSWERS.replace('b"INSTANCE"', 'json.dumps({"instance": os.environ["VGEN_INSTANCE"]}).encode()'))
    log = tmp_path / "log"
    with start_server(model, timeout=60.0, control_key="the-control-key", log_file=log) as server:
        assert server.instance not in str(server)
    assert "/health" in log.read_text()
    assert "the-control-key" not in log.read_text()


# TLS

TLS = ANSWERS.replace('b"INSTANCE"', 'json.dumps({"instance": os.environ["VGEN_INSTANCE"]}).encode()').replace(
    "HTTPServer((",
    """
import ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("CERTIFICATE", "KEY")
class TLSServer(HTTPServer):
    def get_request(self):
        connection, address = super().get_request()
        return context.wrap_socket(connection, server_side=True), address
    def handle_error(self, *_):
        pass
TLSServer((""",
)


def made(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """A certificate for `a.example`, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}.example", "-keyout", str(key), "-out", str(certificate), *more]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def certificates(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return {name: made(tmp_path, name) for name in ("own", "other")}


def start_tls(instead, model, shown: tuple[Path, Path], trusted: Path):
    instead(TLS.replace("CERTIFICATE", str(shown[0])).replace("KEY", str(shown[1])))
    return start_server(model, timeout=60.0, arguments=["--ssl-certfile", str(trusted)])


def test_the_certificate_in_the_file_is_trusted_whatever_host_it_names(instead, model, certificates):
    with start_tls(instead, model, certificates["own"], certificates["own"][0]) as server:
        assert server.url.startswith("https://")


@pytest.mark.fault(
    point="the certificate of a server",
    did="A server with another certificate answers",
    happens="The launcher sends no key and fails",
    within=60,
)
def test_no_other_certificate_is_trusted(instead, model, certificates):
    with pytest.raises(EngineError, match=r"another process answers on port .*--ssl-certfile"):
        start_tls(instead, model, certificates["other"], certificates["own"][0])


@pytest.mark.fault(
    point="the certificate of a server",
    did="A server has another certificate of the same authority",
    happens="The launcher sends no key and fails",
    within=60,
)
def test_a_certificate_that_an_authority_has_signed_is_trusted_and_its_sibling_is_not(instead, model, certificates):
    authority, key = certificates["other"]
    signed = ["-CA", str(authority), "-CAkey", str(key), "-addext", "basicConstraints=critical,CA:FALSE"]
    try:
        leaf, sibling = (made(authority.parent, name, *signed) for name in ("leaf", "sibling"))
    except subprocess.CalledProcessError:
        pytest.skip("this openssl does not sign in one step")
    chain = leaf[0].read_text() + authority.read_text()
    leaf[0].write_text(chain)
    with start_tls(instead, model, leaf, leaf[0]):
        pass
    with pytest.raises(EngineError, match=r"--ssl-certfile"):
        start_tls(instead, model, sibling, leaf[0])


@pytest.mark.fault(
    point="the certificate of a server",
    did="A server without TLS answers where TLS is expected",
    happens="The launcher sends no key and fails",
    within=60,
)
def test_a_server_without_tls_is_another_one(instead, model, certificates):
    instead(ANSWERS)
    with pytest.raises(EngineError, match="does not speak TLS"):
        start_server(model, timeout=60.0, arguments=[f"--ssl_certfile={certificates['own'][0]}"])


@pytest.mark.fault(
    point="the certificate of a server",
    did="The certificate's file holds none",
    happens="An error names the file before the server starts",
    within=20,
)
def test_a_file_without_a_certificate_is_an_error_before_the_server_starts(instead, model, tmp_path):
    instead("raise SystemExit('it was started')")
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(EngineError, match=f"--ssl-certfile .*{name} holds no certificate"):
            start_server(model, arguments=["--ssl-certfile", str(tmp_path / name)])


# Mutual TLS

MUTUAL = """
import json, os, uvicorn

async def app(scope, receive, send):
    if scope["type"] == "http":
        body = json.dumps({"instance": os.environ["VGEN_INSTANCE"]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

files = dict(ssl_certfile="CERTIFICATE", ssl_keyfile="PRIVATE", ssl_ca_certs="AUTHORITY", ssl_cert_reqs=2)
uvicorn.run(app, host="127.0.0.1", port=PORT, lifespan="off", **files)
"""
"""What vLLM passes to uvicorn with `--ssl-ca-certs` and `--ssl-cert-reqs 2`."""


@pytest.fixture
def authority(tmp_path, certificates):
    """Makes certificates that an authority has signed."""
    file, key = certificates["other"]

    def sign(name: str, *more: str) -> tuple[Path, Path]:
        extensions = ["basicConstraints=critical,CA:FALSE", "subjectAltName=IP:127.0.0.1", *more]
        options = [option for extension in extensions for option in ("-addext", extension)]
        try:
            return made(tmp_path, name, "-CA", str(file), "-CAkey", str(key), *options)
        except subprocess.CalledProcessError:
            pytest.skip("this openssl does not sign in one step")

    return file, sign


def start_mutual(instead, model, shown: tuple[Path, Path], authority: Path):
    names = {"CERTIFICATE": shown[0], "PRIVATE": shown[1], "AUTHORITY": authority}
    code = MUTUAL
    for name, path in names.items():
        code = code.replace(name, str(path))
    instead(code)
    arguments = ["--ssl-certfile", str(shown[0]), "--ssl-keyfile", str(shown[1]), "--ssl-ca-certs", str(authority)]
    return start_server(model, timeout=30.0, arguments=[*arguments, "--ssl-cert-reqs", "2"])


async def answer(url: str, context: ssl.SSLContext) -> dict[str, str]:
    client = HttpClient(url, ssl=context)
    try:
        return await client.get("/vgen/instance", timeout=20)
    finally:
        await client.close()


async def test_with_mutual_tls_only_clients_with_a_certificate_get_an_answer(instead, model, authority, certificates):
    file, sign = authority
    with start_mutual(instead, model, sign("server"), file) as server:
        context = ssl.create_default_context(cafile=file)
        context.load_cert_chain(*sign("client"))
        assert await answer(server.url, context) == {"instance": server.instance}
        for stranger in (None, certificates["own"]):
            context = ssl.create_default_context(cafile=file)
            if stranger is not None:
                context.load_cert_chain(*stranger)
            with pytest.raises(ServerError):
                await answer(server.url, context)


@pytest.mark.parametrize("usage", ["", "extendedKeyUsage=serverAuth"])
def test_with_mutual_tls_a_certificate_that_the_server_does_not_trust_is_an_error_at_once(
    instead, model, authority, certificates, usage
):
    file, sign = authority
    shown, trusted = (sign("server", usage), file) if usage else (sign("server"), certificates["own"][0])
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"--ssl-ca-certs must hold the authority that has signed --ssl-certfile"):
        start_mutual(instead, model, shown, trusted)
    assert time.monotonic() - start < 20


def test_a_key_that_is_not_the_certificates_is_an_error_before_the_server_starts(instead, model, certificates):
    instead("raise SystemExit('it was started')")
    certificate, key = certificates["own"][0], certificates["other"][1]
    arguments = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-cert-reqs=2"]
    with pytest.raises(EngineError, match=r"--ssl-keyfile .*other.key holds no key of .*own.pem"):
        start_server(model, arguments=arguments)
