"""Seeded requests on a CPU, whose prefill vLLM may cut in two.

After each part of a prefill vLLM samples a token and discards it, and takes the request's random generator back by its
offset. Generators on a CPU have no offset: the engine ends. Here their state is kept instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_seeds(runner: Any) -> None:
    """Make a model runner of vLLM, or its class, put back the generators of requests whose token is discarded.

    Does nothing the second time: vLLM's plugin mends the class, where it is installed, and an engine its own runner.
    """
    if getattr(runner._sample, "keeps_seeds", False):
        return
    runner._sample = _state_kept(runner._sample, runner)
    runner._bookkeeping_sync = _without_discarded(runner._bookkeeping_sync, runner)


def _state_kept(sample: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    def sampled(*args: Any, **kwargs: Any) -> Any:
        generators = _discarded(_runner(owner, args))
        states = {index: generator.get_state() for index, generator in generators.items()}
        result = sample(*args, **kwargs)
        for index, state in states.items():
            generators[index].set_state(state)
        return result

    sampled.keeps_seeds = True  # pyright: ignore[reportFunctionMemberAccess]
    return sampled


def _without_discarded(bookkeeping: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        runner = _runner(owner, args)
        hidden = _discarded(runner)
        for index in hidden:
            del runner.input_batch.generators[index]
        try:
            return bookkeeping(*args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)

    return kept


def _runner(owner: Any, args: tuple[Any, ...]) -> Any:
    """The runner that a call is for: the first argument, where its class was given."""
    return args[0] if isinstance(owner, type) else owner


def _discarded(runner: Any) -> dict[int, Any]:
    """The generators of requests whose sampled token is discarded in this step, by the request's row."""
    batch = runner.input_batch
    mask = runner.discard_request_mask.np[: batch.num_reqs]
    return {index: generator for index, generator in batch.generators.items() if index < len(mask) and mask[index]}
