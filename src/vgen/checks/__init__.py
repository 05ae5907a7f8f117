"""`vgen check`: whether an engine has the trainer's weights after syncs, sleeps and whatever else happens to it.

Users import from here. `docs/check.md` shows how another project checks its own weight sync.
"""

from __future__ import annotations

from ..errors import CheckError
from .architectures import tiny_model
from .oracle import Measurement, Oracle
from .session import Case, Outcome, Session, WrongWeights
from .subject import Sampled, SleepingSubject, SubjectFactory, WeightSyncSubject
from .sync_cases import SYNC_CASES

__all__ = [
    "SYNC_CASES",
    "Case",
    "CheckError",
    "Measurement",
    "Oracle",
    "Outcome",
    "Sampled",
    "Session",
    "SleepingSubject",
    "SubjectFactory",
    "WeightSyncSubject",
    "WrongWeights",
    "tiny_model",
]
