"""Whether an engine computes what the trainer's model does: the same prompt through both, by log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import torch

from ..engines.base import Batch, Request
from ..errors import WeightSyncError
from ..types import Completion, Sampling
from .names import unwrapped, unwrapped_once

TOKENS = 256
"""Of the probe, drawn from the whole vocabulary: with 8 of 128 experts a token, each is asked 16 times."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How configurations call their number."""
ROWS = 32
"""Of logits that are taken to float32 at a time."""
FLOAT32 = {"dense": 1e-4, "experts": 1e-3}
"""Tolerance of the largest difference in float32."""
TF32 = 5e-3
"""The same on a CUDA device, whose attention kernels multiply with ten bits of the mantissa."""
ROUNDED = 0.5
"""Tolerance of the mean difference in 16 bits: right engines came to 0.07 with 1.5 B random weights and to 0.27 with
8 B, after vLLM's own reload too; those with one stale layer to 1.2 and 2.1.

The largest says little there: a router that rounds otherwise sends one token to another expert. A first sync starts
from random weights of unit variance in the engine, so a module that it misses does not hide behind this.
`benchmarks/weight_sync.py` prints the differences of right engines, of a stale layer and of stale models.
"""

PACKS = "support_avx512bf16_for_cpu"
"""What says so of bitsandbytes' `Linear4bit`."""
USUAL = 12.0
"""How large log-probabilities are, in nats, where nothing is known of a token among 150,000.

Larger ones, of a model that has gone astray, are computed to fewer decimals, and the tolerances grow in proportion.
"""


class Described(Protocol):
    """What tells whether an engine can be probed."""

    @property
    def device_type(self) -> str: ...
    @property
    def quantization(self) -> str | None:
        """How the weights are quantized."""
        ...


class Probed(Described, Protocol):
    """An engine, or one server among several."""

    @property
    def kind(self) -> str: ...
    @property
    def max_model_length(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def dtype(self) -> str:
        """Of the weights and of what is computed: `float32`, `bfloat16`, …"""
        ...

    def stream(self, batch: Batch) -> Generator[Completion]: ...


class CannotProbe(Exception):
    """Nothing can be compared; says why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences between the log-probabilities of a probe's tokens, in nats, and how they were judged."""

    largest: float
    mean: float
    tolerance: float
    rounded: bool
    """Whether the mean is judged, as in 16 bits, and not the largest."""

    @property
    def difference(self) -> float:
        """The one that is judged."""
        return self.mean if self.rounded else self.largest

    @property
    def right(self) -> bool:
        return isfinite(self.difference) and self.difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Said:
    """What the trainer's model gives to the tokens of a probe."""

    token_ids: list[int]
    logprobs: torch.Tensor
    """Of each token but the first, in float32 on the host."""
    rounded: bool
    """Whether it computes in less than float32."""
    experts: bool


def ask(model: torch.nn.Module, token_ids: list[int]) -> Said:
    """Run a probe through the trainer's model. All ranks of a sharded one do so together.

    Raises `CannotProbe` where it cannot compute.
    """
    try:
        logprobs, rounded = _forward(model, token_ids)
    except torch.OutOfMemoryError as error:
        raise CannotProbe("no memory for the trainer model's own forward pass") from error
    except Exception as error:
        raise CannotProbe(f"the trainer model's own forward pass fails with {type(error).__name__}") from error
    finally:
        _shard_again(model)
    return Said(token_ids, logprobs, rounded, _has_experts(model))


def probe_of(engines: Sequence[Probed], model: torch.nn.Module) -> list[int]:
    """The probe that all of these engines can take, and the trainer's model too. Raises `CannotProbe`."""
    for engine in engines:
        if (why := obstacle(model, engine)) is not None:
            raise CannotProbe(why)
    vocabulary = min(_text_config(model).vocab_size, *(engine.vocabulary_size for engine in engines))
    return probe(vocabulary, min(TOKENS, *(engine.max_model_length - 1 for engine in engines)))


def judge(engine: Probed, said: Said) -> Comparison:
    """Run the probe through the engine, which must be awake, and compare with what the trainer's model has `said`.

    Any engine will do, a server too. Every layer, the normalizations and the output head take part in every token,
    each expert with near certainty, the embeddings of the probe's tokens only: `verify="bits"` sees all of them.

    Raises:
        CannotProbe: The engine does not answer such questions; nothing was found out.
        WeightSyncError: In phase `verify`: they differ by more than the dtype allows.
    """
    found = compare(engine, said)
    if not found.right:
        which = "mean" if found.rounded else "largest"
        raise WeightSyncError(
            f"the {which} difference between its log-probabilities and the trainer model's is {found.difference:.2g}, "
            f"where {found.tolerance:g} is expected at most",
            phase="verify",
            receiver=engine.kind,
        )
    return found


def compare(engine: Probed, said: Said) -> Comparison:
    """As `judge`, without judging."""
    differences = (said.logprobs - torch.tensor(_engine_logprobs(engine, said.token_ids))).abs()
    kind = "experts" if said.experts else "dense"
    rounded = said.rounded or engine.dtype != "float32"
    size = float(said.logprobs.abs().mean() if rounded else said.logprobs.abs().max())
    tolerance = ROUNDED if rounded else FLOAT32[kind] if engine.device_type == "cpu" else TF32
    tolerance *= max(1.0, size / USUAL)
    return Comparison(float(differences.max()), float(differences.mean()), tolerance, rounded)


def obstacle(model: torch.nn.Module, engine: Described) -> str | None:
    """Why the model and the engine cannot be compared; None when they can, as far as can be seen."""
    if engine.quantization is not None:
        return f"the engine's weights are quantized ({engine.quantization})"
    for parameter in model.parameters():
        if parameter.is_meta:
            return "the trainer's model has no weights yet"
        if parameter.device.type != engine.device_type:
            return "the trainer's model is on another device"
    return None


def probe(vocabulary: int, length: int) -> list[int]:
    """The same random tokens each time, as different ones as there are."""
    dice = random.Random(vocabulary)
    return dice.sample(range(vocabulary), length) if vocabulary >= length else dice.choices(range(vocabulary), k=length)


def _forward(model: torch.nn.Module, ids: list[int]) -> tuple[torch.Tensor, bool]:
    """The model's log-probabilities of each token but the first, and whether it computes in less than float32."""
    with torch.no_grad(), _evaluating(model), _head_input(model) as dtypes:
        given = torch.tensor([ids], device=next(model.parameters()).device)
        logits = _runnable(model)(input_ids=given, use_cache=False).logits[0, :-1]
        rows = []
        for part, wanted in zip(logits.split(ROWS), given[0, 1:].split(ROWS), strict=True):
            rows.append(part.float().log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1))
        return torch.cat(rows).cpu(), dtypes != {torch.float32}


