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

    serve = commands.add_parser(
        "serve",
        help="start a vLLM server with what vgen relies on",
        usage="vgen serve MODEL [OPTION ...] [VLLM OPTION ...]",
        description="Options that are not listed here go to vLLM as they are.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="a model directory or hub name")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    for name, guards in (("api", "inference"), ("control", "weights, pause, sleep and whatever else is not inference")):
        either = serve.add_mutually_exclusive_group()
        either.add_argument(f"--{name}-key", metavar="KEY", help=f"asked for on {guards}; shown by ps")
        either.add_argument(f"--{name}-key-file", type=Path, metavar="FILE", help="the same, out of a file")
    serve.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1, metavar="N")
    serve.add_argument("--data-parallel-size", "-dp", type=_positive, default=1, metavar="N")
    serve.add_argument("--otlp-traces-endpoint", metavar="URL", help="where the server's spans go")
    serve.add_argument("--shared-memory-dir", metavar="DIR", help="the one directory that weights are mapped from")
    serve.add_argument("--startup-timeout", type=float, default=600.0, metavar="SECONDS", help="(default: 600)")
    serve.add_argument("--quiet", action="store_true", help="do not repeat the server's log on standard error")
    serve.add_argument("--json", action="store_true", help="print one JSON object with the URL and the key's file")

    given = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = parser.parse_known_args(given)
    if rest and options.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and given[given.index("serve") + 1].startswith("-"):
        serve.error("MODEL comes before the options")  # or the value of an unknown one is taken for it
    options.vllm_arguments = rest
    try:
        return _run(options)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        from . import demo as demo_command

        return demo_command.run(steps=options.steps, out=options.out, model=options.model, as_json=options.json)
    if options.command == "serve":
        return _serve(options)
    return _trace(options.run, options.step, options.svg)


def _serve(options: argparse.Namespace) -> int:
    from .engines import serve as serve_command

    try:
        api_key = serve_command.key(options.api_key, options.api_key_file)
        control_key = serve_command.key(options.control_key, options.control_key_file)
    except OSError as error:
        print(f"vgen serve: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return serve_command.run(
        options.model,
        as_json=options.json,
        quiet=options.quiet,
        startup_timeout=options.startup_timeout,
        arguments=options.vllm_arguments,
        host=options.host,
        port=options.port,
        api_key=api_key,
        control_key=control_key,
        tensor_parallel_size=options.tensor_parallel_size,
        data_parallel_size=options.data_parallel_size,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
        shared_memory_directory=options.shared_memory_dir,
    )


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
