"""What the audits of an engine's loader say about a weight sync, as attributes of its span."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..profiling import semconv


def joined(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several `LoadAudit.report`s as one. An empty report is of an unknown load."""
    reports = list(reports)
    reasons = dict.fromkeys(report.get("unaudited", "the server does not report it") for report in reports)
    narrowed = {name for report in reports for name in report.get("narrowed", ())}
    return {"unaudited": "; ".join(filter(None, reasons)), "narrowed": sorted(narrowed)}


def audit_attributes(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several `LoadAudit.report`s say, as attributes of a sync."""
    report = joined(reports)
    reason = report["unaudited"]
    outcome = "unaudited" if reason else "passed"
    return {
        semconv.AUDIT: outcome,
        semconv.AUDIT_REASON: reason or None,
        semconv.AUDIT_NARROWED: report["narrowed"] or None,
    }