def _runnable(model: Any) -> Any:
    """Without wrappers that a forward pass on one rank must not go through, or need not: DDP's sends buffers around."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
        model = unwrapped_once(model)
    return model


@contextmanager
def _head_input(model: torch.nn.Module) -> Iterator[set[torch.dtype]]:
    """The dtypes that reach the output head: under FSDP's mixed precision not those of the parameters."""
    dtypes = set[torch.dtype]()

    def note(_: Any, given: tuple[Any, ...]) -> None:
        dtypes.update(value.dtype for value in given if isinstance(value, torch.Tensor))

    handle = unwrapped(model).get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield dtypes
    finally:
        handle.remove()


def _shard_again(model: torch.nn.Module) -> None:
    """FSDP2 leaves its outermost parameters whole after a forward pass, for a backward pass that does not come."""
    for module in model.modules():
        if (reshard := getattr(module, "reshard", None)) is not None and "FSDP" in type(module).__name__:
            reshard()


def _engine_logprobs(engine: Probed, ids: list[int]) -> list[float]:
    sampling = Sampling(max_tokens=1, temperature=1.0, logprobs=None, prompt_logprobs=0)
    with closing(engine.stream(Batch([Request(0, 0, ids, 0)], sampling))) as stream:
        answers = list(stream)
    scored = (answers[0].prompt_logprobs or [])[1:] if answers else []
    if len(scored) != len(ids) - 1:
        raise CannotProbe("the engine gives no log-probabilities of prompts")
    return [float("nan") if value is None else value for value in scored]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; each module is in its own mode again afterwards.

    bitsandbytes repacks 4-bit weights in a forward pass outside training, where the CPU has AVX512-BF16, and cannot
    train them afterwards: not in this one.
    """
    training = [module for module in model.modules() if module.training]
    packing = [module for module in model.modules() if getattr(module, PACKS, False)]
    model.eval()
    for module in packing:
        setattr(module, PACKS, False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for module in packing:
            setattr(module, PACKS, True)


def _has_experts(model: Any) -> bool:
    counts = (getattr(_text_config(model), name, None) for name in EXPERTS)
    return any(count for count in counts)


def _text_config(model: Any) -> Any:
    config = unwrapped(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
