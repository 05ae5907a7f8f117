"""TRL's `GRPOTrainer` takes steps with vgen instead of its own generation object."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import pytest

from vgen import ServerConnection
from vgen.profiling import ProfilingContext, semconv
from vgen.testing import MemorySink, tiny_model

pytestmark = pytest.mark.slow

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")


ROWS = {"prompt": ["hello", "once upon", "abc", "the end"] * 4}


@contextmanager
def trained(model, processing_class, folder, monkeypatch, rows=ROWS, ours=MappingProxyType({}), **settings):
    """A TRL trainer after two steps with vgen as its generation object, with the checks that hold for all cases."""
    import trl.trainer.grpo_trainer
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from vgen.integrations.trl import TRLGeneration

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", partial(TRLGeneration, **ours))
    usual = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 16, "learning_rate": 1e-3}
    usual |= {
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    trainer = GRPOTrainer(
        model=model,
        processing_class=processing_class,
        reward_funcs=lambda completions, **_: [float(len(str(completion))) for completion in completions],
        train_dataset=Dataset.from_dict(rows),
        args=GRPOConfig(output_dir=str(folder / "out"), use_vllm=True, **usual | settings),
    )
    try:
        trainer.train()
        logged = [row for row in trainer.state.log_history if "sampling/sampling_logp_difference/max" in row]
        assert len(logged) == 2
        # TRL compares the engine's log-probabilities with the trainer's: the engine had the weights of that step.
        assert max(float(row["sampling/sampling_logp_difference/max"]) for row in logged) < 1e-4
        assert any(not parameter.equal(before[name]) for name, parameter in model.named_parameters())
        yield trainer
    finally:
        trainer.vllm_generation.generation.close()
        del trainer
        gc.collect()


@pytest.mark.parametrize("sleep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grpo_trainer_takes_two_steps(tmp_path, monkeypatch, sleep):
    model, tokenizer = tiny_model(tmp_path / "model")
    sink = MemorySink()
    settings = {"vllm_mode": "colocate", "vllm_enable_sleep_mode": sleep, "vllm_max_model_length": 256}
    ours = {"profiling": ProfilingContext([sink])}
    with trained(model, tokenizer, tmp_path, monkeypatch, ours=ours, **settings):
        assert len(sink.named(semconv.GENERATE)) == 2
        assert len(sink.named(semconv.WEIGHT_SYNC)) == 2
        assert len(sink.named(semconv.SLEEP)) == (3 if sleep else 0)


@pytest.mark.slow
def test_grpo_trainer_takes_two_steps_with_a_server(server, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(server.folder, dtype="auto")
    sink = MemorySink()
    keys = {"api_key": server.api_key, "control_key": server.control_key, "connection": ServerConnection(timeout=120.0)}
    ours = {"profiling": ProfilingContext([sink]), "server_kwargs": keys}
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.base_url}
    with trained(model, server.tokenizer, tmp_path, monkeypatch, ours=ours, **settings):
        assert [span.attributes[semconv.TRANSPORT] for span in sink.named(semconv.WEIGHT_SYNC)] == ["shared_memory"] * 2
        assert [span.attributes[semconv.ENGINE] for span in sink.named(semconv.GENERATE)] == ["server"] * 2


@pytest.mark.slow
def test_grpo_trainer_takes_steps_with_images(tmp_path, monkeypatch):
    """TRL's prompts have expanded placeholders. If they were expanded again, the log-probabilities would differ."""
    import numpy as np
    from PIL import Image

    from vgen.testing import tiny_vision_model

    model, processor = tiny_vision_model(tmp_path / "model")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(4)]
    prompts = [[{"role": "user", "content": text}] for text in ROWS["prompt"][:4]]
    settings = {"vllm_mode": "colocate", "vllm_max_model_length": 256, "num_generations": 2, "max_completion_length": 8}
    # small steps, so that the model does not sample image tokens, which it cannot be trained on
    settings["learning_rate"] = 1e-5
    with trained(model, processor, tmp_path, monkeypatch, {"prompt": prompts, "image": images}, **settings):
        pass
