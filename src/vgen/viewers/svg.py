"""The terminal's waterfall as an SVG picture."""

from __future__ import annotations

import io

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from ..analysis.select import Selection
from .terminal import waterfall

WIDTH = 100


def export(chosen: Selection) -> str:
    """The picture as text."""
    console = Console(highlight=False, record=True, file=io.StringIO(), width=WIDTH)
    console.print(waterfall(chosen.spans, width=WIDTH, now_ns=chosen.end_ns))
    # without the web font that rich would have the picture load
    head, _, rest = CONSOLE_SVG_FORMAT.partition("@font-face")
    template = head + rest[rest.rindex("@font-face") :].partition("}}")[2]
    return console.export_svg(title="vgen trace", code_format=template)
