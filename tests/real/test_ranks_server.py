"""Two gloo ranks with one real server: each rank gets its completions, and only the leader sends weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from helpers.torchrun import on_two_ranks

from vgen import Sampling, ServerConnection, ServerGeneration
from vgen.demo import max_logprob_difference


def difference(model, completions: list[dict]) -> float:
    """The largest difference between the model's log-probabilities and those that a worker printed."""
    from vgen import Completion, Completions

    made = [
        Completion(prompt_index=index, generation_index=0, token_ids=c["tokens"], logprobs=c["logprobs"])
        for index, c in enumerate(completions)
    ]
    return max_logprob_difference(model, Completions([c["prompt"] for c in completions], made, 1, None))


def beside(server, worker: str, arguments: list[str], folder: Path) -> list[dict]:
    """Run `worker` on two ranks; returns the result of each."""
    return on_two_ranks(worker, arguments, folder, API_KEY=server.api_key, CONTROL_KEY=server.control_key)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ranks_with_shards_send_full_weights(server, tmp_path):
    found = beside(server, "ranks_fsdp.py", [server.folder, server.base_url], tmp_path)
    for rank, each in enumerate(found):
        assert each["prompts"] == [[[1, 2, 3], [4, 5]] if rank == 0 else [[9, 8, 7, 6]]] * 2
        assert each["versions"] == [["one"], ["two"]]
        assert max(each["own"]) <= 1e-4
        assert min(each["stale"]) > 1e-2  # the training step changed the weights
        assert each["verified"] == (["logprobs", None] if rank == 0 else [None, None])  # rank 0 has the engine


@pytest.mark.slow
def test_ranks_share_a_server(server, tmp_path):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(
        server.folder, dtype="auto"
    )  # tests of other files have changed the server's model
    fresh = copy.deepcopy(saved)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    save_file({name: parameter.detach() for name, parameter in fresh.named_parameters()}, tmp_path / "fresh")
    arguments = [server.folder, str(tmp_path / "fresh"), server.base_url]
    zero, one = beside(server, "ranks_server.py", arguments, tmp_path)
    assert [len(c["tokens"]) for c in zero["first"]] == [8, 8, 0, 0, 8, 8]
    assert [c["error"] for c in zero["first"]] == [None, None, "prompt 1 is empty", "prompt 1 is empty", None, None]
    assert [(c["prompt"], len(c["tokens"])) for c in one["first"]] == [([9, 8, 7, 6], 8)] * 2
    drawn = [c for c in zero["first"] + one["first"] if c["error"] is None]
    assert all(c["timed"] for c in drawn)
    assert difference(saved, drawn) <= 1e-4
    assert zero["after"] == []
    assert [c["version"] for c in one["after"]] == ["fresh"]
    assert difference(fresh, one["after"]) <= 1e-4
    assert difference(saved, one["after"]) > 1e-2
    for rank, found in enumerate((zero, one)):
        assert difference(fresh, [{"prompt": [5, 6], "tokens": [7, 8 + rank], "logprobs": found["score"][0]}]) <= 1e-4
    assert (zero["links"], one["links"]) == (1, 2)  # the sync that made the weights; the leader's call
    assert zero["bytes"] == one["bytes"]
    # A single process with all prompts samples the same tokens, because seeds are numbered over all ranks.
    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with ServerGeneration(
        saved, base_urls=[server.base_url], connection=ServerConnection(timeout=120.0), **keys
    ) as alone:
        found = alone.generate([[1, 2, 3], [4, 5], [9, 8, 7, 6]], Sampling(max_tokens=8, ignore_eos=True, seed=3), 2)
    assert [c.token_ids for c in found] == [c["tokens"] for c in drawn]
