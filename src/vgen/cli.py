"""The `vgen` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._version import __version__

EXPORTS = {
    "html": "write one HTML file that loads nothing else: zoom, search, hover",
    "chrome": "write Chrome's trace format, for Perfetto",
    "jaeger": "write Jaeger's JSON, to drop into its page",
    "otlp": "write OTLP JSON, for any OpenTelemetry collector",
    "svg": "write the picture that the terminal shows",
}
REPORT_STATUS = """Exit status: 0 for success; 1 if there is nothing to report; 2 for a wrong command line;
3 if --compare found something worse."""


CHECK_STATUS = """Exit status: 0 if every case is right; 1 if an engine has wrong weights, or refuses right ones;
2 if something could not be checked. A case is right if the log-probabilities of sampled tokens differ from the
trainer's own forward pass by no more than rounding explains."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vgen", description="The generation layer of an RL post-training loop.")
    parser.add_argument("--version", action="version", version=f"vgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_trace(commands)
    _add_report(commands)
    _add_check(commands)
    serve = _add_serve(commands)
    dashboards = _add_dashboards(commands)

    given = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = parser.parse_known_args(given)
    if options.command == "serve":
        options.arguments = rest
        if rest and given[given.index("serve") + 1].startswith("-"):
            # argparse does not know which of vLLM's options take a value, and would take such a value for MODEL.
            serve.error("MODEL comes before the options")
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "dashboards" and not (options.directory or options.wandb):
        dashboards.error("give DIR, --wandb ENTITY/PROJECT, or both")
    try:
        return _run(options)
    except BrokenPipeError:  # whatever reads standard output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _add_demo(commands: Any) -> None:
    add = commands.add_parser("demo", help="run a small RL loop on real vLLM and show where its time went").add_argument
    add("--steps", type=_positive, default=3, metavar="N", help="training steps (default: 3)")
    add("--out", type=Path, metavar="DIR", help="directory for the recorded run (default: runs/demo-<time>)")
    add("--model", type=Path, metavar="DIR", help="model directory (default: make a tiny Qwen2)")
    add("--json", dest="as_json", action="store_true", help="print one JSON object and nothing else")


def _add_trace(commands: Any) -> None:
    add = commands.add_parser("trace", help="show a trace of a recorded run, or write it to files").add_argument
    add("run", type=Path, metavar="RUN", help="directory of a recorded run, or one of its .jsonl files")
    add("--step", type=int, metavar="N", help="training step to show (default: the last trace)")
    for name, text in EXPORTS.items():
        add(f"--{name}", type=Path, metavar="FILE", help=text)
    add("--follow", action="store_true", help="show the run while it is being recorded")


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="show where a recorded run's time went", epilog=REPORT_STATUS)
    add = report.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a recorded run, or one of its .jsonl files")
    add("--step", type=int, metavar="N", help="report on this training step, and say why it took that long")
    add("--json", dest="as_json", action="store_true", help="print one JSON object and nothing else")
    add("--compare", dest="compare_with", type=Path, metavar="OTHER", help="run, or report's JSON, to compare with")
    add("--threshold", type=_percent, default=10.0, metavar="PCT", help="percent worse that is too much (default: 10)")


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="prove that an engine has the trainer's weights after syncs, sleeps and more",
        epilog=CHECK_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = check.add_argument
    add(
        "model", nargs="?", metavar="MODEL", help="folder, hub name, or an architecture (llama, qwen3_moe) to make tiny"
    )
    add("--server", metavar="URL", help="check this vLLM server instead of an engine in this process")
    add("--yes", action="store_true", help="overwrite the server's weights; at the end it has MODEL's")
    add("--adapter", metavar="MODULE:FUNCTION", help="check another project's weight sync: what makes its subject")
    for name in ("api", "control"):
        key = check.add_mutually_exclusive_group()
        key.add_argument(f"--{name}-key", metavar="KEY", help=f"the server's {name} key")
        key.add_argument(f"--{name}-key-file", type=Path, metavar="FILE", help="file that holds this key")
    add("--case", dest="cases", action="append", default=[], metavar="NAME", help="run this case; may be repeated")
    add("--list", dest="list_cases", action="store_true", help="list the cases and run none")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the trainer's model")
    add("--device", metavar="DEVICE", help="of the trainer's model (default: cuda where there is one)")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="for each case (default: 300)")
    add("--json", dest="as_json", action="store_true", help="print one JSON object and nothing else")
    add("--matrix", type=Path, metavar="FILE", help="check every architecture instead; FILE gets the result as JSON")
    add("--only", action="append", default=[], metavar="ARCHITECTURE", help="of the matrix; may be repeated")


