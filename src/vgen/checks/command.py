"""`vgen check`: run cases on vgen's engine in this process, on a server, or on another project's weight sync."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .._output import output_redirected
from ..errors import CheckError, VgenError
from .session import Case, Outcome, Session

COULD_NOT_CHECK = 2
"""The exit status."""
PRETRAINED_STRENGTH = 0.15
"""How much of the weights of a real checkpoint a training step replaces: they should stay weights of usual size."""


def run(
    model: str | None,
    *,
    server: str | None = None,
    adapter: str | None = None,
    yes: bool = False,
    api_key: str | None = None,
    control_key: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    cases: Sequence[str] = (),
    list_cases: bool = False,
    as_json: bool = False,
    timeout: float = 300.0,
) -> int:
    """Run the command. Returns the exit status: 0 all right, 1 a wrong engine, 2 it could not be checked."""
    try:
        if list_cases:
            return _list(as_json)
        if timeout <= 0:
            raise CheckError(f"--timeout must be above 0, got {timeout:g}")
        if model is None:
            raise CheckError("name a MODEL: a folder, a hub name, or an architecture such as llama")
        if server and adapter:
            raise CheckError("--server and --adapter exclude each other: an adapter says itself where its engine is")
        if server and dtype:
            raise CheckError(
                "--dtype and --server exclude each other: the server's weights are put back as MODEL has them"
            )
        chosen = _chosen(cases)
        with tempfile.TemporaryDirectory(prefix="vgen-check-") as folder:
            log = Path(folder, "engine.log")
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            with output_redirected(log) as (terminal, _):
                trainer, tiny = _model(model, dtype, device)
                keys = api_key, control_key
                before = _before(model, trainer, server, api_key, timeout, yes) if server else None
                make, abilities = _factory(server, adapter, keys, timeout)
                target = _Target(model, trainer, tiny, server, adapter, before)
                return _check(target, make, abilities, chosen, as_json, timeout, terminal)
    except KeyboardInterrupt:
        print("vgen check: interrupted", file=sys.stderr, flush=True)
        return COULD_NOT_CHECK
    except Exception as error:
        what = str(error) if isinstance(error, VgenError) else f"{type(error).__name__}: {error}"
        print(f"vgen check: {what}".replace("\n", " "), file=sys.stderr, flush=True)
        return COULD_NOT_CHECK


@dataclass(frozen=True, slots=True)
class _Target:
    """What is checked: MODEL's name, the model and whether it was made on the spot, and where its engine is."""

    name: str
    model: Any
    tiny: bool
    server: str | None
    adapter: str | None
    before: _Before | None


@dataclass(frozen=True, slots=True)
class _Before:
    """The weights that a server has before the check."""

    models: bool | None
    """Whether they are MODEL's; None if that is unknown."""
    notice: str
    """What the check does to them."""


def _before(name: str, model: Any, server: str, api_key: str | None, timeout: float, yes: bool) -> _Before:
    """Compare a server's weights with the model's, before they are overwritten. Raises `CheckError` without `yes`."""
    from .vgen_subjects import held_by_server

    try:
        found = held_by_server(server, model, api_key=api_key, timeout=timeout)
    except VgenError as error:
        models, seen = None, f"whether {server} has the weights of {name} is unknown ({error})"
    else:
        models, seen = found.right, f"{server} has the weights of {name}"
        if not models:
            times = f"{found.ratio:.3g} times the rounding noise, where {found.bound:g} is allowed"
            seen = f"{server} has other weights than {name} (log-probabilities differ by {times})"
    notice = f"{seen}: the check overwrites them, and puts those of {name} there at its end"
    notice += "" if models else "; the present ones will be lost"
    if not yes:
        raise CheckError(f"{notice}: say --yes to go on, and stop other trainers and clients of that server first")
    return _Before(models, notice)


def _check(
    target: _Target,
    make: Any,
    abilities: frozenset[str],
    chosen: Sequence[Case],
    as_json: bool,
    timeout: float,
    terminal: IO[str],
) -> int:
    from . import report

    model, tiny, server, before = target.model, target.tiny, target.server, target.before
    if before is not None and not as_json:
        print(before.notice + "\n", file=terminal, flush=True)
    if tiny and not server:
        abilities |= {"more engines"}
    if tiny and not server and not target.adapter:
        abilities |= {"other architectures"}
    session = Session(model, make, strength=0.6 if tiny else PRETRAINED_STRENGTH, abilities=abilities, timeout=timeout)
    outcomes: list[Outcome] = []
    ended = _run(session, chosen, outcomes, None if as_json else terminal)
    left = _end(session, target)
    status = COULD_NOT_CHECK if ended else report.exit_code(outcomes)
    facts = {"model": target.name, "dtype": str(next(model.parameters()).dtype)}
    facts |= {"server": server, "adapter": target.adapter}
    if as_json:
        facts |= {"before": before.notice if before else None}
        facts |= {"error": ended or None, "left": left, "exit_code": status}
        print(json.dumps(report.as_json(facts, outcomes)), file=terminal, flush=True)
    else:
        parts = [report.summary(outcomes), report.advice(outcomes), f"vgen check: {ended}" if ended else "", left]
        print("\n" + "\n\n".join(part for part in parts if part), file=terminal, flush=True)
    if session.stuck:  # a thread that never returns would keep the process alive
        for process in multiprocessing.active_children():
            process.terminate()
        os._exit(status)
    return status


