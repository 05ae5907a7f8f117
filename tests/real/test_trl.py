"""TRL's own `GRPOTrainer` takes steps with vgen in the place of its generation object."""

from __future__ import annotations

import gc
from functools import partial

import pytest

from vgen.profiling import ProfilingContext, names
from vgen.testing import MemorySink, tiny_model

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")


@pytest.mark.parametrize("sleep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grpo_trainer_takes_two_steps(tmp_path, monkeypatch, sleep):
    import trl.trainer.grpo_trainer
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from vgen.integrations.trl import TRLGeneration

    model, tokenizer = tiny_model(tmp_path / "model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", partial(TRLGeneration, profiling=profiling))
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": ["hello", "once upon", "abc", "the end"] * 4}),
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_enable_sleep_mode=sleep,
            vllm_max_model_length=256,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "sampling/sampling_logp_difference/max" in row]
    assert len(logged) == 2
    # TRL's own comparison of the engine's log-probabilities with the trainer's: the engine had the weights of that step
    assert max(float(row["sampling/sampling_logp_difference/max"]) for row in logged) < 1e-4
    assert any(not parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert len(sink.named(names.GENERATE)) == 2
    assert len(sink.named(names.WEIGHT_SYNC)) == 2
    assert len(sink.named(names.SLEEP)) == (3 if sleep else 0)
    trainer.vllm_generation.generation.close()
    del trainer
    gc.collect()


@pytest.mark.slow
def test_grpo_trainer_takes_two_steps_with_a_server(server, tmp_path, monkeypatch):
    import trl.trainer.grpo_trainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from vgen.integrations.trl import TRLGeneration

    model = AutoModelForCausalLM.from_pretrained(server.folder, dtype="auto")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sink = MemorySink()
    keys = {"api_key": server.api_key, "control_key": server.control_key, "timeout": 120.0}
    ours = partial(TRLGeneration, profiling=ProfilingContext([sink]), server_kwargs=keys)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", ours)
    trainer = GRPOTrainer(
        model=model,
        processing_class=server.tokenizer,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": ["hello", "once upon", "abc", "the end"] * 4}),
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=server.base_url,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
    )
    try:
        trainer.train()
        logged = [row for row in trainer.state.log_history if "sampling/sampling_logp_difference/max" in row]
        assert len(logged) == 2
        assert max(float(row["sampling/sampling_logp_difference/max"]) for row in logged) < 1e-4
        assert any(not parameter.equal(before[name]) for name, parameter in model.named_parameters())
        assert [span.attributes[names.TRANSPORT] for span in sink.named(names.WEIGHT_SYNC)] == ["shared_memory"] * 2
        assert [span.attributes[names.ENGINE] for span in sink.named(names.GENERATE)] == ["server"] * 2
    finally:
        trainer.vllm_generation.generation.close()


@pytest.mark.slow
def test_grpo_trainer_takes_steps_with_images(tmp_path, monkeypatch):
    import numpy as np
    import trl.trainer.grpo_trainer
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    from vgen.integrations.trl import TRLGeneration
    from vgen.testing import tiny_vision_model

    model, processor = tiny_vision_model(tmp_path / "model")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(4)]
    rows = [[{"role": "user", "content": text}] for text in ("hello", "once upon", "abc", "the end")]
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", TRLGeneration)
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=lambda completions, **_: [float(len(str(completion))) for completion in completions],
        train_dataset=Dataset.from_dict({"prompt": rows, "image": images}),
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-5,  # far from sampling an image's own token, which no vision model can be trained on
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "sampling/sampling_logp_difference/max" in row]
    assert len(logged) == 2
    # TRL's prompts hold expanded placeholders: expanded once more, the engine's log-probabilities would be others
    assert max(float(row["sampling/sampling_logp_difference/max"]) for row in logged) < 1e-4
    trainer.vllm_generation.generation.close()
    del trainer
    gc.collect()
