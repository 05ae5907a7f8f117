"""Asks PyPI for known vulnerabilities of what is installed here, by pip-audit: exit status 1 if there are any.

Where PyPI's advisories are not to be had, or do not come within a minute, it says so in one line and passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

PROBE = "https://pypi.org/pypi/pip/24.0/json"
PROBE_SECONDS, SECONDS = 5, 60
ACCEPTED: dict[str, str] = {
    # Advisories that do not concern vgen, or that no release mends, with the reason: "PYSEC-2026-1": "...".
}


def reachable() -> bool:
    """Whether PyPI answers here with advisories; mirrors often leave them out."""
    try:
        with urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS) as answer:
            return bool(json.load(answer)["vulnerabilities"])  # that release has some
    except (OSError, ValueError, KeyError, TypeError):
        return False


def report() -> dict[str, Any] | None:
    """What pip-audit says, or None if it did not come to an end."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--local"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None


def verdict(found: Mapping[str, Any], accepted: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """A line for each vulnerability that is not accepted, and the accepted advisories that concern nothing any more."""
    lines, seen = [], set[str]()
    for package in found["dependencies"]:
        for advisory in package.get("vulns", ()):
            names = {advisory["id"], *advisory.get("aliases", ())}
            seen |= names
            if not names & accepted.keys():
                mended = ", ".join(advisory.get("fix_versions", ())) or "no release"
                lines.append(f"{package['name']} {package['version']}: {advisory['id']}, mended by {mended}")
    return lines, sorted(accepted.keys() - seen)


def main() -> int:
    found = report() if reachable() else None
    audited = [package for package in found["dependencies"] if "skip_reason" not in package] if found else []
    if found is None or not audited:
        print("audit: PyPI's advisories are not to be had here; nothing was audited")
        return 0
    lines, obsolete = verdict(found, ACCEPTED)
    for line in lines:
        print(f"audit: {line}")
    for name in obsolete:
        print(f"audit: {name} concerns nothing that is installed: take it from ACCEPTED in scripts/audit.py")
    if not lines:
        print(f"audit: {len(audited)} packages have no known vulnerability")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
