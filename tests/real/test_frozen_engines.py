"""Engines without a trainer's model keep the weights of their checkpoint, in process and behind a server."""

from __future__ import annotations

import pytest

from vgen import ColocateGeneration, EngineError, EngineStateError, Sampling, ServerGeneration
from vgen.demo import max_logprob_difference
from vgen.testing import tiny_model

SAMPLING = Sampling(max_tokens=8)


def scores_are_the_models(model, generation):
    import torch

    prompt, completion = [1, 2, 3], [4, 5, 6, 7]
    (scores,) = generation.score([prompt], [completion])
    with torch.no_grad():
        expected = model(torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
    expected = expected[2:-1].gather(-1, torch.tensor(completion)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(scores), expected, atol=1e-4)


def test_in_process_it_starts_from_a_folder_and_sleeps_with_its_weights(tmp_path):
    model, tokenizer = tiny_model(tmp_path, seed=5)
    options = dict(enable_sleep_mode=True, max_model_length=128, engine_kwargs={"kv_cache_memory_bytes": 16 << 20})
    with ColocateGeneration(str(tmp_path), processing_class=tokenizer, **options) as judge:
        assert max_logprob_difference(model, judge.generate(["a text"], SAMPLING)) <= 1e-4
        scores_are_the_models(model, judge)
        with pytest.raises(EngineStateError, match="frozen"):
            judge.sync_weights()
        with pytest.raises(EngineStateError, match="frozen"):
            judge.sleep(level=2)
        judge.sleep(level=1)
        judge.wake_up()
        scores_are_the_models(model, judge)


def test_behind_a_server_it_notices_another_trainers_weights(server):
    keys = dict(base_urls=server.base_url, api_key=server.api_key, control_key=server.control_key)
    with ServerGeneration(server.model, **keys) as trainer:
        trainer.sync_weights(version="mine")
        with ServerGeneration(None, **keys) as judge:
            scores_are_the_models(server.model, judge)
            for call in (judge.sync_weights, judge.sleep, judge.pause):
                with pytest.raises(EngineStateError, match="frozen"):
                    call()
            trainer.sync_weights(version="theirs")
            with pytest.raises(EngineError, match="'theirs', not 'mine'"):
                judge.generate([[1, 2, 3]], SAMPLING)
