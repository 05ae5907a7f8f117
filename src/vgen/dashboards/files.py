"""All files of `vgen dashboards DIR`, and the code that writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from . import stack
from .alerts import rules
from .grafana import UID, dashboard_json

try:
    import yaml
except ImportError as error:
    raise MissingExtraError("vgen dashboards", "PyYAML", "dashboards") from error

HEAD = "# Made by `vgen dashboards`.\n"


def files() -> dict[str, str]:
    """The text of each file, by its path relative to the folder."""
    provisioning = "grafana/provisioning/"
    return {
        stack.COMPOSE: _yaml(stack.compose()),
        stack.COLLECTOR: _yaml(stack.collector()),
        stack.SCRAPES: _yaml(stack.scrapes()),
        "prometheus/" + stack.RULES: _yaml(rules()),
        "prometheus/" + stack.VLLM_TARGETS: _yaml(stack.vllm_targets()),
        provisioning + stack.SOURCES: _yaml(stack.data_sources()),
        provisioning + stack.PROVIDERS: _yaml(stack.dashboard_providers()),
        f"grafana/dashboards/{UID}.json": dashboard_json(),
    }


def write(folder: Path) -> int:
    """Write all files into `folder` and print their paths. Returns the exit status."""
    try:
        for name, text in files().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path)
    except OSError as error:
        print(f"vgen dashboards: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _yaml(content: Any) -> str:
    return HEAD + yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)
