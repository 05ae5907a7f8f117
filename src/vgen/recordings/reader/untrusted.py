"""What a recorded run may hold, made safe to print and to export.

Whoever wrote the files chose every name, key and value in them. `Process.parse` and `Process.take_header` pass all of
it through here, so no printer and no exporter has to look again.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST_NESTED = 3
"""Levels of lists and dicts within an attribute. What lies deeper becomes the text `<list>` or `<dict>`."""
LIMIT = 1 << 63
"""Integers outside of 64 bits become text."""

_ACTS_ON_THE_READER = re.compile(
    r"[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: they move the cursor, set colors, or end a line
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they change the direction of the text around them
    r"\ud800-\udfff\ufffe\uffff]"  # surrogates cannot be encoded, and XML allows none of these
)
_SAFE = frozenset({bool, type(None)})
_UNSEEN = frozenset({"values"})
"""Keys of a record whose values nothing prints. The values of a measurement are many; `Recording` checks them."""


def text(value: str) -> str:
    r"""`value` with each character that acts on a terminal or breaks a file as a visible escape, such as `\x1b`."""
    return value if value.isprintable() else _ACTS_ON_THE_READER.sub(_escape, value)


def clean(record: dict[str, Any]) -> dict[str, Any]:
    """The record, safe to print: its strings and keys are `text`, its numbers are finite and of 64 bits."""
    if _is_clean(record):
        return record
    cleaned = {
        text(key): value if key in _UNSEEN else cleaned_value(value, MOST_NESTED + 1) for key, value in record.items()
    }
    if "events" in cleaned:
        cleaned["events"] = _events(record["events"])
    if "links" in cleaned:
        cleaned["links"] = cleaned_value(record["links"], MOST_NESTED + 3)
    if cleaned.get("error") is not None:
        cleaned["error"] = _as_text(cleaned["error"])
    return cleaned


def cleaned_value(value: Any, nested: int) -> Any:
    """`value`, safe to print, with at most `nested` levels of lists and dicts."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, int):
        if -LIMIT <= value < LIMIT:
            return value
        return str(value) if value.bit_length() <= 1024 else f"<int of {value.bit_length()} bits>"
    if isinstance(value, list | dict) and not nested:
        return f"<{type(value).__name__}>"  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, list):
        return [cleaned_value(item, nested - 1) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {text(key): cleaned_value(item, nested - 1) for key, item in value.items()}  # pyright: ignore
    return value


def _is_clean(record: dict[str, Any]) -> bool:
    """Whether the record needs no change, found out quickly. Most records do not."""
    attributes = record.get("attributes")
    keys = "".join(record)
    values: list[Any] = [value for key, value in record.items() if key != "attributes" and key not in _UNSEEN]
    if type(attributes) is dict:
        keys += "".join(attributes)
        values += attributes.values()
    for value in values:
        kind = type(value)
        if kind is str:
            if not value.isprintable():
                return False
        elif kind is int:
            if not -LIMIT <= value < LIMIT:
                return False
        elif kind not in _SAFE and (kind is not float or not math.isfinite(value)):
            return False
    return keys.isprintable() and type(record.get("error")) in (str, type(None))


def _events(events: Any) -> Any:
    """The events of a span. Their attributes hold no lists and dicts: those become JSON text."""
    if not isinstance(events, list):
        return []
    cleaned = [cleaned_value(event, MOST_NESTED + 2) for event in events if isinstance(event, dict)]  # pyright: ignore
    for event in cleaned:
        attributes = event.get("attributes")
        if isinstance(attributes, dict):
            event["attributes"] = {
                key: _as_text(value) if isinstance(value, list | dict) else value
                for key, value in attributes.items()  # pyright: ignore[reportUnknownVariableType]
            }
    return cleaned


def _as_text(value: Any) -> str:
    """A value that is clean already, as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
