"""The `vgen` command."""

from __future__ import annotations

import argparse
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

    trace = commands.add_parser("trace", help="show a recorded run as a waterfall, or export it")
    trace.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or one of its .jsonl files")
    trace.add_argument("--step", type=int, metavar="N", help="which training step (default: the last trace)")
    for name, what in (
        ("html", "write one HTML file that needs nothing else: zoom, search, hover"),
        ("chrome", "write Chrome's trace format, for Perfetto"),
        ("jaeger", "write Jaeger's JSON, to be dropped into its page"),
        ("otlp", "write OTLP JSON, for any OpenTelemetry collector"),
        ("svg", "write the terminal's picture"),
    ):
        trace.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    trace.add_argument("--follow", action="store_true", help="go on showing a run that is still being written")

    report = commands.add_parser(
        "report",
        help="say where a recorded run's time went",
        epilog="Exit status: 0; 1 where there is nothing to report on; 2 for a wrong command line; 3 where --compare "
        "found something worse.",
    )
    report.add_argument("run", type=Path, metavar="RUN", help="a run's directory, or one of its .jsonl files")
    report.add_argument("--step", type=int, metavar="N", help="of this training step alone, and why it took that long")
    report.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    report.add_argument(
        "--compare", type=Path, metavar="OTHER", help="a run to compare with, or the JSON of its report"
    )
    report.add_argument(
        "--threshold", type=_percent, default=10.0, metavar="PCT", help="how much worse is too much (default: 10)"
    )

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

    boards = commands.add_parser(
        "dashboards",
        help="write a Grafana dashboard, alert rules and a compose file that runs them; or make a W&B workspace",
    )
    boards.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where the files go")
    boards.add_argument("--wandb", metavar="ENTITY/PROJECT", help="make a workspace in that project")

    given = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = parser.parse_known_args(given)
    if rest and options.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and given[given.index("serve") + 1].startswith("-"):
        serve.error("MODEL comes before the options")  # or the value of an unknown one is taken for it
    if options.command == "dashboards" and not (options.folder or options.wandb):
        boards.error("DIR, --wandb ENTITY/PROJECT, or both")
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
    if options.command == "dashboards":
        return _dashboards(options)
    if options.command == "report":
        from .analysis import command as report_command

        return report_command.run(
            options.run,
            step=options.step,
            as_json=options.json,
            compare_with=options.compare,
            threshold=options.threshold,
        )
    from .viewers import command as trace_command

    files = {name: getattr(options, name) for name in ("html", "chrome", "jaeger", "otlp", "svg")}
    return trace_command.run(
        options.run, step=options.step, files={k: v for k, v in files.items() if v}, follow=options.follow
    )


def _dashboards(options: argparse.Namespace) -> int:
    from .errors import MissingExtraError

    try:
        status = 0
        if options.folder:
            from .dashboards import files

            status = files.write(options.folder)
        if options.wandb and not status:
            from .dashboards import wandb

            status = wandb.save(options.wandb)
        return status
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 2


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


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a percentage of at least 0, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