def _run(session: Session, chosen: Sequence[Case], outcomes: list[Outcome], shown: IO[str] | None) -> str:
    """Run the cases, and show each outcome. Returns why that ended early, or nothing."""
    from . import report

    try:
        for case in chosen:
            outcome = session.run(case)
            outcomes.append(outcome)
            if shown is not None:
                print(report.line(outcome), file=shown, flush=True)
    except KeyboardInterrupt:
        return "interrupted"
    except Exception as error:
        return str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
    return ""


def _end(session: Session, target: _Target) -> str:
    """Put the model's weights on a server, and close everything. Returns what was left behind, or what was put back."""
    left: list[str] = []
    server = target.server
    if server and target.before and session.started:
        try:
            session.restore()
            there = f"{server} has the weights of {target.name}"
            lost = "those that it had before, which were others, are lost"
            lost = lost if target.before.models is False else "whether it had them before is unknown"
            left.append(f"{there} again" if target.before.models else f"{there} now; {lost}")
        except (Exception, KeyboardInterrupt) as error:
            reason = str(error) or type(error).__name__
            left.append(
                f"{server} IS LEFT WITH WEIGHTS OF THE CHECK: {reason}; restart it, or sync it before it is used"
            )
    try:
        session.close()
    except (Exception, KeyboardInterrupt) as error:
        left.append(f"the engine could not be closed: {str(error) or type(error).__name__}")
    return "\n".join(left)


def _model(name: str, dtype: str | None, device: str | None) -> tuple[Any, bool]:
    """The trainer's model, and whether it was made on the spot."""
    import torch
    import transformers

    from .architectures import architectures, tiny_model

    transformers.logging.set_verbosity_error()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if Path(name, "config.json").is_file() or (name not in architectures() and _is_hub_name(name)):
        try:
            wanted = dtype or ("float32" if device == "cpu" else "auto")
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckError(f"the model {name} cannot be loaded: {reason}") from error
        return model.eval().to(device), False
    model: Any = tiny_model(name, seed=1)
    return model.to(device=device, dtype=getattr(torch, dtype or "float32")), True


def _is_hub_name(name: str) -> bool:
    """Whether it has the form of a hub name with an organization, or is one that was downloaded before."""
    if "/" in name:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _factory(
    server: str | None, adapter: str | None, keys: tuple[str | None, str | None], timeout: float
) -> tuple[Any, frozenset[str]]:
    if adapter is not None:
        return _adapter(adapter), frozenset()
    from . import vgen_subjects

    if server is not None:
        make = vgen_subjects.server(server, api_key=keys[0], control_key=keys[1], timeout=timeout)
        return make, frozenset({"vgen", "server"})
    return vgen_subjects.colocate, frozenset({"vgen", "in process", "sleep mode"})


def _adapter(name: str) -> Any:
    """The factory that `MODULE:FUNCTION` names."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        raise CheckError(f"--adapter {name}: {said}; give MODULE:FUNCTION, which makes a subject") from error


def all_cases() -> list[Case]:
    """The portable cases, those about vgen's own engines, and those of other architectures."""
    from .engine_cases import ENGINE_CASES
    from .sync_cases import SYNC_CASES
    from .vgen_cases import VGEN_CASES

    return [*SYNC_CASES, *VGEN_CASES, *ENGINE_CASES]


def _chosen(names: Sequence[str]) -> list[Case]:
    cases = all_cases()
    known = {case.name: case for case in cases}
    if unknown := [name for name in names if name not in known]:
        raise CheckError(f"there is no case {unknown[0]!r}: vgen check --list shows all")
    return [known[name] for name in names] if names else cases


def _list(as_json: bool) -> int:
    cases = all_cases()
    if as_json:
        print(json.dumps([{"name": c.name, "summary": c.summary, "needs": sorted(c.needs)} for c in cases]))
        return 0
    for case in cases:
        needs = f"  [{', '.join(sorted(case.needs))}]" if case.needs else ""
        print(f"{case.name}{needs}\n    {case.summary}")
    print(f"{len(cases)} cases")
    return 0