def _add_serve(commands: Any) -> argparse.ArgumentParser:
    serve = commands.add_parser(
        "serve",
        help="start a vLLM server with vgen's plugin",
        usage="vgen serve MODEL [OPTION ...] [VLLM OPTION ...]",
        description="vLLM gets all options that are not listed here, unchanged.",
        allow_abbrev=False,
    )
    add = serve.add_argument
    add("model", metavar="MODEL", help="model directory, or name on the Hugging Face hub")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    maps = "the one directory to map weights from"
    add("--shared-memory-dir", dest="shared_memory_directory", metavar="DIR", help=maps)
    for name, routes in (("api", "inference"), ("control", "all other routes: weights, pause, sleep and more")):
        key = serve.add_mutually_exclusive_group()
        key.add_argument(f"--{name}-key", metavar="KEY", help=f"key for {routes}; `ps` shows it to every user")
        key.add_argument(f"--{name}-key-file", type=Path, metavar="FILE", help="file that holds this key")
    add("--tensor-parallel-size", "-tp", type=_positive, default=1, metavar="N")
    add("--data-parallel-size", "-dp", type=_positive, default=1, metavar="N")
    add("--otlp-traces-endpoint", metavar="URL", help="OTLP collector that receives the server's spans")
    add("--startup-timeout", type=float, default=600.0, metavar="SECONDS", help="time to become healthy (default: 600)")
    add("--quiet", action="store_true", help="do not copy the server's log to standard error")
    add("--json", dest="as_json", action="store_true", help="print one JSON object: URL, control key's file and more")
    return serve


def _add_dashboards(commands: Any) -> argparse.ArgumentParser:
    text = "write a Grafana dashboard, alert rules and a compose file that runs them, or create a W&B workspace"
    dashboards = commands.add_parser("dashboards", help=text)
    dashboards.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="directory for the files")
    dashboards.add_argument("--wandb", metavar="ENTITY/PROJECT", help="W&B project in which to create the workspace")
    return dashboards


def _run(options: argparse.Namespace) -> int:
    # A command imports its module only now, so that `vgen --help` loads the standard library alone.
    settings = vars(options).copy()
    if options.command in ("demo", "trace", "report"):
        _replace_unencodable()
    match settings.pop("command"):
        case "demo":
            from . import demo

            return demo.run(**settings)
        case "check":
            return _check(settings)
        case "serve":
            return _serve(settings)
        case "dashboards":
            return _dashboards(**settings)
        case "report":
            from .recordings.report import command as report

            return report.run(settings.pop("run"), **settings)
    from .recordings.export import command as trace

    files = {name: file for name in EXPORTS if (file := settings[name])}
    return trace.run(options.run, step=options.step, files=files, follow=options.follow)


def _replace_unencodable() -> None:
    """Let a terminal with a small character set, such as ASCII, show `?` for what it cannot show."""
    stdout: Any = sys.stdout
    if getattr(stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="replace")


def _dashboards(directory: Path | None, wandb: str | None) -> int:
    from .errors import MissingExtraError

    try:
        if directory:
            from .dashboards.files import write

            if status := write(directory):
                return status
        if wandb:
            from .dashboards.wandb import save

            return save(wandb)
        return 0
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 2


def _check(settings: dict[str, Any]) -> int:
    if not _read_keys("check", settings):
        return 2
    if (matrix := settings.pop("matrix")) is not None:
        from .checks.matrix import run as run_matrix

        try:
            return run_matrix(matrix, settings["only"])
        except (Exception, KeyboardInterrupt) as error:
            print(f"vgen check: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
    settings.pop("only")
    from .checks import command as check

    return check.run(settings.pop("model"), **settings)


def _read_keys(command: str, settings: dict[str, Any]) -> bool:
    """Replace the options of key files by their content. False, and a line on standard error, if one is unreadable."""
    from .engines.server.command import key as read

    try:
        for key in ("api_key", "control_key"):
            settings[key] = read(settings[key], settings.pop(f"{key}_file"))
    except OSError as error:
        print(f"vgen {command}: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return False
    return True


def _serve(settings: dict[str, Any]) -> int:
    if not _read_keys("serve", settings):
        return 2
    from .engines.server import command as serve

    return serve.run(settings.pop("model"), **settings)


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
