"""What goes in and what comes out: plain frozen dataclasses, in vLLM's own words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from . import arguments
from .errors import ArgumentError, PromptError

if TYPE_CHECKING:
    from .padding import PaddedBatch

STRUCTURES = ("regex", "json", "json_object", "choice", "grammar", "structural_tag")
"""What `Sampling.structured_outputs` may ask for."""

_Check: TypeAlias = "Callable[[str, Any], Any]"
Prompt: TypeAlias = "Sequence[int] | str"
"""Token ids; or text, where the generation object was given a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled, under the names of vLLM's `SamplingParams`.

    There is no `n`: `num_generations` of `generate` is the one way to ask for several, because vLLM
    reports the timing of only one of `n` siblings. What vLLM has besides goes into `extra`.

    Values are normalized: integers of NumPy and torch become `int`, one stop string becomes a tuple of it. Raises
    `ArgumentError`, which names the field and what to pass instead.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 considers all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    """Text that ends a completion, or several such texts. Needs a tokenizer in the engine."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """The seed of the first completion of the first prompt. Each other completion of the call, on any rank, gets one
    that is computed from this number, from its prompt's place among the prompts of all ranks, and from its own place
    among that prompt's completions. So completions differ, and the next number has nothing in common with this one.
    (Ranks with engines of their own count their prompts from their number times 2²⁰.)"""
    logprobs: int | None = 0
    """None: no log-probabilities. 0: only the sampled token's. N: also those of the N likeliest tokens."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the prompt's own tokens; they are what the model gives, whatever is sampled."""
    structured_outputs: Mapping[str, Any] | None = None
    """What completions must match, one of: `{"regex": ...}`, `{"json": schema}`, `{"json_object": True}`,
    `{"choice": [...]}`, `{"grammar": ...}`, `{"structural_tag": ...}`."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further `SamplingParams`, passed on as they are."""

    def __post_init__(self) -> None:
        for name, (default, check) in _CHECKS.items():
            value = getattr(self, name)
            if value is not default and (checked := check(f"Sampling.{name}", value)) is not value:
                object.__setattr__(self, name, checked)
        if self.min_tokens > self.max_tokens:
            raise ArgumentError("Sampling.min_tokens", f"must be at most max_tokens, {self.max_tokens}")

    @classmethod
    def of(cls, value: Any) -> Sampling:
        """`value` itself, or the `Sampling` that means the same as a `SamplingParams` of vLLM.

        Raises `ArgumentError` for anything else, and says what to pass.
        """
        if isinstance(value, Sampling):
            return value
        if type(value).__name__ == "SamplingParams" and type(value).__module__.startswith("vllm."):
            return _from_vllm(value)
        fix = "sampling=Sampling(max_tokens=...)"
        if isinstance(value, Mapping):
            fix = "sampling=Sampling(**them)"
        elif type(value).__name__ == "GenerationConfig":
            fix = "its fields as sampling=Sampling(temperature=..., max_tokens=...)"
        raise ArgumentError("sampling", f"must be a vgen.Sampling, got a {type(value).__name__}: pass {fix}")


_init = arguments.checked_call(Sampling.__init__)


@functools.wraps(_init)
def _named_init(self: Sampling, *args: Any, n: Any = 1, **fields: Any) -> None:
    _require_one("Sampling(n=)", n)
    _init(self, *args, **fields)


Sampling.__init__ = _named_init


def _number(valid: Callable[[float], bool], rule: str) -> Callable[[str, Any], float]:
    return lambda argument, value: arguments.number(argument, value, valid, rule)


def _integer(rule: str = "", least: int = 0, most: int = arguments.INT32, *, optional: bool = False) -> _Check:
    def check(argument: str, value: Any) -> int | None:
        if optional and value is None:
            return None
        return arguments.integer(argument, value, least=least, most=most, rule=rule)

    return check


