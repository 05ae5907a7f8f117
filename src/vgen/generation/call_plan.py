"""One call of `generate`: from prompts to the engine's requests, and from sampled completions to the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, TypedDict

from ..distributed.ranks import RankPrompt
from ..engine_protocol import Batch, Cancellation, Request
from ..errors import PromptError
from ..profiling import semconv
from ..types import Completion, Completions, LoRARequest, Prompt, Sampling

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


@dataclass(frozen=True, slots=True)
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


def make_requests(prompts: Iterable[RankPrompt], num_generations: int, seed: int | None) -> list[Request]:
    """A request for each completion of each prompt. Seeds count up from `seed` over the prompts of all ranks."""
    return [
        Request(
            prompt.prompt_index,
            generation,
            prompt.token_ids,
            None if seed is None else seed + place * num_generations + generation,
            prompt.images,
            rank=prompt.rank,
        )
        for place, prompt in enumerate(prompts)
        for generation in range(num_generations)
    ]
