"""Keys that are replaced while a run goes: their files are read again when a server refuses a key."""

from __future__ import annotations

import http.server
import threading

import pytest
from helpers.server_generation import COMPLETIONS, Model, calls

from vgen import ArgumentError, ServerError, ServerGeneration
from vgen.engines.client.http import HttpClient


class Guarded:
    """A server that answers `{}` to calls with the right keys, and 401 to others."""

    def __init__(self):
        self.api_key, self.control_key = "old", "old"
        self.statuses: list[tuple[str, int, bytes]] = []
        guard = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                right = self.headers.get("Authorization") == f"Bearer {guard.api_key}"
                if not self.path.startswith("/v1"):
                    right = self.headers.get("X-Vgen-Control-Key") == guard.control_key
                status = 200 if right else 401
                guard.statuses.append((self.path, status, body))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def guarded():
    made = Guarded()
    yield made
    made.close()


@pytest.fixture
def files(tmp_path):
    """The files of the API key and of the control key."""
    for name in ("api", "control"):
        (tmp_path / name).write_text("old\n")
    return tmp_path / "api", tmp_path / "control"


@pytest.fixture
def client(guarded, files, loop):
    made = HttpClient(guarded.url, api_key=files[0], control_key=files[1])
    yield made
    loop.run(made.close())


def statuses(guarded, path):
    return [status for seen, status, _ in guarded.statuses if seen == path]


def test_a_refused_key_is_read_again_and_the_call_is_repeated_once(guarded, files, client, loop):
    loop.run(client.infer(COMPLETIONS, b"{}", {}, len, 20.0))
    guarded.api_key = guarded.control_key = "new"
    for file in files:
        file.write_text("new\n")
    loop.run(client.infer(COMPLETIONS, b"the body", {}, len, 20.0))
    loop.run(client.post("/pause", {"mode": "keep"}))
    assert statuses(guarded, COMPLETIONS) == [200, 401, 200]
    assert statuses(guarded, "/pause") == [200]  # both files were read
    assert guarded.statuses[-2][2] == b"the body"
    guarded.control_key = "newer"
    files[1].write_text("newer")
    loop.run(client.post("/pause", {"mode": "keep"}))
    assert statuses(guarded, "/pause") == [200, 401, 200]


@pytest.mark.parametrize("content", ["old", "wrong", "", None])
@pytest.mark.fault(
    point="who may change a server",
    did="The key in the file is wrong, empty or missing",
    happens="The file is read again once; then `ServerError`",
    within=20,
)
def test_a_key_that_stays_wrong_is_an_error_and_is_not_tried_for_ever(guarded, files, client, loop, content):
    guarded.api_key = "new"
    files[0].write_text(content) if content is not None else files[0].unlink()
    with pytest.raises(ServerError) as caught:
        loop.run(client.infer(COMPLETIONS, b"{}", {}, len, 20.0))
    assert caught.value.status == 401
    assert statuses(guarded, COMPLETIONS) == [401] * (2 if content == "wrong" else 1)
    files[0].write_text("new")  # the next call finds it
    loop.run(client.infer(COMPLETIONS, b"{}", {}, len, 20.0))


def test_calls_that_were_refused_together_are_all_repeated(guarded, files, client, loop):
    """The second one finds a file that the first one has read already."""
    guarded.api_key = "new"
    files[0].write_text("new")
    loop.run_all([client.infer(COMPLETIONS, b"{}", {}, len, 20.0) for _ in range(20)])
    assert statuses(guarded, COMPLETIONS).count(200) == 20


def test_a_key_given_as_text_is_sent_as_it_is(guarded, loop):
    guarded.api_key = "new"
    client = HttpClient(guarded.url, api_key="old")
    with pytest.raises(ServerError):
        loop.run(client.infer(COMPLETIONS, b"{}", {}, len, 20.0))
    assert statuses(guarded, COMPLETIONS) == [401]
    loop.run(client.close())


def test_a_generation_goes_on_with_a_new_key(server, files):
    with ServerGeneration(Model(), base_urls=[server.url], api_key=files[0], control_key=files[1]) as made:
        made.generate([[1]])
        server.faults[COMPLETIONS] = [401]
        files[0].write_text("new")
        assert made.generate([[1]])[0].token_ids == [1]
    sent = [headers["Authorization"] for path, headers, _ in server.seen if path == COMPLETIONS]
    assert sent[-2:] == ["Bearer old", "Bearer new"]
    assert len(calls(server, COMPLETIONS)) == len(sent)


@pytest.mark.parametrize("argument", ["api_key", "control_key"])
@pytest.mark.parametrize("content", [None, " \n"])
def test_a_file_without_a_key_is_refused_by_its_argument(tmp_path, argument, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ArgumentError, match=f"^{argument} names a file that holds no key"):
        HttpClient("http://127.0.0.1:1", **{argument: file})


def test_a_key_of_another_type_is_refused():
    with pytest.raises(ArgumentError, match=r"^api_key must be a key as text"):
        HttpClient("http://127.0.0.1:1", **{"api_key": 7})
