"""What was said stays private, unless the user says otherwise in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True)
class ContentCapture:
    """The one switch that lets prompts, completions and exceptions' messages into telemetry.

        ProfilingContext(sinks, capture=ContentCapture(max_length=500, redact=without_emails))

    Without it none of them is recorded by any sink.
    """

    max_length: int = 1000
    """Characters kept of each text, after redaction."""
    redact: Callable[[str], str] = _as_it_is
    """Called with each text before it is cut. What it raises withholds the text and goes no further."""

    def text(self, content: str) -> str:
        """`content` as it may be recorded."""
        try:
            shown = self.redact(content)
        except Exception as error:
            return f"<withheld: redaction raised {type(error).__name__}>"
        return shown if len(shown) <= self.max_length else shown[: self.max_length] + "…"


def public_url(url: str) -> str:
    """`url` without credentials, query and fragment, which may hold keys: as it may be recorded."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
