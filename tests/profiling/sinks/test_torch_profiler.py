"""The torch.profiler sink under a real profiler."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vgen.errors import MissingExtraError
from vgen.profiling import ProfilingContext
from vgen.profiling.sinks.torch_profiler import TorchProfilerSink

torch = pytest.importorskip("torch")


def profiler() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def ranges(profiler: Any) -> dict[str, Any]:
    """The spans in the profiler's events."""
    return {event.name: event for event in profiler.events() if not event.name.startswith(("aten::", "["))}


def test_spans_lie_in_each_other_and_around_the_operators(tmp_path: Path) -> None:
    profiling = ProfilingContext([TorchProfilerSink()])
    with profiler() as found, profiling.step(0):
        with profiling.span("reward"):
            torch.ones(8).sum()
        with profiling.span("update"):
            torch.ones(8).cumsum(0)
    spans = ranges(found)
    assert set(spans) == {"train.step", "reward", "update"}
    assert spans["reward"].cpu_parent.name == spans["update"].cpu_parent.name == "train.step"
    assert "aten::sum" in {child.name for child in spans["reward"].cpu_children}
    assert "aten::cumsum" in {child.name for child in spans["update"].cpu_children}
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"train.step", "reward", "update"} <= {event.get("name") for event in trace}


def test_what_is_open_when_a_profiler_starts_or_stops_is_no_trouble() -> None:
    sink = TorchProfilerSink()
    profiling = ProfilingContext([sink])
    with profiling.span("before"):
        found = profiler()
        found.start()
        with profiling.span("within"):
            pass
        still = profiling.span("still open")
        still.__enter__()
        found.stop()
        still.__exit__(None, None, None)
    assert set(ranges(found)) == {"within", "still open"}
    assert sink._open == {}
    assert profiling.dropped() == {}


def test_ends_in_another_order_than_the_starts() -> None:
    profiling = ProfilingContext([TorchProfilerSink()])
    with profiler() as found:
        first, second = profiling.span("first"), profiling.span("second")
        first.__enter__()
        second.__enter__()
        torch.ones(512, 512).sum()
        first.__exit__(None, None, None)
        torch.ones(512, 512).sum()
        second.__exit__(None, None, None)
        with profiling.span("after"):
            torch.ones(8).sum()
    spans = {name: event.time_range for name, event in ranges(found).items()}
    assert spans["first"].start <= spans["second"].start < spans["first"].end < spans["second"].end
    assert spans["second"].end <= spans["after"].start
    assert ranges(found)["after"].cpu_parent is None


def test_threads_at_once_beside_a_profiler() -> None:
    sink = TorchProfilerSink()
    profiling = ProfilingContext([sink])

    def work() -> None:
        for _ in range(100):
            with profiling.span("a"), profiling.span("b"):
                pass

    with profiler() as found:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
    names = [event.name for event in found.events()]
    assert names.count("a") == names.count("b") == 100  # the profiler's own thread: torch profiles no other
    assert sink._open == {}


def test_rebuilt_spans_are_left_out() -> None:
    profiling = ProfilingContext([TorchProfilerSink()])
    with profiler() as found:
        now = time.monotonic_ns()
        profiling.rebuilt("vgen.request", now - 1000, now)
        with profiling.span("own"):
            pass
    assert set(ranges(found)) == {"own"}


def test_without_a_profiler_no_range_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = TorchProfilerSink()
    opened: list[str] = []
    monkeypatch.setattr("torch.autograd.profiler.record_function.__enter__", lambda self: opened.append(self.name))
    with ProfilingContext([sink]).span("a"):
        pass
    assert opened == []
    with torch.profiler.profile(), ProfilingContext([sink]).span("b"):
        pass
    assert opened == ["b"]


def test_without_torch_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.autograd", None)
    with pytest.raises(MissingExtraError, match="TorchProfilerSink needs PyTorch"):
        TorchProfilerSink()
