"""Whether an engine computes what the trainer's model does: log-probabilities of one prompt from both, compared.

Both sides round, so they never agree exactly, and how much rounding matters depends on the model: on its depth, on how
sharp its distribution is, on whether it routes to experts. So no tolerance is fixed. The trainer's model runs again
with random rounding errors (`source/rounding_noise.py`), and the differences between the two sides are measured in
units of the differences that those errors cause. `benchmarks/planted_faults.py` measures right engines and planted
faults.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import isnan
from typing import Protocol

import torch

from ...engine_protocol import Batch, CannotProbe, ProbeLogprobs, Request
from ...errors import WeightSyncError
from ...types import Completion, EngineVerification, Sampling
from ..source.probe_forward import differences, text_config
from ..source.rounding_noise import rounding_unit

TOKENS = 256
"""Tokens of a probe, drawn from the whole vocabulary. With 8 of 128 experts a token, each expert gets about 16."""
DECODED = 8
"""Tokens that are decoded after the probe and compared. One more is generated: the first comes from the prefill."""
SHORT = 8
"""As many tokens are decoded after the first ones of the probe too: kernels take other ways in a short context, as in
one that a sliding window does not fill."""
BOUND = 2.0
"""The largest `Comparison.ratio` of a right engine. Measured: right engines up to 0.95, planted faults from 2.4."""
CLIP = 8.0
"""How many times the noise one token may count at most.

A router that rounds differently sends a token to another expert, which changes its log-probability by far more than the
rounding itself. A few such tokens more than in the passes with noise are right. At 8, `TOKENS` / 8 of them are allowed.
"""
FLOOR = 2.0**-22
"""Rounding errors of a float32 log-probability itself, relative to its size."""
QUANTIZED = (("fp4", 2.0**-2), ("fp8", 2.0**-4), ("int8", 2.0**-6), ("w8a8", 2.0**-6), ("", 2.0**-3))
"""Relative error of a linear layer by its quantization method: the first whose name is a part of the method's name.

fp8 (E4M3) rounds to three bits of the mantissa, weights and activations: 2⁻⁴. int8 has 127 steps for the largest of a
row, which is about four times a usual element: 2⁻⁷ for each of weights and activations. Four bits have seven steps for
the largest of a group of 32 to 128, about three times a usual element: 2⁻³, and 2⁻² where activations have four bits
too. Methods whose name does not tell how many bits they use count as four bits.
"""


class Described(Protocol):
    """What decides whether an engine can be probed."""

    device_type: str
    quantization: str | None
    """The quantization method of the weights or of the KV cache; None if neither is quantized."""


class Probed(Described, Protocol):
    """An engine that can be probed, or one server of several."""

    @property
    def kind(self) -> str: ...
    @property
    def max_model_length(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def dtype(self) -> str:
        """The dtype of the weights and of the computation: `float32`, `bfloat16`, …"""
        ...

    def stream(self, batch: Batch) -> Generator[Completion]: ...


@dataclass(frozen=True, slots=True)
class EngineLogprobs:
    """What an engine gives for a probe, in nats."""

    prompt: torch.Tensor
    """The log-probability of each token of the probe but the first."""
    decodings: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Of each token that was decoded after the probe, and after its beginning: from decoding, and from a prefill."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences between two sides' log-probabilities, in nats and in units of the rounding noise."""

    ratio: float
    """The differences of the probe's tokens, as a multiple of the noise; see `noise_ratio`."""
    decoded_ratio: float
    """The differences between the engine's decoding and its own prefill of the same tokens, likewise."""
    largest: float
    mean: float

    @property
    def right(self) -> bool:
        return self.ratio <= BOUND and self.decoded_ratio <= BOUND  # false for NaN


