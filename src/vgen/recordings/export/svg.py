"""The terminal's waterfall as an SVG picture."""

from __future__ import annotations

import io

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from ..reader.selection import Selection
from .terminal import waterfall

WIDTH = 100
"""Columns of text in the picture."""


def export(chosen: Selection) -> str:
    """The picture as SVG text."""
    console = Console(highlight=False, record=True, file=io.StringIO(), width=WIDTH)
    console.print(waterfall(chosen.spans, width=WIDTH, now_ns=chosen.end_ns))
    # rich's template loads a font from the web. The picture must not load anything, so that rule is taken out.
    head, _, rest = CONSOLE_SVG_FORMAT.partition("@font-face")
    template = head + rest[rest.rindex("@font-face") :].partition("}}")[2]
    return console.export_svg(title="vgen trace", code_format=template)
