"""Log-probabilities in the form that `Completion` has them."""

from __future__ import annotations

import math
from collections.abc import Iterable


def number(logprob: float | None) -> float | None:
    """The log-probability, or None instead of NaN, which comes from logits that overflowed."""
    return None if logprob is None or math.isnan(logprob) else logprob


def likeliest_first(pairs: Iterable[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """Sort `(token id, log-probability)` pairs by falling log-probability; unknown ones come last."""
    return sorted(pairs, key=lambda pair: math.inf if pair[1] is None else -pair[1])
