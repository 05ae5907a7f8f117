"""Sources of weights: a trainer's model, or any re-iterable of named tensors, as a stream for the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, ItemsView, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from ...engine_protocol import ProbeLogprobs, Source, TensorMetadata
from .gather_error import gather_error

if TYPE_CHECKING:
    import torch

    from .address_snapshot import AddressSnapshot
    from .gather_plan import ConversionStep, GatherPlan
    from .parameter_gather import Weight

NamedTensors: TypeAlias = "Iterable[tuple[str, torch.Tensor]]"
"""Checkpoint names with their tensors."""


def source_of(
    weights: torch.nn.Module | Source | NamedTensors | Mapping[str, torch.Tensor],
    *,
    include: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Source:
    """A source of `weights`: of a module, or of named tensors that can be iterated again. A source is returned as is.

        source = source_of(model, include=lambda name: name != "lm_head.weight")
        generation = ColocateGeneration(source)

    A module's tensors are those of its checkpoint. The module may be plain, compiled, in DDP, FSDP1, FSDP2 or DeepSpeed
    ZeRO-3, with PEFT adapters (merged into copies) on any of these, or quantized with bitsandbytes (dequantized). Each
    pass looks at the module again.

    Args:
        weights: A module, a `Source`, a mapping of names to tensors, or a re-iterable of `(name, tensor)`.
        include: For a module: whether the tensor of this checkpoint name is sent.
        rename: For a module: the name to send the tensor of this checkpoint name under.

    Raises:
        TypeError: `weights` is none of these, or can be iterated only once, as a generator.
        ValueError: `include` or `rename` is given for something other than a module.
    """
    given: Any = weights
    if hasattr(given, "named_parameters"):  # a module, by what it can do: this file does not load torch
        return ModuleSource(given, include=include, rename=rename)
    if include is not None or rename is not None:
        raise ValueError("include and rename need a module: a source has its own include and rename")
    if isinstance(given, Source):
        return given
    if not isinstance(given, Iterable) or iter(given) is given:
        problem = f"no source of weights: {type(given).__name__}"
        raise TypeError(f"{problem}; give a module, or (name, tensor) pairs that iterate repeatedly")
    return IterableSource(given.items() if isinstance(given, Mapping) else given)


class IterableSource(Source):
    """A re-iterable of `(name, tensor)`, such as a list or one of vLLM's own weight sources."""

    def __init__(self, iterable: NamedTensors) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.bytes, self.tensors, self.seconds = 0, 0, 0.0
        return _counted(self, self._iterable)

    def metadata(self) -> TensorMetadata | None:
        # vLLM's weight sources have this method too; it returns objects with these attributes.
        describe: Any = getattr(self._iterable, "metadata", None)
        if describe is None:
            return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._all_at_once()] or None
        return [(e.name, tuple(e.shape), e.dtype) if hasattr(e, "dtype") else tuple(e) for e in describe()]

    def ties(self) -> dict[str, str]:
        """Known for lists and mappings, whose tensors all exist at once; others may reuse an address."""
        first: dict[Any, str] = {}
        layouts = {n: (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for n, t in self._all_at_once() if t.numel()}
        return {n: first[key] for n, key in layouts.items() if first.setdefault(key, n) != n}

    def _all_at_once(self) -> NamedTensors:
        """The tensors if they all exist; nothing if they may be made one by one."""
        return self._iterable if isinstance(self._iterable, Sequence | ItemsView) else ()


class ModuleSource(Source):
    """All weights of a module: what `save_pretrained` writes, and tied weights under their other names too.

    A tied weight is sent under each of its names: an engine that has untied its output head would silently keep the
    old one. Buffers are sent if the checkpoint has them.

    All ranks of a sharded model iterate together, because each step gathers. Ranks without a receiver iterate too. If a
    receiver fails, its rank must still finish the iteration; `one_pass` does that. A tensor is either a view of a live
    parameter, in which later training shows, or owns its storage and is valid as long as it is referenced. No gather
    context is open while the receiver has a tensor.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        include: Callable[[str], bool] | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self._model, self._include, self._rename = model, include, rename
        self._plan: GatherPlan | None = None
        self._open_pass: _Pass | None = None
        self.was_collective = None

    @property
    def model(self) -> torch.nn.Module:
        """The trainer's module, in all its wrappers."""
        return self._model

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of all that a pass yields, in order. Gathers nothing and needs no other rank."""
        plan, _ = self._look()
        return [(name, tuple(tensor.meta.shape), tensor.meta.dtype) for name, tensor in plan.checkpoint_tensors]

    def ties(self) -> dict[str, str]:
        return self._look()[0].ties

    @property
    def collective(self) -> bool:
        """Whether all trainer ranks must iterate together. Looks at the model again, which takes milliseconds."""
        self._look()
        return bool(self.was_collective)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _counted(self, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        this_pass = self._begin()
        for step, tensors in this_pass.steps():
            for item in step.run(tensors):
                yield item
                if self._open_pass is not this_pass:
                    raise gather_error("another pass was started before this one had ended")
        self._open_pass = None

    def drain(self) -> None:
        """Take part in the collectives that the last pass still has, if its receiver stopped in the middle.

        Other ranks wait in those collectives, so the rank that stopped calls this at once. A new pass calls it first.
        Does nothing if nothing is sharded.
        """
        open_pass, self._open_pass = self._open_pass, None
        if open_pass is not None:
            open_pass.drain()

    def take_part(self) -> None:
        self._begin()
        self.drain()

    def probe_logprobs(self, token_ids: list[int], unit: float = 0.0) -> ProbeLogprobs:
        from .probe_forward import probe_logprobs

        return probe_logprobs(self.model, token_ids, unit)

    def logprobs(self, token_ids: list[int], temperature: float = 1.0) -> list[float]:
        from .probe_forward import model_logprobs

        return model_logprobs(self.model, token_ids, temperature)

    def address_snapshot(self) -> AddressSnapshot | None:
        from .address_snapshot import AddressSnapshot

        return AddressSnapshot.of(self.model)

    def _begin(self) -> _Pass:
        self.drain()
        self.bytes, self.tensors, self.seconds = 0, 0, 0.0
        self.passes += 1
        self._open_pass = _Pass(*self._look())
        return self._open_pass

    def _look(self) -> tuple[GatherPlan, list[Weight]]:
        from .gather_plan import gather_plan_of

        self._plan, weights = gather_plan_of(self.model, self._plan, self._include, self._rename)
        self.was_collective = any(weight.collective for weight in weights)
        return self._plan, weights


class _Pass:
    """One walk over a gather plan: gathers batch by batch, and hands each step the tensors that it needs."""

    def __init__(self, plan: GatherPlan, weights: Sequence[Weight]) -> None:
        self._batches = iter(plan.batches)
        self._weights = weights

    def steps(self) -> Iterator[tuple[ConversionStep, dict[int, torch.Tensor]]]:
        for batch in self._batches:
            tensors = self._gather(batch)
            for step in batch:
                yield step, {index: tensors.pop(index) for index in step.inputs}

    def drain(self) -> None:
        for batch in self._batches:
            if any(self._weights[index].collective for step in batch for index in step.inputs):
                self._gather(batch)

    def _gather(self, batch: Sequence[ConversionStep]) -> dict[int, torch.Tensor]:
        from .parameter_gather import gather

        indices = list(dict.fromkeys(index for step in batch for index in step.inputs))
        try:
            return dict(zip(indices, gather([self._weights[index] for index in indices]), strict=True))
        except BaseException:
            self._batches = iter(())  # it is unknown in which collective the other ranks are now
            raise


def _counted(source: Source, items: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The items of one pass, counted in the source; its seconds exclude what the receiver does between two items."""
    start = time.monotonic()
    for name, tensor in items:
        source.bytes += tensor.numel() * tensor.element_size()
        source.tensors += 1
        source.seconds += time.monotonic() - start
        yield name, tensor
        start = time.monotonic()
    source.seconds += time.monotonic() - start


@contextmanager
def one_pass(source: Source) -> Generator[None]:
    """A block that iterates `source` once, or fails before or during that.

    All ranks enter it together, each with its own receiver. When a rank leaves the block, also by an error, it has
    taken part in every collective of the pass, so that no other rank waits for it. An interrupt leaves at once.
    """
    passes_before = source.passes
    try:
        yield
    except Exception as error:
        try:
            if source.collective:
                _complete_pass(source, passes_before)
        except Exception as other:
            error.add_note(f"and the pass could not be ended for the other ranks: {other}")
        raise
    # A receiver that needed no pass has seen that the model is in place, so the model need not be looked at again.
    if source.was_collective is not False:
        _complete_pass(source, passes_before)


def _complete_pass(source: Source, passes_before: int) -> None:
    source.take_part() if source.passes == passes_before else source.drain()


def metadata_of(source: Source) -> TensorMetadata:
    """Name, shape and dtype of what a pass yields, by making a pass if the source cannot say so beforehand."""
    if (metadata := source.metadata()) is not None:
        return metadata
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in source]


def engine_dtype(source: Source) -> str:
    """The dtype that most of the weights have, by torch's name without its prefix; `auto` if no weight is a float."""
    elements: Counter[str] = Counter()
    for _, shape, dtype in metadata_of(source):
        if dtype.is_floating_point:
            elements[str(dtype).removeprefix("torch.")] += prod(shape)
    return elements.most_common(1)[0][0] if elements else "auto"
