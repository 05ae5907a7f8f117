"""One call of `generate`: its prompts and requests, and the way back from what the engine sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..engines.base import Batch, Cancellation, Request
from ..errors import PromptError
from ..types import Completion, Completions, LoRARequest, Sampling


@dataclass(frozen=True, slots=True)
class Options:
    """What a call asks for besides its prompts."""

    sampling: Sampling
    num_generations: int
    lora_request: LoRARequest | None = None
    priority: int = 0
    cancellation: Cancellation = field(default_factory=Cancellation)

    def terms(self) -> dict[str, Any]:
        """What must be the same on all ranks, by name."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "cancellation"}
        return own | {each.name: getattr(self.sampling, each.name) for each in fields(own.pop("sampling"))}


@dataclass(frozen=True, slots=True)
class Job:
    """One call's prompts, and their place among those of the ranks that share the engine."""

    prompt_ids: list[list[int]]
    """Of this rank, empty for refused ones."""
    errors: dict[int, PromptError]
    good: list[int]
    """The places in `prompt_ids` of those that are not refused."""
    start: int
    """Where they begin among the prompts that this rank's engine is asked for, or that it is given completions of."""
    requests: list[Request]
    """Of all ranks; none on a rank without an engine."""
    options: Options

    def batch(self, headers: Mapping[tuple[int, int], Mapping[str, str]], rest: Mapping[str, str]) -> Batch:
        """For the engine: each request with its own trace context, or with `rest`."""
        options = self.options
        requests = [
            replace(request, headers=headers.get((request.prompt_index, request.generation_index), rest))
            for request in self.requests
        ]
        return Batch(requests, options.sampling, options.lora_request, options.priority, options.cancellation)

    def own_index(self, prompt_index: int) -> int | None:
        """Where the engine's prompt `prompt_index` stands in the caller's list; None for another rank's."""
        place = prompt_index - self.start
        return self.good[place] if 0 <= place < len(self.good) else None

    def owns(self, completion: Completion) -> bool:
        """Whether what the engine has sampled is for this rank."""
        return self.own_index(completion.prompt_index) is not None

    def own(self, completion: Completion) -> Completion:
        """What the engine has sampled, under its prompt's place in the caller's list."""
        index = self.good[completion.prompt_index - self.start]
        error = self.error_of(completion) if completion.error is not None else None
        return replace(completion, prompt_index=index, error=error)

    def error_of(self, completion: Completion) -> PromptError:
        """Why the engine refused it, under its prompt's place in the caller's list; another rank's under its place
        among all ranks' prompts."""
        error, index = completion.error, self.own_index(completion.prompt_index)
        assert error is not None
        own = PromptError(completion.prompt_index if index is None else index, error.problem, error.limit)
        own.__cause__ = error.__cause__
        return own

    def place(self, sampled: Iterable[Completion], version: str) -> Completions:
        """This rank's completions in prompt order, refused prompts marked; what has not been sampled is missing."""
        arrived = {(c.prompt_index, c.generation_index): c for c in map(self.own, filter(self.owns, sampled))}
        placed: list[Completion] = []
        for index in range(len(self.prompt_ids)):
            for generation in range(self.options.num_generations):
                if index in self.errors:
                    placed.append(
                        Completion(
                            prompt_index=index,
                            generation_index=generation,
                            token_ids=[],
                            finish_reason="error",
                            error=self.errors[index],
                        )
                    )
                elif (found := arrived.get((index, generation))) is not None:
                    placed.append(found)
        refused = {completion.prompt_index for completion in placed if completion.error is not None}
        prompt_ids = [[] if index in refused else ids for index, ids in enumerate(self.prompt_ids)]
        return Completions(prompt_ids, placed, self.options.num_generations, version)


def make_requests(
    prompts: Sequence[tuple[list[int], Sequence[Any]]], num_generations: int, seed: int | None
) -> list[Request]:
    """A request for each completion of each prompt, `(token ids, images)`; seeds count up from `seed`."""
    return [
        Request(index, generation, ids, None if seed is None else seed + index * num_generations + generation, images)
        for index, (ids, images) in enumerate(prompts)
        for generation in range(num_generations)
    ]
