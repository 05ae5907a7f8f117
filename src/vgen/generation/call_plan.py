"""One call of `generate`: from prompts to the engine's requests, and from sampled completions to the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, TypedDict

from .. import arguments
from ..distributed.ranks import RankPrompt
from ..engine_protocol import Batch, Cancellation, Request
from ..errors import ArgumentError, PromptError
from ..profiling import semconv
from ..types import Completion, Completions, LoRARequest, Prompt, Sampling

PLACES = 1 << 20
"""How many places of prompts there are for each engine."""
Images: TypeAlias = "Sequence[Sequence[Any] | None] | None"
"""The images of each prompt, if any prompt has images."""
Refused: TypeAlias = Literal["raise", "mark"]
"""What to do about a prompt that cannot be generated from: raise `PromptError`, or mark its completions with it."""


class CallOptions(TypedDict, total=False):
    """Options of every call that generates. `Generation.generate` explains them."""

    images: Images
    lora_request: LoRARequest | None
    priority: int
    refused: Refused


@dataclass(slots=True)  # not frozen, which would double the time of a call's checks
class CallRequest:
    """The arguments of one `Generation.generate` or `stream`, which explains them."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    num_generations: int
    images: Images = None
    lora_request: LoRARequest | None = None
    priority: int = 0
    refused: Refused = "raise"
    cancellation: Cancellation = field(default_factory=Cancellation)
    """Another thread may stop the call through it."""

    @classmethod
    def of(
        cls,
        prompts: Any,
        sampling: Any,
        num_generations: Any,
        images: Any = None,
        lora_request: Any = None,
        priority: Any = 0,
        refused: Any = "raise",
        **unknown: Any,
    ) -> CallRequest:
        """The request of a call with these arguments, all checked. Raises `ArgumentError`."""
        if unknown:
            arguments.refuse_unknown("generate", unknown, CallOptions.__annotations__)
        listed = prompt_list(prompts)
        if images is not None:
            if not isinstance(images, Sequence) or isinstance(images, str | bytes):
                raise ArgumentError("images", f"must be a list of images for each prompt, got {type(images).__name__}")
            if len(images) != len(listed):
                raise ArgumentError("images", f"must hold a list for each of {len(listed)} prompts, got {len(images)}")
            if any(each is not None and not isinstance(each, list | tuple) for each in images):
                raise ArgumentError(
                    "images", "must hold a list for each prompt, also for a single image: [[image], ...]"
                )
        return cls(
            listed,
            Sampling.of(sampling),
            arguments.integer("num_generations", num_generations, least=1),
            images,
            _lora_request(lora_request),
            arguments.integer("priority", priority, least=-arguments.INT32, rule="an integer"),
            arguments.one_of("refused", refused, ("raise", "mark")),
        )

    def attributes(self) -> dict[str, int]:
        """The attributes that the call's span has from its start."""
        return {semconv.PROMPTS: len(self.prompts), semconv.NUM_GENERATIONS: self.num_generations}

    def terms(self) -> dict[str, Any]:
        """What must be the same on all ranks, by name."""
        sampling = {each.name: getattr(self.sampling, each.name) for each in fields(self.sampling)}
        return {name: getattr(self, name) for name in ("num_generations", "lora_request", "priority")} | sampling


@dataclass(frozen=True, slots=True)
class CallPlan:
    """One call's prompts and the requests that go to this rank's engine.

    A completion is numbered as its caller numbered it, everywhere: by the rank that asks for it, the place of its
    prompt in that caller's list, and its place among the prompt's completions.
    """

    prompt_ids: list[list[int]]
    """The token ids of this rank's prompts, empty for those that vgen refused."""
    errors: Mapping[int, PromptError]
    """Why vgen refused prompts of this rank, by their place in the caller's list."""
    requests: Sequence[Request]
    """The requests of all ranks that share the engine; none on a rank without an engine."""
    request: CallRequest

    def batch(self, headers: Mapping[tuple[int, int, int], Mapping[str, str]], default: Mapping[str, str]) -> Batch:
        """The requests as the engine takes them, each with the trace context of its key, or with `default`."""
        requests = [replace(request, headers=headers.get(request.key, default)) for request in self.requests]
        call = self.request
        return Batch(requests, call.sampling, call.lora_request, call.priority, call.cancellation)

    def result(self, sampled: Iterable[Completion], version: str) -> Completions:
        """This rank's completions in prompt order.

        The completions of refused prompts carry the error; those that the engine has not sampled are missing.
        """
        count = self.request.num_generations
        by_place = {(completion.prompt_index, completion.generation_index): completion for completion in sampled}
        for index, error in self.errors.items():
            for generation in range(count):
                by_place[index, generation] = Completion(
                    prompt_index=index, generation_index=generation, token_ids=[], finish_reason="error", error=error
                )
        refused = {index for (index, _), completion in by_place.items() if completion.error is not None}
        prompt_ids = [[] if index in refused else ids for index, ids in enumerate(self.prompt_ids)]
        return Completions(prompt_ids, [by_place[place] for place in sorted(by_place)], count, version)


