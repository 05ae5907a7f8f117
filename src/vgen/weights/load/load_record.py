"""A record of what an engine's own loader does, made on placeholders and verified before it is used.

A record is used only if slices of the source's tensors, or constants, account for every byte of the model's parameters,
and if the engine's own reload of random weights leaves exactly what the record says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...engine_protocol import TensorMetadata
from ..source.address_snapshot import TensorAddresses
from ..verification.bit_check import Differences
from .layerwise_reload import NamedStream, reload
from .load_recorder import ConstantFill, LoadRecorder, SliceCopy, record_loader
from .random_weights import RandomWeights
from .tensor_accounting import replay_problem, superseded
from .unloaded_tensors import UnloadedTensors, attribute_tensors, registered_tensors

TOO_MUCH_UNLOADED = "it has too much that no loader writes"

_Registered: TypeAlias = list[tuple[dict[str, Any], str, torch.Tensor]]
"""The dict in which a module registers a tensor, its full name, and the tensor. Its index is its number as a target."""


class UnsafeRecord(Exception):
    """The loader's record cannot be used: the reasons by module or tensor name, or by `""` for the whole model."""

    def __init__(self, reasons: str | dict[str, str]) -> None:
        self.reasons = reasons if isinstance(reasons, dict) else {"": reasons}
        super().__init__("; ".join(f"{name}: {why}" if name else why for name, why in self.reasons.items()))


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """The copies and fills that a model's loader makes."""

    layouts: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of the source's tensors, by name."""
    copies: dict[str, list[SliceCopy]]
    """By source name, without copies that a later one overwrites: those are `twins`."""
    fills: list[ConstantFill]
    twins: dict[str, list[SliceCopy]]
    """Copies that another source's copy overwrites, as of a tied weight: both sources must hold the same values."""
    names: list[str]
    """The names of the destinations, by index."""
    tensors: TensorAddresses
    """The parameters, and the buffers that are loaded."""
    buffers: TensorAddresses
    """The buffers that no loader writes."""
    unloaded: UnloadedTensors
    """The registered tensors that no loader writes, with their content."""
    shared: set[int]
    """The addresses of destinations that have twins."""

    def in_place(self, *, buffers: bool = False) -> bool:
        """Whether the loaded tensors, and with `buffers` also the others, have the addresses that were recorded."""
        return self.tensors.in_place() and (not buffers or self.buffers.in_place())

    def of(self, name: str) -> Iterator[tuple[SliceCopy, bool]]:
        """The copies of the source's tensor `name`, each with whether no other source's copy overwrites it."""
        yield from ((copy, False) for copy in self.twins.get(name, ()))
        yield from ((copy, True) for copy in self.copies.get(name, ()))


def make_record(model: torch.nn.Module, metadata: TensorMetadata) -> LoadRecord:
    """Record the model's loader over its live tensors, without changing them. Raises `UnsafeRecord`."""
    registered = list(registered_tensors(model))
    before = [(tensor.data_ptr(), tensor.shape) for *_, tensor in registered]
    attributes_before = _attributes(model)
    load: Callable[[Any], Any] = model.load_weights  # pyright: ignore[reportAssignmentType]
    try:
        recorder = record_loader(load, [tensor.data for *_, tensor in registered], metadata)
    except Exception as error:
        raise UnsafeRecord(f"its loader cannot be recorded: {type(error).__name__}") from error
    finally:
        replaced = any(table.get(_key(name)) is not tensor for table, name, tensor in registered)
        for table, name, tensor in registered:
            table[_key(name)] = tensor
    moved = any(
        tensor.is_meta or (tensor.data_ptr(), tensor.shape) != was
        for was, (*_, tensor) in zip(before, registered, strict=True)
    )
    if replaced or moved or len(list(registered_tensors(model))) != len(registered):
        raise UnsafeRecord("its loader replaces tensors")
    attributes = _attributes(model)
    if any(attributes[key] is not attributes_before.get(key) for key in attributes):
        raise UnsafeRecord("its loader keeps tensors outside parameters")
    return _record_of(recorder, registered, {name: (tuple(shape), dtype) for name, shape, dtype in metadata})


def _record_of(recorder: LoadRecorder, registered: _Registered, layouts: dict[str, Any]) -> LoadRecord:
    """The record, if it accounts for every byte. Raises `UnsafeRecord`."""
    names = [name for _, name, _ in registered]
    overwritten = superseded(recorder.copies)
    copies, twins = defaultdict[str, list[SliceCopy]](list), defaultdict[str, list[SliceCopy]](list)
    copies_into = defaultdict[int, list[tuple[int, SliceCopy]]](list)
    for order, copy in enumerate(recorder.copies):
        (twins if order in overwritten else copies)[copy.source].append(copy)
        if order not in overwritten:
            copies_into[copy.target].append((order, copy))
    fills_into = defaultdict[int, list[ConstantFill]](list)
    for fill in recorder.fills:
        fills_into[fill.target].append(fill)
    reasons = _operation_problems(recorder, names)
    for name, problem in _coverage_problems(registered, copies_into, fills_into).items():
        reasons.setdefault(name, problem)
    if reasons:
        raise UnsafeRecord(reasons)
    unloaded = _unloaded(registered, set(copies_into))
    if unloaded is None:
        raise UnsafeRecord(TOO_MUCH_UNLOADED)
    loaded, buffers = list[tuple[dict[str, Any], str]](), list[tuple[dict[str, Any], str]]()
    for target, (table, name, tensor) in enumerate(registered):
        is_loaded = target in copies_into or target in fills_into or isinstance(tensor, torch.nn.Parameter)
        (loaded if is_loaded else buffers).append((table, _key(name)))
    return LoadRecord(
        layouts=layouts,
        copies=dict(copies),
        fills=[fill for fill in recorder.fills if fill.place.numel()],
        twins=dict(twins),
        names=names,
        tensors=TensorAddresses(loaded),
        buffers=TensorAddresses(buffers),
        unloaded=unloaded,
        shared={copy.place.data_ptr() for overwritten_copies in twins.values() for copy in overwritten_copies},
    )


