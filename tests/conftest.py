"""Fixtures for all tests: markers that skip what cannot run here, and one real engine for the whole session."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis  # noqa: F401  # its pytest plugin would import it at the very end, during teardown
import pytest

from vgen.profiling import ProfilingContext
from vgen.testing import MemorySink

if TYPE_CHECKING:
    from helpers.changed_source import ChangedSource

# Tests need nothing from the hub, and a look-up may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # collecting them starts a process that lists all packages
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# Under `nohup`, and in a shell's background, Ctrl-C is ignored, by children too: tests of Ctrl-C would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Worker processes import `helpers`, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


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
        if deadlines := [row.kwargs["within"] for row in item.iter_markers("fault")]:  # a row of docs/faults.md
            item.add_marker(pytest.mark.timeout(max(deadlines), func_only=True), append=False)


def _cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="module")
def _imports_frozen() -> None:
    """Exclude the objects that exist before a test module from garbage collection: with them, it takes a second.

    Objects that the module's tests make are collected as usual. `gc.get_referrers` and `gc.get_objects` do not return
    frozen objects: a test that uses them calls `gc.unfreeze()` first.
    """
    gc.collect()
    gc.freeze()


@dataclass
class Real:
    """A tiny model and its generation object on real vLLM, shared by the session's tests."""

    model: Any
    tokenizer: Any
    source: ChangedSource
    """The generation's source. A test may change what it sends."""
    generation: Any
    sink: MemorySink
    profiling: ProfilingContext

    def randomize(self, scale: float = 0.05) -> None:
        """Give the trainer's model fresh random weights. The engine has the old ones until the next sync."""
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn_like(parameter) * scale)


@pytest.fixture(scope="session")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    from helpers.changed_source import ChangedSource

    from vgen import ColocateGeneration
    from vgen.testing import tiny_model

    model, tokenizer = tiny_model(tmp_path_factory.mktemp("model"))
    source, sink = ChangedSource(model), MemorySink()
    profiling = ProfilingContext([sink])
    generation = ColocateGeneration(
        source, processing_class=tokenizer, enable_sleep_mode=True, max_model_length=512, profiling=profiling
    )
    yield Real(model, tokenizer, source, generation, sink, profiling)
    generation.close()
    profiling.close()


@pytest.fixture
def real(real_engine: Real) -> Real:
    """The session's real engine: awake, with its model's weights and an empty sink."""
    from vgen.engine_protocol import EngineState

    if real_engine.generation.state is EngineState.ASLEEP:
        real_engine.generation.wake_up()
    real_engine.generation.sync_weights()
    real_engine.sink.clear()
    return real_engine
