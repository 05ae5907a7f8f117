"""TRL's generation object in server mode, built beside a stand-in server. The trainers themselves are in tests/real."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from vgen import ServerError, ServerGeneration
from vgen.testing import FaultyServer

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")


class Model:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

    def named_parameters(self, remove_duplicate):
        return []


def build(**more):
    from vgen.integrations.trl import TRLGeneration

    accelerator = SimpleNamespace(wait_for_everyone=lambda: None, process_index=0, num_processes=1)
    return TRLGeneration(Model(), accelerator, None, mode="server", max_completion_length=2, **more)


def test_it_takes_what_trls_own_takes():
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    from vgen.integrations.trl import TRLGeneration

    theirs = inspect.signature(VLLMGeneration.__init__).parameters
    ours = inspect.signature(TRLGeneration.__init__).parameters
    assert [*ours][: len(theirs)] == [*theirs]
    assert {name: ours[name].default for name in theirs if name != "group_port"} == {
        name: theirs[name].default for name in theirs if name != "group_port"
    }


def test_it_generates_with_the_server_and_says_what_trainers_ask_of_it():
    with FaultyServer() as server:
        made = build(
            server_base_url=server.url,
            temperature=0.7,
            structured_outputs_regex="a+",
            server_kwargs={"control_key": "a-key", "timeout": 20.0},
        )
        assert isinstance(made.generation, ServerGeneration)
        prompts, completions, logprobs, token_ids = made.generate([[1, 2, 3], [4, 5]], None, 1)
        assert (prompts, completions) == ([[1, 2, 3], [4, 5]], [[1, 2], [4, 5]])
        assert logprobs == [[[-0.5], [-0.5]]] * 2
        assert token_ids == [[[1], [2]], [[4], [5]]]
        body = next(body for path, _, body in server.seen if path == "/v1/completions")
        assert body["temperature"] == 0.7
        assert body["structured_outputs"] == {"regex": "a+"}
        info = made.vllm_client.get_server_info()
        assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
        path, headers, _ = server.seen[-1]
        assert path == "/server_info?config_format=json"
        assert headers["X-Vgen-Control-Key"] == "a-key"
        made.generation.close()


def test_it_waits_for_the_server_to_be_up_for_as_long_as_it_is_told():
    with FaultyServer() as gone:
        url = gone.url
    host, port = url.removeprefix("http://").split(":")
    start = time.monotonic()
    with pytest.raises(ServerError):
        build(server_host=host, server_port=int(port), server_timeout=1.5)
    assert time.monotonic() - start >= 1.5

    started: list[FaultyServer] = []
    timer = threading.Timer(1.0, lambda: started.append(FaultyServer(port=int(port))))
    timer.start()
    made = build(server_host=host, server_port=int(port), server_timeout=30.0)
    made.generation.close()
    started[0].close()


def test_a_mode_that_is_none_is_named():
    from vgen.integrations.trl import TRLGeneration

    with pytest.raises(ValueError, match="'elsewhere'"):
        TRLGeneration(Model(), None, None, mode="elsewhere")