def probe_of(engines: Sequence[Probed], model: torch.nn.Module) -> list[int]:
    """The token ids of a probe that fits all these engines and the trainer's model. Raises `CannotProbe`."""
    for engine in engines:
        if (why := obstacle(model, engine)) is not None:
            raise CannotProbe(why)
    vocabulary = min(text_config(model).vocab_size, *(engine.vocabulary_size for engine in engines))
    length = min(TOKENS, *(engine.max_model_length - DECODED - 2 for engine in engines))
    if length < DECODED:
        raise CannotProbe(f"the engine's longest sequence is shorter than {2 * DECODED + 2} tokens")
    return probe(vocabulary, length)


def unit_of(engines: Sequence[Probed]) -> float:
    """The relative rounding error of the coarsest of these engines."""
    return max(map(_unit, engines))


def judge(engine: Probed, expected: ProbeLogprobs, *, when: str = "") -> EngineVerification:
    """Run the probe through the engine, which must be awake, and require that it agrees with `expected`.

    All layers, normalizations and the output head take part in every token, and each expert almost certainly in some.
    Of the embeddings only those of the probe's tokens do; `verify="bits"` compares all of them. `when` begins the
    error's message.

    Raises:
        CannotProbe: The engine returns no log-probabilities of prompts; nothing is known about its weights.
        WeightSyncError: In phase `verify`: the differences are larger than `BOUND` times the rounding noise.
    """
    comparison = compare(engine, expected)
    if not comparison.right:
        raise WeightSyncError(when + _problem(comparison, expected), phase="verify", receiver=engine.kind)
    return EngineVerification(
        engine=engine.kind,
        ratio=comparison.ratio,
        decoded_ratio=comparison.decoded_ratio,
        largest=comparison.largest,
        mean=comparison.mean,
    )


def compare(engine: Probed, expected: ProbeLogprobs) -> Comparison:
    """Run the probe through the engine and compare, without judging the result. Raises `CannotProbe`."""
    answer = engine_logprobs(engine, expected.token_ids)
    changes = differences(answer.prompt, expected.logprobs)
    decoded = [_decoded_ratio(differences(*each), expected) for each in answer.decodings]
    return Comparison(
        ratio=noise_ratio(changes, expected),
        decoded_ratio=max(decoded, key=lambda ratio: (isnan(ratio), ratio)),
        largest=float(changes.abs().max()),
        mean=float(changes.abs().mean()),
    )


def noise_ratio(changes: torch.Tensor, expected: ProbeLogprobs) -> float:
    """How large `changes` are, as a multiple of `expected.noise`: about 1 if rounding alone causes them.

    The larger of two ratios, each of a power mean of the changes to that of the noise. The root mean square (power 2)
    shows faults that few tokens meet, such as an exchanged expert; there a token counts at most `CLIP` times the noise.
    Power 1/2 shows faults of all tokens where the noise has a few large values, from tokens that change experts. Both
    are smooth: a quantile would jump where about that share of the tokens changes experts.
    """
    large, usual = _noise(expected, 2), _noise(expected, 0.5)
    ratios = _power_mean(changes.abs().clamp(max=CLIP * large), 2) / large, _power_mean(changes, 0.5) / usual
    return max(ratios, key=lambda ratio: (isnan(ratio), ratio))


def _decoded_ratio(changes: torch.Tensor, expected: ProbeLogprobs) -> float:
    """As `noise_ratio`, for a few tokens, of which two may change experts."""
    large = _noise(expected, 2)
    return _power_mean(changes.abs().clamp(max=CLIP * large), 0.5) / large


def _noise(expected: ProbeLogprobs, power: float) -> float:
    finite = expected.logprobs[expected.logprobs.isfinite()]
    return _power_mean(expected.noise, power) + FLOOR * float(finite.abs().mean())


def _power_mean(values: torch.Tensor, power: float) -> float:
    return float(values.double().abs().pow(power).mean().pow(1 / power))


def obstacle(model: torch.nn.Module, engine: Described) -> str | None:
    """Why the model and the engine cannot be compared; None if nothing speaks against it."""
    for parameter in model.parameters():
        if parameter.is_meta:
            return "the trainer's model has no weights yet"
        if parameter.device.type != engine.device_type:
            return "the trainer's model is on another device"
    return None


