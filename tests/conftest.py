"""What all tests share: markers that skip themselves, and one real engine for the whole session."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  # its plugin would import it at the very end, beside whatever is being torn down
import pytest

from vgen.profiling import ProfilingContext
from vgen.testing import MemorySink

# Nothing comes from a hub, and a look-up would wait for a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # collecting them lists all packages, in a process of its own
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in ("real", "gpu"):
            item.add_marker(folder)
        if folder == "gpu" and not _cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if folder == "real" and importlib.util.find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: pip install 'vgen[cpu]'"))


def _cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="module")
def _heap_of_the_tests_alone() -> None:
    """Nobody walks what has been imported so far again: with all of it, each collection takes a second.

    What a module makes is collected as ever. `gc.get_referrers` and `gc.get_objects` leave out what is frozen: a test
    that asks them calls `gc.unfreeze()` first.
    """
    gc.collect()
    gc.freeze()


@dataclass
class Real:
    """A tiny model with a generation object on real vLLM, shared by the session's tests."""

    model: Any
    tokenizer: Any
    generation: Any
    sink: MemorySink
    profiling: ProfilingContext

    def randomize(self, scale: float = 0.05) -> None:
        """Fresh random weights for the trainer's model; the engine knows nothing of it until the next sync."""
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn_like(parameter) * scale)


@pytest.fixture(scope="session")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    from vgen import ColocateGeneration
    from vgen.testing import tiny_model

    model, tokenizer = tiny_model(tmp_path_factory.mktemp("model"))
    sink = MemorySink()
    profiling = ProfilingContext([sink])
    generation = ColocateGeneration(
        model, processing_class=tokenizer, enable_sleep_mode=True, max_model_length=512, profiling=profiling
    )
    yield Real(model, tokenizer, generation, sink, profiling)
    generation.close()
    profiling.close()


@pytest.fixture
def real(real_engine: Real) -> Real:
    """The session's real engine, awake, in step with its model, its sink empty."""
    from vgen.engines.base import EngineState

    if real_engine.generation.state is EngineState.ASLEEP:
        real_engine.generation.wake_up()
    real_engine.generation.sync_weights()
    real_engine.sink.clear()
    return real_engine
