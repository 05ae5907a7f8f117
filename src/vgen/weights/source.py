"""The trainer's model as a re-iterable stream of `(checkpoint name, full tensor)`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import WeightSyncError

if TYPE_CHECKING:
    import torch

    from ..engines.base import Source
    from .plan import Plan
    from .probe import Said
    from .sharded import Weight


def source_of(
    model: torch.nn.Module | ModuleSource,
    *,
    include: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
) -> ModuleSource:
    """The weights of `model` as its checkpoint would hold them, whatever it is wrapped, sharded or adapted with.

    It may be a plain module, compiled, in DDP, FSDP1, FSDP2 or DeepSpeed ZeRO-3, with PEFT adapters (merged into
    copies) on any of these, or quantized with bitsandbytes (dequantized). The model is looked at anew in each pass.
    `include` says of a checkpoint name whether it is sent; `rename` gives the name to send it under. A source is
    returned as it is.
    """
    if isinstance(model, ModuleSource):
        if include is not None or rename is not None:
            raise ValueError("a source has its own include and rename: give the model")
        return model
    return ModuleSource(model, include=include, rename=rename)


class ModuleSource:
    """All weights of a model, each time it is iterated: what `save_pretrained` writes, plus tied weights' other names.

    A tied weight comes under each of its names: an engine that has untied its output head would keep the old one
    otherwise, without a word. Buffers come where the checkpoint has them.

    All ranks of a sharded model iterate together, for every step gathers; ranks with nothing to send just iterate,
    and one whose receiver fails must go on to the end: that is `one_pass`. A tensor is promised until the next
    iteration. It is a view of a live parameter where that is whole, so that later training shows in it; else it owns
    its storage and is good for as long as it is held. No gather context is ever open while a tensor is handed out.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        include: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self.model = model
        """The trainer's, in whatever it is wrapped."""
        self._include, self._rename = include, rename
        self._plan: Plan | None = None
        self._left: _Pass | None = None
        self.was_collective: bool | None = None
        """`collective` when the model was last looked at, which takes some milliseconds."""
        self.passes = 0
        """How many have been started."""
        self.bytes = 0
        """Sent in the last pass, with `tensors`."""
        self.tensors = 0
        self.seconds = 0.0
        """Spent in the last pass on getting the tensors, apart from what their receiver did with them."""

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of all that a pass yields, in its order. Gathers nothing and needs no other rank."""
        plan, _ = self._look()
        return [(name, tuple(target.meta.shape), target.meta.dtype) for name, target in plan.targets]

    @property
    def collective(self) -> bool:
        """Whether all ranks must iterate together."""
        self._look()
        return bool(self.was_collective)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        start = time.monotonic()
        this = self._begin()
        for step, tensors in this.steps():
            for name, tensor in step.run(tensors):
                self.bytes += tensor.numel() * tensor.element_size()
                self.tensors += 1
                self.seconds += time.monotonic() - start
                yield name, tensor
                if self._left is not this:
                    raise WeightSyncError(
                        "another pass was started before this one had ended", phase="gather", receiver="trainer"
                    )
                start = time.monotonic()
        self._left = None
        self.seconds += time.monotonic() - start

    def drain(self) -> None:
        """Take part in what the last pass still has to gather, where its receiver left it in the middle.

        Other ranks wait in those collectives. To be called on the rank that left, as soon as it has; a new pass
        does it first of all. Nothing happens where nothing is sharded.
        """
        left, self._left = self._left, None
        if left is not None:
            left.drain()

    def take_part(self) -> None:
        """A pass without a receiver."""
        self._begin()
        self.drain()

    def ask(self, token_ids: list[int]) -> Said:
        """What the model itself gives to these tokens. All ranks of a sharded model ask together."""
        from .probe import ask

        return ask(self.model, token_ids)

    def _begin(self) -> _Pass:
        self.drain()
        self.bytes, self.tensors, self.seconds = 0, 0, 0.0
        self.passes += 1
        self._left = _Pass(*self._look())
        return self._left

    def _look(self) -> tuple[Plan, list[Weight]]:
        from .plan import look

        self._plan, weights = look(self.model, self._plan, self._include, self._rename)
        self.was_collective = any(weight.collective for weight in weights)
        return self._plan, weights


class _Pass:
    """One walk over a plan: what is gathered together is, and a step gets the tensors that it needs."""

    def __init__(self, plan: Plan, weights: Sequence[Weight]) -> None:
        self._batches = iter(plan.batches)
        self._weights = weights

    def steps(self) -> Iterator[tuple[Any, dict[int, torch.Tensor]]]:
        for batch in self._batches:
            tensors = self._gather(batch)
            for step in batch:
                yield step, {index: tensors.pop(index) for index in step.inputs}

    def drain(self) -> None:
        for batch in self._batches:
            if any(self._weights[index].collective for step in batch for index in step.inputs):
                self._gather(batch)

    def _gather(self, batch: Sequence[Any]) -> dict[int, torch.Tensor]:
        from .sharded import gather

        indices = list(dict.fromkeys(index for step in batch for index in step.inputs))
        try:
            return dict(zip(indices, gather([self._weights[index] for index in indices]), strict=True))
        except BaseException:
            self._batches = iter(())  # nobody can say where the other ranks are now
            raise


@contextmanager
def one_pass(source: Source) -> Generator[None]:
    """Around what iterates `source` once, or fails before or while it does.

    All ranks enter it together, each with a receiver of its own. Whatever that does within, its rank has taken part
    in every collective of the pass when it leaves, so that no other rank waits for it. An interrupt leaves at once.
    """
    before = source.passes if isinstance(source, ModuleSource) else 0
    try:
        yield
    except Exception as error:
        try:
            _take_part(source, before, getattr(source, "collective", False))
        except Exception as other:
            error.add_note(f"and the pass could not be ended for the other ranks: {other}")
        raise
    # A receiver that needed no pass at all has seen that the model is where it was.
    _take_part(source, before, getattr(source, "was_collective", None) is not False)


def _take_part(source: Source, before: int, collective: bool) -> None:
    if isinstance(source, ModuleSource) and collective:
        source.take_part() if source.passes == before else source.drain()


def engine_dtype(source: ModuleSource) -> str:
    """The dtype that most of the weights have, under torch's name without its prefix."""
    elements: Counter[str] = Counter()
    for _, shape, dtype in source.metadata():
        if dtype.is_floating_point:
            elements[str(dtype).removeprefix("torch.")] += prod(shape)
    return elements.most_common(1)[0][0] if elements else "auto"


def model_of(source: Any) -> torch.nn.Module | None:
    """The trainer's module that a source reads, where it says so."""
    import torch

    found = getattr(source, "model", None)
    return found if isinstance(found, torch.nn.Module) else None
