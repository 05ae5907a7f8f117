"""The end-to-end check of a weight sync, as one of its phases."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engines.base import Source, SyncTrace
from ..errors import WeightSyncError
from ..profiling import names
from .probe import CannotProbe, Probed, Said, ask, judge, probe_of
from .source import model_of

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A comparison that waits for its engines to be awake, with what the trainer's model said when the weights left."""

    engines: Sequence[Probed]
    said: Said
    asked: bool

    def compare(self, trace: SyncTrace) -> None:
        """Do now what was put off; as `verified`."""
        with _phase(self.engines, trace, self.asked) as found:
            found |= _judged(self.engines, self.said)


def verified(
    engines: Sequence[Probed], source: Source, trace: SyncTrace, *, awake: bool, asked: bool
) -> Deferred | None:
    """Compare log-probabilities of each engine and the source's model. Raises `WeightSyncError` where they differ.

    Where that cannot be done, the log and the span say why; where it was `asked` for, `WeightSyncError` does. Of
    engines that are not `awake` only the model is asked: the rest is left to what is returned.
    """
    with _phase(engines, trace, asked) as found:
        if (model := model_of(source)) is None:
            raise CannotProbe("the source has no model")
        said = _ask(source, model, probe_of(engines, model))
        if not awake:
            found[names.VERIFY] = "deferred"
            return Deferred(engines, said, asked)
        found |= _judged(engines, said)
    return None


def _judged(engines: Sequence[Probed], said: Said) -> dict[str, Any]:
    difference = max(judge(engine, said).difference for engine in engines)
    return {names.VERIFY: "logprobs", names.VERIFY_DIFFERENCE: difference}


@contextmanager
def _phase(engines: Sequence[Probed], trace: SyncTrace, asked: bool) -> Generator[dict[str, Any]]:
    """The attributes of the phase, and of the call that it is part of, are what the block puts into the dictionary."""
    with trace.phase("verify") as span:
        found: dict[str, Any] = {}
        try:
            yield found
        except CannotProbe as error:
            if asked:
                who = ", ".join(engine.kind for engine in engines)
                raise WeightSyncError(str(error), phase="verify", receiver=who) from error
            found |= {names.VERIFY: "skipped", names.VERIFY_REASON: str(error)}
            _log.warning("the weight sync was not verified: %s", error)
        finally:
            span.set(found)
            trace.set(found)


def _ask(source: Source, model: torch.nn.Module, token_ids: list[int]) -> Said:
    """By the source, where it knows of other ranks that must take part; else by the model alone."""
    own = getattr(source, "ask", None)
    return own(token_ids) if own is not None else ask(model, token_ids)
