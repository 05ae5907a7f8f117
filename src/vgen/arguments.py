"""What callers pass: checked and normalized in one place, before anything reaches an engine.

vLLM checks few types of its parameters. A value of another type gets through to the engine's core, which fails to
decode it and ends. So integers are what `operator.index` accepts (NumPy's and torch's too), numbers are finite, and
flags are bools. Each error is an `ArgumentError` that names the argument and what to pass instead.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from .errors import ArgumentError

INT32, INT63 = 2**31 - 1, 2**63 - 1
"""The largest values that vLLM's kernels and its message format take."""
P = ParamSpec("P")
R = TypeVar("R")

RIGHT_NAMES: Mapping[str, str] = {
    "n": "pass num_generations to generate()",
    "num_return_sequences": "pass num_generations to generate()",
    "num_generations": "pass num_generations to generate()",
    "max_new_tokens": "it is named max_tokens",
    "max_completion_length": "it is named max_tokens",
    "max_length": "pass max_tokens, which does not count the prompt",
    "do_sample": "temperature=0 is greedy, any other samples",
    "stop_strings": "it is named stop",
    "eos_token_id": "it is named stop_token_ids",
    "guided_decoding": "it is named structured_outputs",
    "random_seed": "it is named seed",
    "sampling_params": "it is named sampling",
    "generation_config": "pass a vgen.Sampling as sampling",
    "messages": "pass conversations to chat()",
    "tokenizer": "it is named processing_class",
    "processor": "it is named processing_class",
    "profiler": "it is named profiling",
    "base_url": "it is named base_urls",
    "host": "pass base_urls=['http://host:port']",
    "max_model_len": "it is named max_model_length",
    **dict.fromkeys(("temperature", "top_p", "top_k", "max_tokens", "stop", "seed"), "pass sampling=Sampling(...)"),
}
"""What to do instead, by names that other libraries have for arguments."""


def shown(value: Any) -> str:
    """A value as an error message shows it: short, and with its type where that is the mistake."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def integer(argument: str, value: Any, *, least: int = 0, most: int = INT32, rule: str = "") -> int:
    """`value` as an `int` from `least` to `most`. `rule` describes what is right, if that is not plain."""
    if type(value) is int and least <= value <= most:
        return value
    rule = rule or f"an integer of at least {least}"
    if isinstance(value, bool):
        raise ArgumentError(argument, f"must be {rule}, got {value}")
    try:
        found = operator.index(value)
    except TypeError:
        whole = isinstance(value, float) and value.is_integer()
        fix = f": pass {int(value)}" if whole else ""
        raise ArgumentError(argument, f"must be {rule}, got {shown(value)}{fix}") from None
    if not least <= found <= most:
        limit = f", and at most {most}" if found > most else ""
        raise ArgumentError(argument, f"must be {rule}{limit}, got {found}")
    return found


def number(argument: str, value: Any, valid: Callable[[float], bool], rule: str) -> float:
    """`value` as a finite `float` for which `valid` is true."""
    if type(value) is float and valid(value) and math.isfinite(value):
        return value
    if isinstance(value, bool | str | bytes):
        raise ArgumentError(argument, f"must be {rule}, got {shown(value)}")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ArgumentError(argument, f"must be {rule}, got {shown(value)}") from None
    if not math.isfinite(found) or not valid(found):
        raise ArgumentError(argument, f"must be {rule}, got {found}")
    return found


def flag(argument: str, value: Any) -> bool:
    """`value` as a `bool`; NumPy's are accepted."""
    if isinstance(value, bool):
        return value
    if (type(value).__module__, type(value).__name__) in (("numpy", "bool"), ("numpy", "bool_")):
        return bool(value)
    raise ArgumentError(argument, f"must be True or False, got {shown(value)}")


def text(argument: str, value: Any, rule: str = "text") -> str:
    """`value` as a `str` that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ArgumentError(argument, f"must be {rule}, got {shown(value)}")
    if not encodable(value):
        raise ArgumentError(argument, f"must be {rule}: it holds half of a surrogate pair, which is no character")
    return value


def encodable(value: str) -> bool:
    """Whether text can be written as UTF-8: halves of surrogate pairs cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts(argument: str, value: Any) -> tuple[str, ...]:
    """One or several strings, none of them empty, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    rule = "text that is not empty, or several such texts"
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes | bytearray):
        raise ArgumentError(argument, f"must be {rule}, got {shown(value)}")
    found = tuple(text(argument, each, rule) for each in value)
    if "" in found:
        raise ArgumentError(argument, f"must be {rule}, got ''")
    return found


def integers(argument: str, value: Any) -> tuple[int, ...]:
    """One or several integers of at least 0, as a tuple."""
    if value is None:
        return ()
    if hasattr(value, "tolist"):  # an array or a tensor
        value = value.tolist()
    if isinstance(value, int):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, Mapping | str | bytes | bytearray):
        raise ArgumentError(argument, f"must be token ids, got {shown(value)}")
    return tuple(integer(argument, each, rule="token ids: integers of at least 0") for each in value)


def mapping(argument: str, value: Any) -> dict[str, Any]:
    """A mapping with text for keys, as a dict of its own."""
    if not isinstance(value, Mapping):
        raise ArgumentError(argument, f"must be a mapping, got {shown(value)}")
    return {text(argument, key, "a mapping with names for keys"): each for key, each in value.items()}


def one_of(argument: str, value: Any, choices: tuple[str, ...]) -> Any:
    """`value`, if it is one of these."""
    if not isinstance(value, str) or value not in choices:
        wanted = " or ".join(repr(choice) for choice in choices)
        raise ArgumentError(argument, f"must be {wanted}, got {shown(value)}")
    return value


def refuse_unknown(call: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise `ArgumentError` for the first keyword that `call` does not have, and say what to pass instead."""
    for name in given:
        if name not in known:
            fix = RIGHT_NAMES.get(name) or f"it takes {', '.join(sorted(known))}"
            raise ArgumentError(f"{call}({name}=)", f"is not an argument: {fix}")


def checked_call(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise `ArgumentError` where Python's `TypeError` would not say what to pass instead."""
    parameters = [*inspect.signature(function).parameters.values()]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"self"}
    further = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = {p.name for p in parameters if p.default is p.empty and p.name in keywords}
    call = function.__qualname__.removesuffix(".__init__").rpartition("Generation.")[2] or function.__qualname__

    def refuse(args: tuple[Any, ...], given: Collection[str]) -> None:
        if len(args) > len(positional):
            names = ", ".join(sorted(keywords - {*positional}))
            kind = type(args[len(positional)]).__name__
            raise ArgumentError(call, f"takes no further argument by its place, got a {kind}: name it ({names})")
        if not further:
            refuse_unknown(call, given, keywords)
        placed = {*positional[: len(args)]}
        if missing := required - {*given} - placed:
            raise ArgumentError(call, f"needs {', '.join(sorted(missing))}")
        if twice := placed.intersection(given):
            raise ArgumentError(call, f"got {min(twice)} twice")

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            # Checked only now, so that a right call costs nothing. A wrong one has not begun: Python refused it.
            try:
                refuse(args, kwargs)
            except ArgumentError as wrong:
                raise wrong from None
            raise

    return checked