def _operation_problems(recorder: LoadRecorder, names: list[str]) -> dict[str, str]:
    """By destination, or by source if it reaches none: operations that are neither views nor plain copies."""
    problems = {names[target]: reason for target, reason in recorder.spoiled.items()}
    targets_of: dict[str, set[int]] = {}
    for copy in recorder.copies:
        targets_of.setdefault(copy.source, set()).add(copy.target)
    for source, operation in recorder.used.items():
        for target in targets_of.get(source, ()):
            problems.setdefault(names[target], f"{operation} on {source} while it is loaded")
        if source not in targets_of:
            problems.setdefault(source, f"{operation} on it while it is loaded")
    return problems


def _coverage_problems(
    registered: _Registered,
    copies_into: dict[int, list[tuple[int, SliceCopy]]],
    fills_into: dict[int, list[ConstantFill]],
) -> dict[str, str]:
    """By destination: bytes of a parameter, or of a buffer that is loaded, that no copy or fill accounts for."""
    problems: dict[str, str] = {}
    seen = set[tuple[int, int]]()
    for target, (_, name, tensor) in enumerate(registered):
        memory = tensor.data_ptr(), tensor.numel()
        if memory in seen:  # the other name of a tied weight
            continue
        seen.add(memory)
        copies, fills = copies_into.get(target, ()), fills_into.get(target, ())
        must_be_whole = copies or isinstance(tensor, torch.nn.Parameter)
        if must_be_whole and (problem := replay_problem(tensor.data, copies, fills)):
            problems[name] = problem
    return problems


def _unloaded(registered: _Registered, targets: set[int]) -> UnloadedTensors | None:
    """The registered tensors that no copy writes, also not under the other name of a tied weight."""
    storages = {registered[target][2].untyped_storage().data_ptr() for target in targets}
    others = [tensor.data for target, (*_, tensor) in enumerate(registered) if target not in targets]
    return UnloadedTensors.of(
        tensor for tensor in others if tensor.numel() and tensor.untyped_storage().data_ptr() not in storages
    )


def verify_record(record: LoadRecord, runner: Any, metadata: TensorMetadata, outside: UnloadedTensors) -> None:
    """Let the engine reload random weights, and compare the result with the record. Raises `UnsafeRecord`.

    The reload must not change the tensors `outside` the modules' registries either. Afterwards the engine holds the
    random weights, so the caller replaces them at once.
    """
    outside_before = [(tensor, tensor.clone()) for tensor, _ in outside]
    differences = Differences()
    for name, tensor in _reload_random_weights(record, runner, metadata):
        for copy, _ in record.of(name):
            differences.compare(record.names[copy.target], copy.place, copy.part.of(tensor))
    for fill in record.fills:
        differences.compare(record.names[fill.target], fill.place, torch.full_like(fill.place, fill.value))
    for tensor, content in (*record.unloaded, *outside_before):
        differences.compare("a tensor that is not loaded", tensor, content)
    if names := differences.names():
        raise UnsafeRecord({name: "the engine's reload leaves something else than the record" for name in names})


def _reload_random_weights(record: LoadRecord, runner: Any, metadata: TensorMetadata) -> RandomWeights:
    """Run the engine's reload; returns the source of the weights that it got. Raises `UnsafeRecord`."""
    device = next(iter(record.copies.values()))[0].place.device if record.copies else torch.device("cpu")
    # A name that the loader skips may be the other name of a tied weight. The reload unties it and would load it.
    metadata = [entry for entry in metadata if entry[0] in record.copies or entry[0] in record.twins]
    random = RandomWeights(metadata, device, _seeds(record, metadata))
    try:
        reload(runner, NamedStream(random))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsafeRecord(f"the engine's reload fails: {type(error).__name__}") from error
    if not record.in_place(buffers=True):
        raise UnsafeRecord("the engine's reload replaces tensors")
    return random


def _seeds(record: LoadRecord, metadata: Sequence[Any]) -> dict[str, int]:
    """One seed for each name; the names of one tied weight share a seed."""
    seeds = {name: index for index, (name, *_) in enumerate(metadata)}
    name_at: dict[int, str] = {}
    for copies_of in (record.copies, record.twins):
        for name, copies in copies_of.items():
            for copy in copies:
                address = copy.place.data_ptr()
                if address in record.shared:
                    seeds[name] = seeds[name_at.setdefault(address, name)]
    return seeds


def _attributes(model: torch.nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors that modules keep as plain attributes, by module path and name."""
    return {
        (path, name): tensor for path, module in model.named_modules() for name, tensor in attribute_tensors(module)
    }


def _key(name: str) -> str:
    """The last part of a full name: the key in the module's dict."""
    return name.rpartition(".")[2]
