"""`FaultyServer`, by HTTP alone: what it answers, records and does wrong."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from vgen.testing import FaultyServer

COMPLETIONS = "/v1/completions"
BODY = {"prompt": [[1, 2, 3], [4]], "max_tokens": 2}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


def post(server: FaultyServer, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers or {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def test_completions_are_the_prompts_own_tokens_cut_at_max_tokens(server):
    choices = post(server, COMPLETIONS, BODY)["choices"]
    assert [choice["token_ids"] for choice in choices] == [[1, 2], [4]]
    assert choices[0]["logprobs"] == {
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"token_id:1": -0.5}, {"token_id:2": -0.5}],
    }
    single = post(server, COMPLETIONS, {"prompt": [5, 6], "max_tokens": 9})
    assert single["choices"][0]["token_ids"] == [5, 6]
    assert single["metrics"]["time_to_first_token_ms"] == 2.0


def test_it_records_path_headers_and_body_of_each_request(server):
    post(server, "/pause?mode=keep", {"a": 1}, {"X-Test": "yes"})
    post(server, "/resume", {})
    (path, headers, body), (second, _, _) = server.seen
    assert (path, headers["X-Test"], body) == ("/pause?mode=keep", "yes", {"a": 1})
    assert second == "/resume"


def test_an_answer_can_be_changed_and_an_unknown_path_is_answered_with_an_empty_object(server):
    server.answers["/weight_info"] = {"weight_version": "7"}
    assert post(server, "/weight_info?x=1", {}) == {"weight_version": "7"}
    assert post(server, "/anything", {}) == {}


def test_each_request_takes_the_next_fault_of_its_path(server):
    server.faults[COMPLETIONS] = [503, None, lambda body: {"prompts": len(body["prompt"])}, 400]
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, COMPLETIONS, BODY)
    assert refused.value.code == 503
    assert json.loads(refused.value.read())["error"]["message"]
    assert len(post(server, COMPLETIONS, BODY)["choices"]) == 2
    assert post(server, "/pause", {}) == {}  # another path has its own faults
    assert post(server, COMPLETIONS, BODY) == {"prompts": 2}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(server, COMPLETIONS, BODY)
    assert len(post(server, COMPLETIONS, BODY)["choices"]) == 2


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("reset", ConnectionResetError),
        ("truncated", http.client.IncompleteRead),
        ("not json", json.JSONDecodeError),
    ],
)
def test_a_fault_breaks_the_answer_in_its_way(server, fault, error):
    server.faults[COMPLETIONS] = [fault]
    with pytest.raises(error):
        post(server, COMPLETIONS, BODY)
    assert len(post(server, COMPLETIONS, BODY)["choices"]) == 2


def test_an_answer_that_is_not_vllms_is_json(server):
    server.faults["/v1/models"] = ["not vllm"]
    assert "data" not in post(server, "/v1/models", {})
    assert post(server, "/v1/models", {})["data"][0]["max_model_len"] == 64


def test_silence_lasts_until_the_server_closes():
    with FaultyServer() as server:
        server.faults[COMPLETIONS] = ["silent"]
        raised: list[BaseException] = []

        def ask() -> None:
            try:
                post(server, COMPLETIONS, BODY)
            except OSError as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(raised[0], ConnectionResetError)
    with pytest.raises(urllib.error.URLError, match="refused"):
        post(server, COMPLETIONS, BODY)


def test_a_bias_beyond_the_vocabulary_is_refused_in_vllms_words_and_not_recorded():
    with FaultyServer(vocabulary_size=272) as server:
        server.faults[COMPLETIONS] = ["reset"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(server, COMPLETIONS, BODY | {"logit_bias": {"999": 0}})
        assert "Vocabulary size: 272" in refused.value.read().decode()
        assert server.seen == []
        assert server.faults[COMPLETIONS] == ["reset"]


def test_with_features_it_says_what_a_server_of_vgens_says():
    with FaultyServer(features=["batch", "lease"], model="m", max_model_len=9) as server:
        assert post(server, "/vgen/info", {})["features"] == ["batch", "lease"]
        assert post(server, "/vgen/lease", {})["token"]
        assert post(server, "/v1/models", {})["data"] == [{"id": "m", "root": "m", "max_model_len": 9}]
