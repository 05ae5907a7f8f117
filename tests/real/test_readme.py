"""The README's example for trainer authors, run on the real engine as it is, except for shorter completions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.recorded_run import read_run
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_what_a_trainer_author_writes(real, tmp_path, monkeypatch):
    code = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)[0]
    assert "max_tokens=512" in code
    code = code.replace("max_tokens=512", "max_tokens=16")
    monkeypatch.chdir(tmp_path)
    provider, exporter, logged = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter(), list[Any]()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    prompts, updates = ["to be or not to be", "the quick brown fox"], []
    exec(
        compile(code, str(README), "exec"),
        {
            "model": real.model,
            "tokenizer": real.tokenizer,
            "tracer_provider": provider,
            "batches": [prompts, prompts[:1]],
            "update": lambda model, rollouts: updates.append(len(rollouts)) or 0.5,
            "trainer_log": logged.append,
        },
    )
    assert updates == [16, 8]
    assert [row["loss"] for row in logged] == [0.5, 0.5]
    assert all(row["vgen.weight_sync.sent"] > 0 and row["vgen.request.e2e.p99"] > 0 for row in logged)
    exported = [span.name for span in exporter.get_finished_spans()]
    assert exported.count("train.step") == 2
    assert exported.count("vgen.weight_sync") == 3  # the first generation syncs too
    assert len(read_run(tmp_path / "runs" / "a").rows) == 2