def prompt_list(prompts: Any) -> list[Any]:
    """`prompts` as a list with an item for each. Raises `ArgumentError` for one prompt, or what is not prompts."""
    if type(prompts) is list and prompts:  # what nearly all calls pass; other questions take a microsecond
        first = prompts[0]
        if type(first) is str or (type(first) is list and first and type(first[0]) is int):
            return prompts.copy()
    return _prompt_list(prompts)


def _prompt_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | bytes):
        raise ArgumentError("prompts", "must be a list of prompts, got one text: pass [text]")
    if hasattr(prompts, "keys"):  # a dict, or what a tokenizer returns
        fix = "pass its ['input_ids'], without padding" if "input_ids" in prompts else "pass a list of prompts"
        raise ArgumentError("prompts", f"must be a list of prompts, got a {type(prompts).__name__}: {fix}")
    if hasattr(prompts, "tolist"):
        if getattr(prompts, "ndim", 0) == 1:
            raise ArgumentError("prompts", "must be a list of prompts, got the token ids of one: pass [token_ids]")
        kind = type(prompts).__name__
        raise ArgumentError(
            "prompts", f"must be a list, got a {kind}: pass a list of token ids without padding for each"
        )
    if not isinstance(prompts, Iterable):
        raise ArgumentError("prompts", f"must be a list of prompts, got {arguments.shown(prompts)}")
    listed: list[Any] = list(prompts)
    first = listed[0] if listed else None
    if isinstance(first, Mapping):
        raise ArgumentError("prompts", "must be texts or token ids, got the messages of a conversation: use chat()")
    if isinstance(first, list | tuple) and first and isinstance(first[0], Mapping):
        raise ArgumentError("prompts", "must be texts or token ids, got conversations: use chat()")
    if isinstance(first, int) or (hasattr(first, "__index__") and getattr(first, "ndim", 0) == 0):
        raise ArgumentError("prompts", "must be a list of prompts, got the token ids of one: pass [token_ids]")
    return listed


def _lora_request(value: Any) -> LoRARequest | None:
    if value is None or isinstance(value, LoRARequest):
        return value
    if type(value).__name__ == "LoRARequest":  # vLLM's
        return LoRARequest(lora_name=value.lora_name, lora_path=value.lora_path)
    raise ArgumentError("lora_request", f"must be a vgen.LoRARequest, got a {type(value).__name__}")


def make_requests(
    prompts: Iterable[RankPrompt], num_generations: int, seed: int | None, engine: int = 0
) -> list[Request]:
    """A request for each completion of each prompt. `prompts` are those of all ranks that share the engine.

    Their places make the seeds. Those of the engine with number N count from N · `PLACES`, so that ranks with engines
    of their own need not know of one another how many prompts they have.
    """
    return [
        Request(
            prompt.prompt_index,
            generation,
            prompt.token_ids,
            None if seed is None else request_seed(seed, engine * PLACES + place, generation),
            prompt.images,
            rank=prompt.rank,
        )
        for place, prompt in enumerate(prompts)
        for generation in range(num_generations)
    ]


def request_seed(seed: int, place: int, generation: int) -> int:
    """The seed of one request: the call's own for the first, and for others 63 bits of a hash (BLAKE2b).

    Sums would repeat: `seed + 1`, as the next step may pass, would sample nearly the same completions again.
    """
    if place == generation == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{place}/{generation}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