_SET_BY_VGEN = (
    *("skip_clone", "output_kind", "stream_interval", "detokenize", "flat_logprobs", "output_text_buffer_length"),
    *("prompt_logprob_token_ids", "prompt_logprob_start", "trace_decode_token_ids"),
)
"""Parameters of vLLM on which it depends that completions can be read and that the engine survives."""


def _require_one(argument: str, value: Any, rule: str = "1") -> None:
    if value is not None:
        arguments.integer(argument, value, least=1, most=1, rule=f"{rule}: pass num_generations to generate()")


def _structured_outputs(argument: str, value: Any) -> dict[str, Any]:
    rule = f"must be a mapping with one of {', '.join(STRUCTURES)}, and no more"
    if not isinstance(value, Mapping) or len(value.keys() & STRUCTURES) != 1:
        raise ArgumentError(argument, f"{rule}, got {arguments.shown(value)}")
    return arguments.mapping(argument, value)


def _extra(argument: str, value: Any) -> dict[str, Any]:
    extra = arguments.mapping(argument, value)
    _require_one(argument, extra.pop("n", 1), "without 'n'")
    for name in extra:
        if name in _FIELDS:
            raise ArgumentError(argument, f"must be without {name!r}: pass Sampling({name}=...)")
        if name in _SET_BY_VGEN or name.startswith("_"):
            raise ArgumentError(argument, f"must be without {name!r}, which vgen sets itself")
    return extra


def _from_vllm(params: Any) -> Sampling:
    """The same sampling. vLLM's classes are structs, whose fields and defaults they tell."""
    if params.max_tokens is None:
        raise ArgumentError("SamplingParams.max_tokens", "must be an integer of at least 1, got None")
    _require_one("SamplingParams.n", params.n)
    plain = type(params)()
    own = {name: getattr(params, name) for name in _FIELDS - {"extra", "structured_outputs"}}
    extra = {
        name: getattr(params, name)
        for name in params.__struct_fields__
        if name not in _FIELDS and name not in _SET_BY_VGEN and not name.startswith("_") and name != "n"
        if getattr(params, name) != getattr(plain, name)
    }
    structured = params.structured_outputs
    if structured is not None:
        structured = {name: each for name in STRUCTURES if (each := getattr(structured, name)) is not None}
    return Sampling(**own, structured_outputs=structured, extra=extra)


