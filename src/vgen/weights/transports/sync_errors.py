"""A `WeightSyncError` as text, to send it from a server's worker to the trainer.

vLLM passes on nothing of a worker's error except its text, which it puts into a sentence of its own, and into an HTTP
answer. So the text has one part that a machine can read, a marker and one line of JSON:

    vgen.WeightSyncError {"problem": "…", "phase": "load", "parameter": "lm_head.weight", "receiver": "server", …}

The trainer finds it anywhere in the text. What the program does next depends on `reason`, never on the words.
"""

from __future__ import annotations

import json

from ...errors import WeightSyncError, error_to_dict

UPDATE_OPEN = "update_open"
"""An earlier weight update was never finished, for example because its trainer died."""
UNKNOWN_HANDLES = "unknown_handles"
"""The worker has no memory handles of this trainer: the server was restarted, or another trainer sent its handles."""
_MARKER = "vgen.WeightSyncError "
_PROBLEM_CHARACTERS = 1200
# The HTTP client keeps the first 2000 characters of an answer, and the JSON must be among them as a whole.


def to_text(error: WeightSyncError) -> str:
    """The error as text that `as_sync_error` reads back. A long problem is cut."""
    fields = error_to_dict(error)["fields"] | {"problem": error.problem[:_PROBLEM_CHARACTERS]}
    return _MARKER + json.dumps(fields, ensure_ascii=False)


def as_sync_error(error: Exception, *, phase: str = "transfer", receiver: str = "server") -> WeightSyncError:
    """`error` as a `WeightSyncError`: itself, the worker's error in its text, or its text as an error of `phase`.

    `receiver` names the server, because a worker does not know the server's address.
    """
    if isinstance(error, WeightSyncError):
        return error
    text = str(error) or type(error).__name__
    try:
        fields, _ = json.JSONDecoder().raw_decode(text.partition(_MARKER)[2])
        return WeightSyncError(**{**fields, "receiver": receiver})
    except (ValueError, TypeError):  # no worker's error of vgen's
        return WeightSyncError(text, phase=phase, receiver=receiver)
