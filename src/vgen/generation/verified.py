"""The end-to-end check of a weight sync, as one of its phases."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from ..engines.base import Engine, Source, SyncTrace
from ..errors import WeightSyncError
from ..profiling import names

Verify: TypeAlias = Literal["bits", "logprobs", "none"]
"""How a sync is verified: every bit where both sides can be read, by log-probabilities, or not at all."""

_log = logging.getLogger(__name__)


def verified(engine: Engine, source: Source, trace: SyncTrace, awake: bool, asked: bool) -> bool:
    """Compare log-probabilities of the engine and the source's model; returns whether that could be done.

    Where it could not, the log and the span say why; where it was `asked` for, `WeightSyncError` does.
    """
    from ..weights.probe import CannotProbe, verify_logprobs
    from ..weights.recorded import model_of

    with trace.phase("verify") as span:
        try:
            if (model := model_of(source)) is None:
                raise CannotProbe("the source has no model")
            if not awake:
                raise CannotProbe("the engine is not awake")
            found = verify_logprobs(engine, model)
        except CannotProbe as error:
            if asked:
                raise WeightSyncError(str(error), phase="verify", receiver=engine.kind) from error
            own = {names.VERIFY: "skipped", names.VERIFY_REASON: str(error)}
            _log.warning("the weight sync was not verified: %s", error)
        else:
            own = {names.VERIFY: "logprobs", names.VERIFY_DIFFERENCE: found.difference}
        span.set(own)
        trace.set(own)
    return own[names.VERIFY] == "logprobs"
