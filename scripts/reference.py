"""Writes docs/reference.md, the public names of vgen, from their docstrings: `python scripts/reference.py`."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, is_typeddict

from vgen.profiling import semconv

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
DOORS: dict[str, list[str]] = {
    "vgen": [],
    "vgen.profiling": [],
    "vgen.profiling.sinks.jsonl": ["JsonlSink"],
    "vgen.profiling.sinks.memory": ["MemorySink"],
    "vgen.profiling.sinks.mlflow": ["MlflowSink"],
    "vgen.profiling.sinks.nvtx": ["NvtxSink"],
    "vgen.profiling.sinks.otel": ["OTelSink"],
    "vgen.profiling.sinks.otel_sdk": ["Providers", "otlp_providers", "resource"],
    "vgen.profiling.sinks.prometheus": ["prometheus_provider", "prometheus_reader"],
    "vgen.profiling.sinks.torch_profiler": ["TorchProfilerSink"],
    "vgen.profiling.sinks.trackio": ["TrackioSink"],
    "vgen.profiling.sinks.wandb": ["WandbSink"],
    "vgen.weights": [],
    "vgen.checks": [],
    "vgen.integrations.trl": ["enable", "Enabled", "TRLGeneration"],
    "vgen.testing": [],
}
"""The modules that users import from, with the names that they import; by default all names in `__all__`."""
ALIASES = {"Fault": "vgen.testing.faulty_server", "SubjectFactory": "vgen.checks.subject"}
"""Type aliases among those names, with the module that defines them."""
TYPES = {
    "AddressSnapshot": "vgen.weights.source.address_snapshot",
    "Attributes": "vgen.profiling.measurement",
    "Batch": "vgen.engine_protocol",
    "CallOptions": "vgen.generation.call_plan",
    "Cancellation": "vgen.engine_protocol",
    "Convention": "vgen.profiling.semconv",
    "Engine": "vgen.engine_protocol",
    "Generated": "vgen.integrations.trl",
    "GenerationOptions": "vgen.generation.options",
    "Histogram": "vgen.profiling.aggregation",
    "HowVerified": "vgen.engine_protocol",
    "Images": "vgen.generation.call_plan",
    "InProcess": "vgen.engine_protocol",
    "InitialWeights": "vgen.generation.colocate",
    "NamedTensors": "vgen.weights.source.module_source",
    "OnCompletion": "vgen.generation.call_runner",
    "PauseMode": "vgen.engine_protocol",
    "ProbeLogprobs": "vgen.engine_protocol",
    "Prompt": "vgen.types",
    "Ranks": "vgen.distributed.ranks",
    "Refused": "vgen.generation.call_plan",
    "Request": "vgen.engine_protocol",
    "SourceAddresses": "vgen.engine_protocol",
    "SpanScope": "vgen.profiling.span_scope",
    "StepScope": "vgen.profiling.span_scope",
    "SyncTrace": "vgen.engine_protocol",
    "TensorMetadata": "vgen.engine_protocol",
    "Transport": "vgen.engine_protocol",
    "Verify": "vgen.engine_protocol",
}
"""Types that signatures name and that users do not import, with the module that defines them."""
INTRODUCTION = """# Reference

Every name that users of vgen import, by the module to import it from. `python scripts/reference.py` makes this page
from the docstrings.
"""
OTHER_TYPES = """## Types in signatures

Signatures on this page name these types too. Users do not import them.
"""


def names(door: str) -> list[str]:
    """The public names of a module."""
    return DOORS[door] or sorted(import_module(door).__all__)


class Shown(str):
    """Text that is shown as the default of a parameter."""

    def __repr__(self) -> str:
        return str(self)


def shown_default(value: Any) -> Any:
    if isinstance(value, tuple) and any(isinstance(each, semconv.Convention) for each in value):
        names = (name for each in value for name, known in vars(semconv).items() if known is each)
        return Shown(f"({', '.join(f'semconv.{name}' for name in names)},)")
    if is_dataclass(value) and not isinstance(value, type):
        return Shown(f"{type(value).__name__}()")  # all dataclasses that are defaults have their own defaults
    return Shown("...") if repr(value).startswith("<") else value


def signature(name: str, member: Any) -> str:
    if isinstance(member, type) and issubclass(member, Enum):
        return name + ": " + ", ".join(member.__members__)
    if is_typeddict(member) or getattr(member, "_is_protocol", False):
        return name
    try:
        found = inspect.signature(member)
    except (TypeError, ValueError):
        return name
    parameters = [
        each if each.default is each.empty else each.replace(default=shown_default(each.default))
        for each in found.parameters.values()
        if each.name != "self"
    ]
    # Annotations are strings, which `str` shows in quotes.
    return name + re.sub(r"(: |-> )([\"'])(.*?)\2(?=[,)=\s]|$)", r"\1\3", str(found.replace(parameters=parameters)))


def attributes(kind: type) -> Iterator[str]:
    """The fields of a class with the docstrings that follow them."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    for node, text in annotated(tree.body):
        if not ast.unparse(node.target).startswith("_"):
            yield ast.unparse(node)
            yield indented(text)


def annotated(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Each annotated name with the docstring that follows it, or with an empty text."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node, str(after.value.value) if documented else ""


def indented(text: str | None) -> str:
    return textwrap.indent(inspect.cleandoc(text or ""), "    ")


def alias(name: str, module: str) -> str:
    """The section of a type alias: what it stands for, and its docstring."""
    body = ast.parse(inspect.getsource(import_module(module))).body
    [(node, text)] = [(node, text) for node, text in annotated(body) if ast.unparse(node.target) == name]
    value = node.value.value if isinstance(node.value, ast.Constant) else ast.unparse(node.value)
    return section(name, [f"{name} = {value}", indented(text)])


def section(name: str, parts: Iterable[str]) -> str:
    return f"### {name}\n\n```text\n" + "\n".join(part for part in parts if part.strip()) + "\n```\n"


def entry(name: str, member: Any) -> str:
    """The section of one name: its signature and docstring; for a class also its fields and methods."""
    parts = [signature(name, member) if callable(member) else name]
    if inspect.isclass(member) or inspect.isfunction(member) or inspect.ismodule(member):
        parts.append(indented(member.__doc__))
    if inspect.isclass(member):
        parts += attributes(member)
        for each, value in vars(member).items():
            method = getattr(value, "__func__", value)
            if not each.startswith("_") and (isinstance(method, property) or inspect.isfunction(method)):
                parts += [signature(f".{each}", method), indented(method.__doc__)]
    return section(name, parts)


def described(name: str, member: Any, module: str | None) -> str:
    """The section of a class, function or module, or of a type alias of `module`."""
    named = inspect.isclass(member) or inspect.isfunction(member) or inspect.ismodule(member)
    return entry(name, member) if named or module is None else alias(name, module)


def page() -> str:
    sections, homes = [INTRODUCTION], dict[int, str]()
    for door in DOORS:
        sections.append(f"## {door}\n")
        for name in names(door):
            member = getattr(import_module(door), name)
            home = homes.setdefault(id(member), door)
            sections.append(
                described(name, member, ALIASES.get(name))
                if home == door
                else f"### {name}\n\nSee [{home}](#{home.replace('.', '')}).\n"
            )
    sections.append(OTHER_TYPES)
    sections += [described(name, getattr(import_module(module), name), module) for name, module in TYPES.items()]
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page())
