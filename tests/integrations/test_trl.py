"""TRL's generation object in server mode, with a stand-in server. TRL's trainers are in tests/real."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.server_generation import Model

from vgen import ServerConnection, ServerError, ServerGeneration
from vgen.testing import FaultyServer

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")
pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'vgen[server]'")


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
            server_kwargs={"control_key": "a-key", "connection": ServerConnection(timeout=20.0)},
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


@pytest.mark.slow
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


def test_the_block_of_the_readme_puts_vgen_in_the_place_of_trls_class(tmp_path, monkeypatch):
    import trl.trainer.grpo_trainer

    from vgen.integrations.trl import TRLGeneration

    readme = Path(__file__).parents[2] / "README.md"
    [block] = [each for each in re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.M | re.S) if "trl" in each]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", None)  # so that it is put back afterwards
    namespace: dict[str, Any] = {}
    exec(compile(block, str(readme), "exec"), namespace)
    replaced = trl.trainer.grpo_trainer.VLLMGeneration
    assert replaced.func is TRLGeneration
    assert replaced.keywords == {"profiling": namespace["profiling"]}
    namespace["profiling"].close()
