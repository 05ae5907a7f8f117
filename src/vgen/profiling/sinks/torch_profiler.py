"""torch.profiler: spans as ranges in its traces, around the operators that ran within them."""

from __future__ import annotations

from typing import Any

from ...errors import MissingExtraError
from ..records import Attributes, Sink, Span


class TorchProfilerSink(Sink):
    """Enters a `torch.profiler.record_function` for every span that is opened while a profiler runs.

        with ProfilingContext([TorchProfilerSink()]) as profiling, torch.profiler.profile() as profiler:
            ...
        profiler.export_chrome_trace("trace.json")

    While none runs on the span's thread, it asks whether one does, and that is all. A span that is open
    when the profiler starts is not in its trace; one still open when it stops ends there. Ends may come
    in any order. Spans that were rebuilt after the fact have no place here.
    """

    inline = True

    def __init__(self) -> None:
        try:
            from torch.autograd import _profiler_enabled  # pyright: ignore
            from torch.profiler import record_function
        except ImportError as error:
            raise MissingExtraError("TorchProfilerSink", "PyTorch", "vllm") from error
        self._running: Any = _profiler_enabled
        self._range: Any = record_function
        self._open: dict[str, Any] = {}

    def on_start(self, span: Span, attributes: Attributes) -> None:
        if self._running() and span.current:
            entered = self._range(span.name)
            entered.__enter__()
            self._open[span.span_id] = entered

    def on_end(self, span: Span) -> None:
        if self._open:
            entered = self._open.pop(span.span_id, None)
            if entered is not None:
                entered.__exit__(None, None, None)
