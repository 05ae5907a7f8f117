"""Every trainer of TRL 1.16 that generates with `VLLMGeneration` trains three steps with vgen in its place."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_layout import plain_layout_environment

from vgen import ProfilingContext, ServerConnection
from vgen.engines.server.launcher import start_server
from vgen.integrations.trl import enable
from vgen.profiling import semconv
from vgen.testing import MemorySink, tiny_model

pytestmark = pytest.mark.slow

pytest.importorskip("trl", reason="TRL is not installed: pip install 'vgen[trl]'")

STEPS, TEMPERATURE = 3, 0.8
TEXTS = ["hello", "once upon", "abc", "the end"]
DIFFERENCE = "sampling/sampling_logp_difference/max"
PROMPTS = {"prompt": TEXTS}
MESSAGES = {"messages": [[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}] for text in TEXTS]}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
USUAL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "max_completion_length": 8,
    "temperature": TEMPERATURE,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "use_vllm": True,
}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """At least 1, which SDPO counts as a success, for every second completion; different for each."""
    return [i % 2 + len(str(text)) / 100 for i, text in enumerate(completions)]


def grpo(_teacher):
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig, PROMPTS, {"reward_funcs": reward}, {"num_generations": 2}


def rloo(_teacher):
    from trl import RLOOConfig, RLOOTrainer

    return RLOOTrainer, RLOOConfig, PROMPTS, {"reward_funcs": reward}, {"num_generations": 2}


def distillation(teacher):
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer, DistillationConfig, PROMPTS, {"teacher_model": teacher}, {}


def sdpo(_teacher):
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    return SDPOTrainer, SDPOConfig, PROMPTS, {"reward_funcs": reward}, {"num_generations": 2}


def gold(teacher):
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    settings = {"lmbda": 1.0, "top_p": 1.0, "max_length": 128}
    return GOLDTrainer, GOLDConfig, MESSAGES, {"teacher_model": teacher}, settings


def iw_opd(teacher):
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    return IWOPDTrainer, IWOPDConfig, MESSAGES, {"teacher_model": teacher}, {"top_p": 1.0, "max_length": 128}


def sdft(_teacher):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    rows = PROMPTS | {"privileged_context": [text.upper() for text in TEXTS]}
    return SDFTTrainer, SDFTConfig, rows, {}, {"num_generations": 2}


def model_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """What the trainer's model gives to `tokens` after `prompt`, at the temperature of the sampling."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


class Watched:
    """Compares what the engine samples at each step with the forward pass of the trainer's model at that moment."""

    def __init__(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self._trainer = trainer
        self._last = self._weights()
        self._completions: Any = None
        self._of_trl, self._of_vgen = trainer.vllm_generation.generate, trainer.vllm_generation.generation.generate
        monkeypatch.setattr(trainer.vllm_generation, "generate", self._generate)
        monkeypatch.setattr(trainer.vllm_generation.generation, "generate", self._generate_with_logprobs)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self._trainer.model.named_parameters()}

    def changed(self) -> bool:
        """Whether the weights have changed since the last question."""
        last, self._last = self._last, self._weights()
        return any(not torch.equal(value, last[name]) for name, value in self._last.items())

    def _generate_with_logprobs(self, prompts: Any, sampling: Any, **options: Any) -> Any:
        assert sampling.temperature == TEMPERATURE
        self._completions = self._of_vgen(prompts, replace(sampling, logprobs=0), **options)
        return self._completions

    def _generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
        answer = prompt_ids, completion_ids, logprobs, token_ids = self._of_trl(
            prompts, images, num_generations, profiler
        )
        assert prompt_ids == prompts
        assert completion_ids == [completion.token_ids for completion in self._completions]
        for prompt, completion in zip(prompt_ids, self._completions, strict=True):
            expected = model_logprobs(self._trainer.model, prompt, completion.token_ids)
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4
        if logprobs is not None:
            assert logprobs == [[[value] for value in completion.logprobs] for completion in self._completions]
            assert token_ids == [[[token] for token in completion.token_ids] for completion in self._completions]
        assert self.changed() == bool(self.steps)
        self.steps.append(self._trainer.state.global_step)
        return answer


