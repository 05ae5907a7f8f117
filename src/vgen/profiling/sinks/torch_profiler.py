"""torch.profiler: shows spans as ranges in its traces, around the operators that ran within them."""

from __future__ import annotations

from typing import Any

from ...errors import needs_extra
from ..measurement import Attributes
from ..span_model import Sink, Span


class TorchProfilerSink(Sink):
    """Enters a `torch.profiler.record_function` for each span that is opened while a profiler runs.

    If no profiler runs on the span's thread, the sink only checks for one. A span that was opened before the profiler
    started is not in its trace; a span that is open when the profiler stops ends there. Spans may end in any order.
    Rebuilt spans are not shown.

        with ProfilingContext([TorchProfilerSink()]) as profiling, torch.profiler.profile() as profiler:
            ...
        profiler.export_chrome_trace("trace.json")
    """

    inline = True

    def __init__(self) -> None:
        with needs_extra("TorchProfilerSink", "PyTorch", "vllm"):
            from torch.autograd import _profiler_enabled  # pyright: ignore
            from torch.profiler import record_function
        self._profiler_enabled: Any = _profiler_enabled
        self._record_function: Any = record_function
        self._open: dict[str, Any] = {}

    def on_start(self, span: Span, attributes: Attributes) -> None:
        if self._profiler_enabled() and span.current:
            entered = self._record_function(span.name)
            entered.__enter__()
            self._open[span.span_id] = entered

    def on_end(self, span: Span) -> None:
        if self._open:
            entered = self._open.pop(span.span_id, None)
            if entered is not None:
                entered.__exit__(None, None, None)
