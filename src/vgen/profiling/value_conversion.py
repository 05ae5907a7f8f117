"""Converts values of any type to the types that telemetry can hold.

No function here raises an `Exception`, and none waits for a device.
"""

from __future__ import annotations

import json
import logging
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from .measurement import Instrument

logger = logging.getLogger("vgen.telemetry")

_PLAIN = frozenset({str, bool, int, float})
_LISTS = frozenset({list, tuple})
_CONTAINERS: tuple[Any, ...] = (Mapping, Set, Sequence)
_LARGEST = float.fromhex("0x1.fffffffffffffp+1023")
_reported_types: set[str] = set()


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Convert attribute values that telemetry cannot hold to strings, and leave out those that are None."""
    for key, value in attributes.items():
        if type(value) not in _PLAIN or type(key) is not str:
            return {_plain_key(k): _plain_value(k, v) for k, v in attributes.items() if v is not None}
    return attributes if type(attributes) is dict else dict(attributes)  # pyright: ignore[reportUnknownVariableType]


def numeric(instrument: Instrument, values: Iterable[Any]) -> Sequence[float]:
    """Convert `values` to ints and floats within the range of a float. A value that is not a number becomes NaN."""
    numbers_only = tuple(values)
    if set(map(type, numbers_only)) <= {float}:
        return numbers_only
    return tuple([value if type(value) is float else _number(instrument.name, value) for value in numbers_only])


def as_text(value: Any) -> str:
    """Convert any value to a string."""
    try:
        if isinstance(value, _CONTAINERS):
            return json.dumps(value)  # `str` would print the content of tensors in the container; JSON refuses them
        if not hasattr(value, "device"):  # the `str` of a tensor waits for its device and prints its content
            return str(value)
    except Exception:
        pass
    return f"<{type(value).__name__}>"


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, numbers.Integral):
            whole = int(value)
            return whole if -_LARGEST <= whole <= _LARGEST else float("inf") if whole > 0 else float("-inf")
        if not hasattr(value, "device") or isinstance(value, numbers.Real):  # `float(tensor)` waits for its device
            return float(value)
    except Exception:
        pass
    _report_once(name, value, "is not a number and is recorded as NaN")
    return float("nan")


def _plain_key(key: object) -> str:
    return str.__str__(key) if isinstance(key, str) else as_text(key)


def _plain_value(key: object, value: Any) -> Any:
    if type(value) in _LISTS:
        return value if _PLAIN.issuperset(map(type, value)) else [_plain_item(key, item) for item in value]
    return _plain_item(key, value)


def _plain_item(key: object, value: Any) -> Any:
    if type(value) in _PLAIN or value is None:
        return value
    try:
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, numbers.Integral):  # includes NumPy's integers
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        if type(value).__name__ in ("bool", "bool_"):  # NumPy's booleans are not `Integral`
            return bool(value)
    except Exception:
        pass
    _report_once(key, value, "is not a type for telemetry and is recorded as a string")
    return as_text(value)


def _report_once(name: object, value: Any, problem: str) -> None:
    """Log the problem once for each type. Not as a warning: the user may turn warnings into exceptions."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind not in _reported_types:
        _reported_types.add(kind)
        logger.warning("vgen: a value of type %s (first for %r) %s; this is reported once", kind, name, problem)
