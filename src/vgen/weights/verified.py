"""The end-to-end check of a weight sync, as one of its phases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..engines.base import Source, SyncTrace
from ..errors import WeightSyncError
from ..profiling import names
from .probe import CannotProbe, Probed, Said, ask, judge, probe_of
from .source import model_of

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


def verified(engines: Sequence[Probed], source: Source, trace: SyncTrace, *, awake: bool, asked: bool) -> None:
    """Compare log-probabilities of each engine and the source's model. Raises `WeightSyncError` where they differ.

    Where that cannot be done, the log and the span say why; where it was `asked` for, `WeightSyncError` does.
    """
    with trace.phase("verify") as span:
        try:
            if (model := model_of(source)) is None:
                raise CannotProbe("the source has no model")
            if not awake:
                raise CannotProbe("the engine is not awake")
            said = _ask(source, model, probe_of(engines, model))
            difference = max(judge(engine, said).difference for engine in engines)
        except CannotProbe as error:
            if asked:
                who = ", ".join(engine.kind for engine in engines)
                raise WeightSyncError(str(error), phase="verify", receiver=who) from error
            own = {names.VERIFY: "skipped", names.VERIFY_REASON: str(error)}
            # An engine that sleeps is looked at after the next sync.
            _log.log(logging.WARNING if awake else logging.INFO, "the weight sync was not verified: %s", error)
        else:
            own = {names.VERIFY: "logprobs", names.VERIFY_DIFFERENCE: difference}
        span.set(own)
        trace.set(own)


def take_part(engines: Sequence[Probed], source: Source) -> None:
    """Where another rank will verify its own engine: run a sharded model with it, which would wait otherwise."""
    model = model_of(source)
    if model is not None and getattr(source, "collective", False):
        with suppress(CannotProbe):
            _ask(source, model, probe_of(engines, model))


def _ask(source: Source, model: torch.nn.Module, token_ids: list[int]) -> Said:
    """By the source, where it knows of other ranks that must take part; else by the model alone."""
    own = getattr(source, "ask", None)
    return own(token_ids) if own is not None else ask(model, token_ids)
