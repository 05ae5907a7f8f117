"""The independent judge: the trainer's own forward pass, and how much rounding alone moves it.

It shares no code with the verification that vgen's engines make (`vgen.weights.verification`), so that each can find
faults of the other. The noise is measured, not assumed: the same model, weights and tokens in a wider dtype give other
log-probabilities, and the difference is what rounding does. A right engine differs from the trainer by about as much.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .subject import Sampled

BOUND = 4.0
"""A difference of up to this multiple of the noise counts as rounding."""
FLOOR = {torch.float32: 2.0**-21, torch.float64: 2.0**-30}
"""Noise that is assumed at least, relative to the size of the log-probabilities: kernels add in other orders, and
models compute norms and softmax in float32 whatever their dtype is."""
CLIP = 8.0
"""A single token counts with at most this multiple of the noise, in the root mean square."""
_WIDER = {torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class Measurement:
    """How far an engine's log-probabilities are from the trainer's."""

    ratio: float
    """The difference as a multiple of the rounding noise: about 1 for a right engine."""
    bound: float
    """The largest ratio that counts as right."""
    mean: float
    """The mean difference, in nats."""
    largest: float
    """The largest difference of a single token, in nats."""
    noise: float
    """What rounding changes: root mean square, in nats."""
    tokens: int

    @property
    def right(self) -> bool:
        """Whether rounding explains the difference. False if any log-probability is NaN."""
        return self.ratio <= self.bound


class Oracle:
    """Measures completions against a model's own forward pass, with the weights that the model has at that moment.

    Args:
        model: A transformers model, perhaps with adapters.
        dtype: In which the engine computes; by default that of the model's weights.
        fp8: Whether the engine rounds its weights to fp8 (e4m3, one scale for each row), or its KV cache.
    """

    def __init__(self, model: Any, dtype: torch.dtype | str | None = None, *, fp8: bool = False) -> None:
        self._model, self._fp8 = model, fp8
        self._stored = next(p.dtype for p in model.parameters() if p.is_floating_point())
        named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        self._dtype: torch.dtype = named or self._stored
        self._wider = _WIDER.get(self._stored, torch.float32)

    def measure(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]) -> Measurement:
        """Compare the log-probabilities of `completions` with the model's own for the same tokens."""
        trainer, noise, engine = self.logprobs(prompts, completions)
        return measurement(engine, trainer, noise, FLOOR.get(self._dtype, 0.0))

    def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each completion token: the trainer's log-probability, the change by rounding, and the engine's."""
        from .subject import as_float

        pairs = [(list(p), list(c.token_ids)) for p, c in zip(prompts, completions, strict=True)]
        engine = torch.tensor([as_float(value) for each in completions for value in each.logprobs]).double()
        with _undisturbed(self._model):
            trainer = _completion_logprobs(self._model, pairs)
            wide = _completion_logprobs(_converted(self._model, self._wider), pairs)
            narrow = trainer
            if self._fp8 or self._dtype is not self._stored:
                copied = _converted(self._model, self._dtype)
                narrow = _completion_logprobs(_rounded_to_fp8(copied) if self._fp8 else copied, pairs)
            elif self._dtype is torch.float32:
                with _tf32():
                    narrow = _completion_logprobs(self._model, pairs)
        return trainer, narrow - wide, engine

    def behind_the_likeliest(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]) -> float:
        """The largest distance, in nats, of a completion's token from the likeliest one at its place."""
        pairs = [(list(p), list(c.token_ids)) for p, c in zip(prompts, completions, strict=True)]
        with _undisturbed(self._model):
            return float(
                (_completion_logprobs(self._model, pairs, best=True) - _completion_logprobs(self._model, pairs)).max()
            )


def measurement(engine: torch.Tensor, expected: torch.Tensor, noise: torch.Tensor, floor: float) -> Measurement:
    """Judge the differences by the larger of two ratios of power means, of the differences and of the noise.

    The root mean square sees faults that few tokens meet. The power mean of 1/2 sees faults that all tokens meet where
    the noise has a few large values: rounding sends single tokens to other experts of a mixture.
    """
    change = engine - expected
    least = floor * max(1.0, float(expected.abs().mean()))  # near 0 they are differences of large numbers
    rms = _power_mean(noise, 2) + least
    ratios = (
        _power_mean(change.abs().clamp(max=CLIP * max(rms, float(noise.abs().max()))), 2) / rms,
        _power_mean(change, 0.5) / (_power_mean(noise, 0.5) + least),
    )
    finite = not bool(change.isnan().any())
    return Measurement(
        ratio=max(ratios) if finite else float("nan"),
        bound=BOUND,
        mean=float(change.abs().mean()),
        largest=float(change.abs().max()),
        noise=rms,
        tokens=len(change),
    )


def _power_mean(values: torch.Tensor, power: float) -> float:
    return float(values.abs().pow(power).mean().pow(1 / power))


def _completion_logprobs(model: Any, pairs: list[tuple[list[int], list[int]]], *, best: bool = False) -> torch.Tensor:
    """The model's log-probabilities of all completions' tokens, or the best ones there, as float64 on the host."""
    found: list[torch.Tensor | None] = [None] * len(pairs)
    by_length: dict[int, list[int]] = {}
    for index, (prompt, completion) in enumerate(pairs):
        by_length.setdefault(len(prompt) + len(completion), []).append(index)
    device = next(model.parameters()).device
    for indices in by_length.values():  # no padding: not every architecture ignores it
        ids = torch.tensor([[*pairs[index][0], *pairs[index][1]] for index in indices], device=device)
        logits = model(input_ids=ids, use_cache=False).logits
        for row, index in enumerate(indices):
            start = len(pairs[index][0])
            rows = logits[row, start - 1 : -1].double().log_softmax(-1)
            chosen = rows.max(-1).values if best else rows.gather(-1, ids[row, start:, None])[:, 0]
            found[index] = chosen.cpu()
    return torch.cat([each for each in found if each is not None])


def _converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the model in another dtype."""
    converted = copy.deepcopy(model).to(dtype)
    if dtype is torch.float64 and hasattr(converted, "set_experts_implementation"):
        converted.set_experts_implementation("eager")  # torch's grouped multiplication has no float64
    return converted


def _rounded_to_fp8(model: Any) -> Any:
    """The model with its matrices rounded to fp8 and back, in place."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            scale = parameter.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0  # the largest e4m3 number
            parameter.copy_(((parameter.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(parameter.dtype))
    return model


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 matrices in TF32 on CUDA devices, as in vLLM's kernels; on a CPU as they are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and autocast; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
