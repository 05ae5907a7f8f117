"""TRL's `GRPOTrainer` takes steps with vgen instead of its own generation object."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from helpers.recorded_run import read_run

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


def grpo(folder, **settings):
    """A GRPO trainer over a tiny model, as a user of TRL makes it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_model(folder / "model")
    usual = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "learning_rate": 1e-3}
    usual |= {"vllm_mode": "colocate", "vllm_max_model_length": 256, "use_cpu": True, "bf16": False}
    usual |= {"report_to": [], "save_strategy": "no", "logging_steps": 1}
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(str(completion))) for completion in completions],
        train_dataset=Dataset.from_dict(ROWS),
        args=GRPOConfig(output_dir=str(folder / "out"), use_vllm=True, **usual | settings),
    )


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_readmes_call_records_a_run_of_trls_own_trainer(tmp_path, monkeypatch):
    readme = Path(__file__).parents[2] / "README.md"
    [block] = [each for each in re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.M | re.S) if "trl" in each]
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, str(readme), "exec"), namespace)
    with namespace["enabled"], namespace["profiling"]:
        trainer = grpo(tmp_path, max_steps=3)
        trainer.train()
        trainer.vllm_generation.generation.close()
    assert len(read_run(tmp_path / "runs" / "a").rows) == 3
    report = subprocess.run(
        [sys.executable, "-m", "vgen.cli", "report", "runs/a"], capture_output=True, text=True, check=True
    )
    assert "weight sync" in report.stdout.lower()


def test_one_call_opens_steps_and_adds_to_the_trainers_own_log(tmp_path):
    from vgen.integrations.trl import enable

    sink = MemorySink()
    with enable(profiling=ProfilingContext([sink])):
        trainer = grpo(tmp_path, max_steps=5, logging_steps=2, num_iterations=2, gradient_accumulation_steps=2)
        trainer.train()
    steps = sink.named(semconv.STEP)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    generations = sink.named(semconv.GENERATE)
    assert {span.parent_id for span in generations} <= {step.span_id for step in steps}
    assert len(generations) == 3  # two steps share their completions
    rows = logged(trainer)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        figures = {name: value for name, value in row.items() if name.startswith("vgen/")}
        assert len(figures) <= 31  # with the number of steps
        assert figures["vgen/steps"] == 2
        assert 0 < figures["vgen/generate.duration.sum"] < figures["vgen/train.step.duration.sum"]
        assert figures["vgen/generate.output_tokens"] > 0
        assert figures["vgen/weight_sync.duration.sum"] > 0
    trainer.vllm_generation.generation.close()


def test_a_resumed_run_goes_on_with_its_step_numbers(tmp_path):
    from vgen.integrations.trl import enable

    sink = MemorySink()
    with enable(profiling=ProfilingContext([sink])):
        trainer = grpo(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.vllm_generation.generation.close()
        trainer = grpo(tmp_path, max_steps=2)
        trainer.train(resume_from_checkpoint=True)
    assert [step.number for step in sink.named(semconv.STEP)] == [1, 2]
    assert [row["step"] for row in logged(trainer)] == [1, 2]
    assert logged(trainer)[-1]["vgen/steps"] == 1
    trainer.vllm_generation.generation.close()


def test_trls_own_client_works_with_the_keys_of_a_server(server):
    import trl.generation.vllm_client as home

    from vgen.integrations.trl import enable

    keys = {"api_key": server.api_key, "control_key": server.control_key}
    with enable(client_keys={server.base_url: keys}):
        client = home.VLLMClient(base_url=server.base_url)
        assert client.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
        assert client.get_world_size() == 1
        client.reset_prefix_cache()
        answer = client.generate([[1, 2, 3]], max_tokens=4, generation_kwargs={"ignore_eos": True})
        assert len(answer["completion_ids"][0]) == len(answer["logprobs"][0]) == 4