def probe(vocabulary: int, length: int) -> list[int]:
    """`length` random token ids, the same ones each time, all different if the vocabulary suffices."""
    dice = random.Random(vocabulary)
    return dice.sample(range(vocabulary), length) if vocabulary >= length else dice.choices(range(vocabulary), k=length)


def engine_logprobs(engine: Probed, token_ids: list[int]) -> EngineLogprobs:
    """What the engine gives for a probe and for the tokens that it decodes after it. Raises `CannotProbe`."""
    prompt, *decoding = _decoded(engine, token_ids)
    _, *short = _decoded(engine, token_ids[:SHORT])
    return EngineLogprobs(prompt, ((decoding[0], decoding[1]), (short[0], short[1])))


def _decoded(engine: Probed, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The log-probabilities of a prompt's tokens but the first; of decoded tokens; and of these from a prefill."""
    first = _complete(engine, token_ids, DECODED + 1)
    second = _complete(engine, [*token_ids, *first.token_ids], 1)
    prompt, repeated = (first.prompt_logprobs or [])[1:], (second.prompt_logprobs or [])[1:]
    if len(prompt) != len(token_ids) - 1 or len(repeated) != len(token_ids) + DECODED:
        raise CannotProbe("the engine gives no log-probabilities of prompts")
    if len(first.logprobs or ()) != DECODED + 1:
        raise CannotProbe("the engine gives no log-probabilities of the tokens that it generates")
    return _tensor(prompt), _tensor((first.logprobs or [])[1:]), _tensor(repeated[-DECODED:])


def _complete(engine: Probed, token_ids: list[int], tokens: int) -> Completion:
    sampling = Sampling(max_tokens=tokens, temperature=1.0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    # Without a seed: vLLM on a CPU ends when it cuts the prefill of a seeded request in two.
    with closing(engine.stream(Batch([Request(0, 0, token_ids, None)], sampling))) as stream:
        completion = next(stream, None)
        for _ in stream:
            pass
    if completion is None:
        raise CannotProbe("the engine answers nothing")
    return completion


def _tensor(logprobs: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([float("nan") if value is None else value for value in logprobs])


def _unit(engine: Probed) -> float:
    dtype = getattr(torch, engine.dtype.removeprefix("torch."), torch.bfloat16)  # a server may not tell its dtype
    unit = rounding_unit([dtype], engine.device_type)
    if engine.quantization is None:
        return unit
    return max(unit, next(error for part, error in QUANTIZED if part in engine.quantization.lower()))


def _problem(comparison: Comparison, expected: ProbeLogprobs) -> str:
    """What is wrong, with its figures, and what to do about it."""
    bound = f"times the rounding noise, where {BOUND:g} is allowed"
    if comparison.ratio <= BOUND:
        return (
            f"the log-probabilities of {DECODED} decoded tokens differ from its own prefill of the same tokens by "
            f"{comparison.decoded_ratio:.3g} {bound}, and the prefill is right: CUDA graphs hold old addresses, or "
            "vLLM decodes this model wrongly by itself. Construct the engine anew; if it happens again, with "
            "engine_kwargs={'compilation_config': {'cudagraph_mode': 'PIECEWISE'}}, or with enforce_eager=True"
        )
    hooks = f", or a forward hook changes the trainer's results ({', '.join(expected.hooks[:3])})"
    return (
        f"its log-probabilities differ from the trainer model's by {comparison.ratio:.3g} {bound} (mean "
        f"{comparison.mean:.2g} nats, largest {comparison.largest:.2g}, over {len(expected.logprobs)} tokens): a "
        "weight is stale, or its configuration is not that of the trainer's model"
        + (hooks if expected.hooks else "")
        + "; sync_weights(verify='bits') finds a stale weight"
    )
