"""When an engine is verified end to end, and the phase of a sync that does it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...engine_protocol import CannotProbe, ProbeLogprobs, Source, SyncTrace
from ...errors import WeightSyncError
from ...profiling import semconv
from ...types import EngineVerification, WeightVerification
from ..source.probe_forward import forward_hooks
from .logprob_check import BOUND, DECODED, Probed, engine_logprobs, judge, probe_of, unit_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Deferred:
    """A comparison that waits until its engines are awake. The other side of it is from before."""

    engines: Sequence[Probed]
    expected: ProbeLogprobs
    asked: bool
    when: str = ""


class Verifier:
    """Verifies the engines that hold one trainer's weights, now or when they are awake again.

    Keeps what the trainer's model gave at the last verification: a wake-up that keeps the weights is compared with
    that, because the trainer may have trained on since.
    """

    def __init__(self) -> None:
        self._deferred: _Deferred | None = None
        self._expected: ProbeLogprobs | None = None
        """What the last verification expected of the engines; None if there was none."""
        self._outdated = False
        """Whether the engines have had other weights since then."""
        self._hooks = frozenset[int]()
        """The forward hooks of the trainer's model at the last verification, by torch's number of each."""
        self._logged = set[str]()

    @property
    def deferred(self) -> bool:
        """Whether a comparison waits until the engines are awake."""
        return self._deferred is not None

    def new_weights(self) -> None:
        """Note that a sync begins: what was expected of the old weights does not hold for the new ones."""
        self._deferred, self._outdated = None, True

    def has_new_hooks(self, source: Source) -> bool:
        """Whether the trainer's model has forward hooks that it did not have at the last verification."""
        return source.model is not None and not self._hooks.issuperset(forward_hooks(source.model))

    def verify_sync(
        self, engines: Sequence[Probed], source: Source, trace: SyncTrace, *, awake: bool, asked: bool
    ) -> bool:
        """Compare log-probabilities of each engine with the source's model. Returns whether that was done.

        If they cannot be compared, the log and the span say why; if the user `asked` for it, `WeightSyncError` is
        raised. If the engines are not `awake`, only the trainer's model is run, and `resume` compares. Raises
        `WeightSyncError` if they differ.
        """
        with self._phase(engines, trace, asked) as attributes:
            expected = _probe(engines, source)
            if awake:
                attributes |= _attributes([judge(engine, expected) for engine in engines])
            else:
                attributes[semconv.VERIFY] = "deferred"
                self._deferred = _Deferred(engines, expected, asked)
            self._keep(expected, source)
            return awake
        return False

    def resume(self, trace: SyncTrace) -> Sequence[Probed]:
        """Make the comparison that waits; the engines must be awake. Returns those that are verified now.

        Raises `WeightSyncError` as `verify_sync` does.
        """
        deferred, self._deferred = self._deferred, None
        if deferred is None:
            return ()
        with self._phase(deferred.engines, trace, deferred.asked) as attributes:
            results = [judge(engine, deferred.expected, when=deferred.when) for engine in deferred.engines]
            attributes |= _attributes(results)
            return deferred.engines
        return ()

    def before_sleep(self, engines: Sequence[Probed], level: int, *, keeps_weights: bool) -> None:
        """Prepare the comparison after a first sleep of this level. The engines must be awake still.

        Waking can do more than bring the weights back: it may reset scales, or leave pages of a state undefined. If
        the sleep discards the weights there is nothing to compare: the next sync must be verified.
        """
        self._deferred = None
        if not keeps_weights or self._expected is None or not engines:
            return
        if self._outdated:
            # A sync that was not verified came since. The engine's own answer, from before the sleep, stands in.
            logprobs = engine_logprobs(engines[0], self._expected.token_ids).prompt
            self._expected, self._outdated = replace(self._expected, logprobs=logprobs), False
        when = f"after waking up from a sleep of level {level}, "
        self._deferred = _Deferred(engines, self._expected, asked=False, when=when)

    def verify_now(
        self, engines: Sequence[Probed], source: Source, trace: SyncTrace, *, reason: str = ""
    ) -> WeightVerification:
        """Compare log-probabilities, of awake engines. `reason` says why it is not by bits, if that was asked for.

        Raises:
            WeightSyncError: In phase `verify`: they differ, or cannot be compared.
        """
        with self._phase(engines, trace, asked=True) as attributes:
            expected = _probe(engines, source)
            results = tuple(judge(engine, expected) for engine in engines)
            self._keep(expected, source)  # after an error the engines have other weights than these
            attributes |= _attributes(results)
        return WeightVerification(
            how="logprobs",
            reason=reason,
            engines=results,
            bound=BOUND,
            unit=expected.unit,
            tokens=len(expected.logprobs),
            decoded_tokens=2 * DECODED,
        )

    def _keep(self, expected: ProbeLogprobs, source: Source) -> None:
        self._expected, self._outdated = expected, False
        self._hooks = frozenset(forward_hooks(source.model) if source.model is not None else ())

    @contextmanager
    def _phase(self, engines: Sequence[Probed], trace: SyncTrace, asked: bool) -> Generator[dict[str, Any]]:
        """The phase `verify`. What the block puts into the dictionary becomes attributes of the phase and its parent.

        A reason why nothing can be compared is logged once.
        """
        with trace.phase("verify") as span:
            attributes: dict[str, Any] = {}
            try:
                yield attributes
            except CannotProbe as error:
                if asked:
                    receivers = ", ".join(engine.kind for engine in engines)
                    raise WeightSyncError(str(error), phase="verify", receiver=receivers) from error
                attributes |= {semconv.VERIFY: "skipped", semconv.VERIFY_REASON: str(error)}
                if str(error) not in self._logged:
                    self._logged.add(str(error))
                    kinds = ", ".join(engine.kind for engine in engines)
                    # The text, not the error: a handler that keeps records would keep the engine by its traceback.
                    _log.warning("the weights of %s are not verified: %s", kinds, str(error))
            finally:
                span.set(attributes)
                trace.set(attributes)


def _probe(engines: Sequence[Probed], source: Source) -> ProbeLogprobs:
    if source.model is None:
        raise CannotProbe("the source has no model")
    return source.probe_logprobs(probe_of(engines, source.model), unit_of(engines))


def _attributes(results: Sequence[EngineVerification]) -> dict[str, Any]:
    return {
        semconv.VERIFY: "logprobs",
        semconv.VERIFY_RATIO: max(max(result.ratio, result.decoded_ratio) for result in results),
        semconv.VERIFY_DIFFERENCE: max(result.mean for result in results),
    }
