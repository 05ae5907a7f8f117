"""The `vgen` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vgen", description="The generation layer of an RL post-training loop.")
    parser.add_argument("--version", action="version", version=f"vgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run a small RL loop on real vLLM and show where its time went")
    demo.add_argument("--steps", type=_positive, default=3, metavar="N", help="training steps (default: 3)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="where the run is recorded (default: runs/demo-<time>)")
    demo.add_argument(
        "--model", type=Path, metavar="PATH", help="a model directory instead of the tiny Qwen2 made on the spot"
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    trace = commands.add_parser("trace", help="show a recorded run as a waterfall")
    trace.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or one of its .jsonl files")
    trace.add_argument("--step", type=int, metavar="N", help="which training step (default: the last trace)")
    trace.add_argument("--svg", type=Path, metavar="FILE", help="write the picture there instead")

    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        from . import demo as demo_command

        return demo_command.run(steps=options.steps, out=options.out, model=options.model, as_json=options.json)
    return _trace(options.run, options.step, options.svg)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _trace(place: Path, step: int | None, svg: Path | None) -> int:
    from rich.console import Console

    from .analysis.run import read_run
    from .viewers.terminal import waterfall

    run = read_run(place)
    for problem in run.problems:
        print(f"vgen trace: {problem}", file=sys.stderr)
    trace = run.step(step) if step is not None else next(reversed(run.traces()), [])
    if not trace:
        print(f"vgen trace: {place} holds no {'spans' if step is None else f'step {step}'}", file=sys.stderr)
        return 1
    console = Console(highlight=False)
    if svg is not None:
        console = Console(highlight=False, record=True, file=io.StringIO(), width=100)
    console.print(waterfall(trace, width=min(console.width, 120)))
    if svg is not None:
        svg.write_text(_svg(console))
    return 0


def _svg(console: object) -> str:
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    assert isinstance(console, Console)
    # without the web font that rich would have the picture load
    head, _, rest = CONSOLE_SVG_FORMAT.partition("@font-face")
    template = head + rest[rest.rindex("@font-face") :].partition("}}")[2]
    return console.export_svg(title="vgen trace", code_format=template)


if __name__ == "__main__":
    sys.exit(main())