_OPTIONAL_COUNT = _integer("None or an integer of at least 0", optional=True)
_CHECKED: Mapping[str, _Check] = {
    "temperature": _number(lambda value: value >= 0, "at least 0"),
    "top_p": _number(lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": _number(lambda value: 0 <= value <= 1, "in [0, 1]"),
    "repetition_penalty": _number(lambda value: value > 0, "above 0"),
    "presence_penalty": _number(lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "frequency_penalty": _number(lambda value: -2 <= value <= 2, "in [-2, 2]"),
    "top_k": _integer("an integer of at least -1 (0 and -1 consider all tokens)", -1),
    "max_tokens": _integer(least=1),
    "min_tokens": _integer(),
    "logprobs": _OPTIONAL_COUNT,
    "prompt_logprobs": _OPTIONAL_COUNT,
    "seed": _integer("None or an integer of at least 0", most=arguments.INT63, optional=True),
    "stop": arguments.texts,
    "stop_token_ids": arguments.integers,
    "ignore_eos": arguments.flag,
    "structured_outputs": _structured_outputs,
    "extra": _extra,
}
_CHECKS = {each.name: (each.default, _CHECKED[each.name]) for each in fields(Sampling)}
"""The default of each field of `Sampling`, which needs no check, and the check of any other value."""
_FIELDS = _CHECKS.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRARequest:
    """An adapter to generate with, under the names of vLLM's `LoRARequest`; the engine must have LoRA enabled."""

    lora_name: str
    lora_path: str = ""
    """A folder in PEFT's format that the engine can read. Empty where the engine has the adapter under that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """Where one completion's time went, in seconds, from the engine's own monotonic timestamps."""

    queued_ns: int
    """When the engine core took it in, on `time.monotonic_ns`'s clock."""
    finished_ns: int
    """When its last token was there."""
    admission: float = 0.0
    """From arriving at the engine's front end to queueing in its core; 0 where the engine does not say."""
    queue: float
    """From queueing to the first scheduling."""
    prefill: float
    """From there to the first token."""
    decode: float
    """From the first to the last token."""
    time_to_first_token: float
    """From arriving until the front end had the first token: includes everything until the front end received it."""
    time_per_output_token: float | None
    """`decode` for each token after the first; None with fewer than two tokens."""
    e2e: float
    """`admission + queue + prefill + decode`."""
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    @property
    def arrived_ns(self) -> int:
        """When it came to the engine's front end."""
        return self.queued_ns - int(self.admission * 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion."""

    prompt_index: int
    """Which prompt of the call."""
    generation_index: int
    """Which completion of that prompt."""
    token_ids: list[int]
    """Without the prompt; with the end-of-sequence token where it ended with one."""
    logprobs: list[float | None] | None = None
    """The sampled tokens' log-probabilities, as sampled (after temperature and the like); None for a NaN."""
    top_logprobs: list[list[tuple[int, float | None]]] | None = None
    """For each position `(token id, log-probability)`, likeliest first, including the sampled token."""
    prompt_logprobs: list[float | None] | None = None
    """The prompt tokens' log-probabilities, None for the first; where `Sampling.prompt_logprobs` asks for them."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort`; `error` for a refused prompt."""
    weight_version: str | None = None
    """Of the weights that sampled the last token."""
    weight_versions: list[tuple[str, int, int]] | None = None
    """`(version, start, end)`: which weights sampled the tokens from `start` up to `end`, in order, where the engine
    says so. More than one where the weights were replaced in flight."""
    request_id: str | None = None
    server: str | None = None
    """Which server answered, where there are servers: its URL, without credentials."""
    timing: RequestTiming | None = None
    error: PromptError | None = None
    """Why the prompt was refused, where it was."""
    rank: int = 0
    """Which of the trainer ranks that share the engine asked for it; 0 where one rank has the engine to itself."""

    @property
    def key(self) -> tuple[int, int, int]:
        """`(rank, prompt_index, generation_index)`: the completion's number, the same as its request's."""
        return self.rank, self.prompt_index, self.generation_index


def none_for_nan(logprobs: list[Any]) -> list[float | None]:
    """`logprobs` as completions hold them: None for a NaN, which comes from logits that overflowed."""
    # A sum is NaN if any of its terms is: one call in C instead of a comparison in Python for each value.
    return [None if value != value else value for value in logprobs] if math.isnan(sum(logprobs)) else logprobs


@dataclass(frozen=True, slots=True)
class Completions(Sequence[Completion]):
    """All completions of one call in prompt order, with the completions of one prompt next to each other.

    `len` is prompts times `num_generations`; completion `i` belongs to prompt `i // num_generations`.
    """

    prompt_ids: list[list[int]]
    """The prompts as token ids, each once; empty for a refused one."""
    completions: list[Completion]
    num_generations: int
    weight_version: str | None
    """Of the engine's weights when the call began."""

    def __len__(self) -> int:
        return len(self.completions)

    @overload
    def __getitem__(self, index: int) -> Completion: ...
    @overload
    def __getitem__(self, index: slice) -> list[Completion]: ...
    def __getitem__(self, index: int | slice) -> Completion | list[Completion]:
        return self.completions[index]

    def __iter__(self) -> Iterator[Completion]:
        return iter(self.completions)

    def group(self, prompt_index: int) -> list[Completion]:
        """The completions of one prompt."""
        start = range(len(self.prompt_ids))[prompt_index] * self.num_generations
        return self.completions[start : start + self.num_generations]

    def padded(self, pad_token_id: int, device: Any = "cpu") -> PaddedBatch:
        """All completions as tensors on `device`, a row for each, with masks; `pad_token_id` fills the rest.

        A refused prompt and its completion are padding only.
        """
        from .padding import padded

        return padded(
            [self.prompt_ids[each.prompt_index] for each in self.completions],
            [each.token_ids for each in self.completions],
            [each.logprobs for each in self.completions],
            arguments.integer("pad_token_id", pad_token_id, least=0, rule="a token id"),
            device,
        )

    @property
    def output_tokens(self) -> int:
        """Tokens of all completions together."""
        return sum(len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a weight sync did."""

    version: str
    bytes: int
    tensors: int
    seconds: float
    verified: Literal["bits", "logprobs", "deferred", "skipped"] | None = None
    """How the engine's weights were verified: `deferred` until the engine is awake, `skipped` because that was not
    possible (the span says why, and the next sync tries again), None if it was not due."""
    audited: bool | None = None
    """Whether every element that was sent is known to reach a parameter of the engine, and that every parameter is
    written. False if that is unknown, as for a server without vgen's plugin; None for an engine that has no audit."""

    @property
    def bandwidth(self) -> float:
        """Bytes for each second of the whole sync."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineVerification:
    """Differences between the log-probabilities of one engine and of the trainer's model, over a probe's tokens."""

    engine: str
    """The engine's kind, or the server's URL."""
    ratio: float
    """How large the differences are, as a multiple of what rounding errors cause in the trainer's own model."""
    decoded_ratio: float
    """The same between the tokens that the engine decoded and its own prefill of them."""
    largest: float
    """In nats."""
    mean: float
    """In nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVerification:
    """Proof that an engine has the weights of the trainer's model as it was at the call: `Generation.verify` found no
    difference beyond rounding."""

    how: Literal["bits", "logprobs"]
    """What was compared: every element in the engine with its source, or log-probabilities."""
    reason: str = ""
    """Why log-probabilities were compared although `bits` was asked for; empty otherwise."""
    tensors: int = 0
    """Tensors that were compared bit by bit."""
    engines: tuple[EngineVerification, ...] = ()
    """For each engine or server, if log-probabilities were compared."""
    bound: float = 0.0
    """What `ratio` and `decoded_ratio` may be at most."""
    unit: float = 0.0
    """The relative rounding error that the differences are measured by: 2⁻⁹ for bf16, 2⁻¹² for float16, 2⁻²⁰ for
    float32 (2⁻¹¹ on a CUDA device), 2⁻⁶ to 2⁻² for quantized engines. For mixture-of-experts models it is
    raised to four times as much, but to no more than 2⁻⁹ and no less than 2⁻¹¹."""
    tokens: int = 0
    """Tokens of the prompt whose log-probabilities were compared."""
    decoded_tokens: int = 0
    """Decoded tokens whose log-probabilities were compared."""

    @property
    def ratio(self) -> float:
        """The largest ratio of all engines, decoding included; 0 if bits were compared."""
        return max((max(each.ratio, each.decoded_ratio) for each in self.engines), default=0.0)

    @property
    def largest(self) -> float:
        """The largest difference of all engines, in nats."""
        return max((each.largest for each in self.engines), default=0.0)

    @property
    def mean(self) -> float:
        """The largest of the engines' mean differences, in nats."""
        return max((each.mean for each in self.engines), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """What going to sleep, or waking up, did."""

    seconds: float = 0.0
    memory_freed: bool = False
    """False on a CPU, where vLLM stops scheduling but keeps its memory."""
    device_bytes: int | None = None
    """Device memory that was freed (sleep) or allocated (wake up), by the device driver; None without a device."""
    host_bytes: int | None = None
    """Host memory that this process allocated for a copy of the weights (sleep) or freed (wake up); None without a
    device."""
    expected: Mapping[str, int] = field(default_factory=dict[str, int])
    """What `device_bytes` should be, by tag (`weights`, `kv_cache`), by the engine's own list; empty without one."""
    taken: Mapping[str, int] = field(default_factory=dict[str, int])
    """Device memory that waking allocated, by tag, by the device driver."""
    device_in_use: int | None = None
    """After a sleep: device memory that all processes use, without what torch's allocator holds in this one."""
