"""NaN among the log-probabilities of completions: a sign of NaN in the weights that costs no read of the weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from ..profiling import ProfilingContext, Span, semconv
from ..types import Completion

logger = logging.getLogger(__name__)


class NanLogprobs:
    """Counts completions with a NaN among their log-probabilities, and warns at the first one of each weight version.

    It sees log-probabilities that were asked for: of sampled tokens, by `Sampling.logprobs`, and of the prompt's.
    """

    def __init__(self, profiling: ProfilingContext) -> None:
        self._profiling = profiling
        self._lock, self._reported = threading.Lock(), set[str]()

    def check(self, completion: Completion, span: Span, version: str) -> None:
        """Examine a completion of the call of `span`. `version` is for one that tells none."""
        # A prompt's first token never has a log-probability.
        if not (_has_none(completion.logprobs or ()) or _has_none((completion.prompt_logprobs or ())[1:])):
            return
        self._profiling.record(semconv.NAN_LOGPROBS, 1)
        version = completion.weight_version or version
        with self._lock:
            span.set({semconv.NAN_COMPLETIONS: span.attributes.get(semconv.NAN_COMPLETIONS, 0) + 1})
            if version in self._reported:
                return
            self._reported.add(version)
        logger.warning(
            "vgen: a completion by weights %r%s has log-probabilities that are NaN; further ones of this version are "
            "only counted. Either a weight holds NaN or infinity, or values overflow the engine's dtype. Find out by "
            "sync_weights(verify='bits'), which names a weight that is not finite, or by verify='logprobs', which "
            "compares the engine with the trainer's model",
            version,
            f" of {completion.server}" if completion.server else "",
        )


def _has_none(logprobs: Sequence[Any]) -> bool:
    """Whether completions' log-probabilities hold None, which stands for NaN."""
    try:
        sum(logprobs)  # six times as fast as `None in logprobs`
    except TypeError:
        return True
    return False
