"""The keys of a run's history that a W&B workspace shows."""

from __future__ import annotations

from typing import Any

from vgen.profiling.key_figures import log_key as key


def keys(workspace: Any) -> set[str]:
    """Return every key that the workspace shows, read from the data that would be sent to W&B."""
    return set(_keys(workspace._spec))  # the workspace has no public way to be serialized


def _keys(spec: Any) -> list[str]:
    if isinstance(spec, dict | list):
        values = spec.values() if isinstance(spec, dict) else spec
        return [shown for value in values for shown in _keys(value)]
    return [spec] if isinstance(spec, str) and spec.startswith(key("")) else []
