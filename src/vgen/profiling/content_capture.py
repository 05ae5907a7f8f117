"""Whether prompts, completions and exception messages may be recorded. The default is no; this is the only switch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit


@dataclass(frozen=True, slots=True)
class ContentCapture:
    """Allows prompts, completions and exception messages in telemetry. Without it no sink records any of them.

    ProfilingContext(sinks, capture=ContentCapture(max_length=500, redact=without_emails))
    """

    max_length: int = 1000
    """Characters to keep of each text, after redaction."""
    redact: Callable[[str], str] = str
    """Called with each text before it is cut. If it raises, the text is withheld and the exception is ignored."""

    def text(self, content: str) -> str:
        """Return `content` in the form in which it may be recorded."""
        try:
            redacted = self.redact(content)
        except Exception as error:
            return f"<withheld: redaction raised {type(error).__name__}>"
        return redacted if len(redacted) <= self.max_length else redacted[: self.max_length] + "…"


def public_url(url: str) -> str:
    """Return `url` in the form in which it may be recorded: without credentials, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
