"""What goes in and what comes out: plain frozen dataclasses, in vLLM's own words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, overload

from .errors import PromptError

STRUCTURES = ("regex", "json", "json_object", "choice", "grammar", "structural_tag")
"""What `Sampling.structured_outputs` may ask for."""

Prompt: TypeAlias = "Sequence[int] | str"
"""Token ids; or text, where the generation object was given a tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled, under the names of vLLM's `SamplingParams`.

    There is no `n`: `num_generations` of `generate` is the one way to ask for several, because vLLM
    reports the timing of only one of `n` siblings. What vLLM has besides goes into `extra`.
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
    stop: Sequence[str] = ()
    """Needs a tokenizer in the engine."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """The first completion's seed; the others of the same call get the numbers that follow, so that a group differs."""
    logprobs: int | None = 0
    """None: none. 0: the sampled token's. N: the N likeliest besides."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for the prompt's own tokens; they are what the model gives, whatever is sampled."""
    structured_outputs: Mapping[str, Any] | None = None
    """What completions must match: `{"regex": ...}`, `{"json": schema}`, `{"choice": [...]}` or `{"grammar": ...}`."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further `SamplingParams`, passed on as they are."""

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) for f in fields(self) if isinstance(v := getattr(self, f.name), float))
        for name, right, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "at least -1 (0 and -1 consider all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "None or at least 0"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "None or at least 0"),
            ("seed", self.seed is None or self.seed >= 0, "None or at least 0"),
            ("structured_outputs", _one_of(self.structured_outputs), f"one of {', '.join(STRUCTURES)}, and no more"),
            ("extra", "n" not in self.extra, "without 'n': pass num_generations to generate()"),
        ):
            if not right or (not finite and isinstance(getattr(self, name), float)):
                raise ValueError(f"Sampling.{name} must be {rule}, got {getattr(self, name)!r}")


def _one_of(structured_outputs: Mapping[str, Any] | None) -> bool:
    return structured_outputs is None or len(structured_outputs.keys() & STRUCTURES) == 1


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
    """From arriving until the front end had the first token: all before it, and its way there."""
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
    """For each position `(token id, log-probability)`, likeliest first, the sampled token among them."""
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


@dataclass(frozen=True, slots=True)
class Completions(Sequence[Completion]):
    """All completions of one call in prompt order, a prompt's own next to each other.

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

    @property
    def bandwidth(self) -> float:
        """Bytes for each second of the whole sync."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """What going to sleep, or waking up, did."""

    seconds: float = 0.0
    memory_freed: bool = False
    """False on a CPU, where vLLM stops scheduling but keeps its memory."""
    device_bytes: int | None = None
    """Given back (sleep) or taken (wake up), read from the device driver; None where there is no device."""
    host_bytes: int | None = None
    """Taken (sleep: the weights' copy) or given back (wake up) by this process; None where there is no device."""
    expected: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tag what `device_bytes` should come to, by the engine's own list; empty where it keeps none."""
    taken: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tag what waking has taken, by the device driver."""
    device_in_use: int | None = None
    """After a sleep: what all processes use, without what torch's allocator holds in this one."""