@contextmanager
def trained(build: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, **ours: Any) -> Iterator[Any]:
    """The generation of a TRL trainer after three steps, with the checks that hold for all trainers."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    model, _ = tiny_model(folder / "model")
    teacher, _ = tiny_model(folder / "teacher", seed=1)
    trainer_class, config_class, rows, arguments, more = build(teacher)
    # TRL reads the teacher's tokenizer from its folder, and compares it with this one
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    sink = MemorySink()
    with enable(profiling=ProfilingContext([sink]), **ours):
        trainer = trainer_class(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict(rows),
            args=config_class(output_dir=str(folder / "out"), **USUAL | more | settings),
            **arguments,
        )
        try:
            watched = Watched(trainer, monkeypatch)
            trainer.train()
            assert watched.steps == list(range(STEPS))
            assert watched.changed()
            check_telemetry(trainer, sink)
            yield trainer.vllm_generation.generation
        finally:
            trainer.vllm_generation.generation.close()
            del trainer
            gc.collect()


def check_telemetry(trainer: Any, sink: MemorySink) -> None:
    """Each step has one generation and one sync, and the trainer's log their numbers."""
    steps = [step.span_id for step in sink.named(semconv.STEP)]
    assert len(steps) == STEPS
    assert [span.parent_id for span in sink.named(semconv.GENERATE)] == steps
    assert [span.parent_id for span in sink.named(semconv.WEIGHT_SYNC)] == steps
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["vgen/steps"] for row in rows] == [1] * STEPS
    # GRPO compares by itself what it sampled with its model's forward pass
    differences = [row[DIFFERENCE] for row in rows if DIFFERENCE in row]
    assert len(differences) == (STEPS if type(trainer).__name__ == "GRPOTrainer" else 0)
    assert all(difference < 1e-4 for difference in differences)


@pytest.mark.parametrize("build", [grpo, rloo, distillation, sdpo, gold, iw_opd, sdft])
def test_a_trainer_takes_three_steps_with_an_engine_in_its_process(build, tmp_path, monkeypatch):
    # as on a GPU, parameters keep the loaded layout, so that bits can be compared
    monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)
    settings = {"vllm_mode": "colocate", "vllm_max_model_length": 128}
    engine_kwargs = {"kv_cache_memory_bytes": 16 << 20}
    with trained(build, tmp_path, monkeypatch, settings, engine_kwargs=engine_kwargs) as generation:
        generation.sync_weights()
        report = generation.verify("bits")
        assert (report.how, report.reason) == ("bits", "")
        assert report.tensors == len(list(generation.source))


@pytest.fixture(scope="module")
def server_with_plain_layout(tmp_path_factory) -> Iterator[Any]:
    """A server whose parameters keep the loaded layout, so that it can compare bits."""
    folder = tmp_path_factory.mktemp("served")
    tiny_model(folder / "model")
    arguments = ["--max-model-len", "128", "--dtype", "float32", "--kv-cache-memory-bytes", str(16 << 20)]
    environment = plain_layout_environment(folder / "site")
    with start_server(folder / "model", arguments=arguments, environment=environment) as server:
        yield server


@pytest.mark.parametrize("build", [grpo, rloo, gold])
def test_a_trainer_takes_three_steps_with_a_server(build, server_with_plain_layout, tmp_path, monkeypatch):
    keys = {"control_key": server_with_plain_layout.control_key, "connection": ServerConnection(timeout=120.0)}
    settings = {"vllm_mode": "server", "vllm_server_base_url": server_with_plain_layout.url}
    with trained(build, tmp_path, monkeypatch, settings, server_kwargs=keys) as generation:
        assert generation.sync_weights(verify="bits").verified == "bits"
