"""What an engine's own loader does, recorded on placeholders and proven before it is relied on.

A record is used only where every byte of the model's parameters is accounted for by parts of the source's tensors or
constants, and the engine's own reload of random weights has left exactly what the record says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engines.reload import NamedStream, reload
from .coverage import problem_of, superseded
from .kept import Kept, kept_of
from .live import Places, storage_of
from .recorder import Copy, Fill, Metadata, Recorder, record
from .spoil import RandomWeights
from .trusted import ATTENTION
from .verify import Differences

TOO_MUCH = "it has too much that no loader writes"


class Distrusted(Exception):
    """The record cannot be used; says why, of the model as a whole or by the name of a module or tensor."""

    def __init__(self, why: str | dict[str, str]) -> None:
        self.reasons = why if isinstance(why, dict) else {"": why}
        super().__init__("; ".join(f"{name}: {said}" if name else said for name, said in self.reasons.items()))


@dataclass(frozen=True, slots=True)
class Record:
    """What the loader does, proven."""

    forms: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of the source's tensors, by name."""
    copies: dict[str, list[Copy]]
    """By source, without those that a later one writes over; `twins` has these."""
    fills: list[Fill]
    twins: dict[str, list[Copy]]
    """Copies that another source's copy writes over: as of a tied weight, so both must hold the same."""
    paths: list[str]
    """The destinations' names, by number."""
    tensors: Places
    """Of the parameters, and of the buffers that are loaded."""
    buffers: Places
    """Of the buffers that no loader writes."""
    kept: Kept
    """Of the registered tensors, what no loader writes."""
    shared: set[int] = field(default_factory=set[int])
    """Addresses that have twins."""

    def in_place(self, *, buffers: bool = False) -> bool:
        """Whether the model still has its tensors where they were recorded, or all of its `buffers` too."""
        return self.tensors.kept() and (not buffers or self.buffers.kept())

    def of(self, name: str) -> Iterator[tuple[Copy, bool]]:
        """The copies of a source's tensor, and whether each is the one that counts."""
        yield from ((copy, False) for copy in self.twins.get(name, ()))
        yield from ((copy, True) for copy in self.copies.get(name, ()))


def make_record(model: torch.nn.Module, metadata: Metadata) -> Record:
    """Record the model's loader over its live tensors, without changing them. Raises `Distrusted`."""
    held = list(_registered(model))
    before = [(name, tensor.data_ptr(), tensor.shape) for _, _, name, tensor in held]
    others = _attributes(model)
    try:
        recorder = record(model.load_weights, [tensor.data for *_, tensor in held], metadata)  # pyright: ignore
    except Exception as error:
        raise Distrusted(f"its loader cannot be recorded: {type(error).__name__}") from error
    finally:
        replaced = [entry for entry in held if entry[1].get(entry[2].rpartition(".")[2]) is not entry[3]]
        for _, where, name, tensor in held:
            where[name.rpartition(".")[2]] = tensor
    moved = [
        name for (name, address, shape), (*_, now) in zip(before, held, strict=True) if _moved(now, address, shape)
    ]
    if replaced or moved or len(list(_registered(model))) != len(held):
        raise Distrusted("its loader replaces tensors")
    after = _attributes(model)
    if any(after[key] is not others.get(key) for key in after):
        raise Distrusted("its loader keeps tensors outside parameters")
    return _judged(recorder, held, {name: (tuple(shape), dtype) for name, shape, dtype in metadata})


def _judged(recorder: Recorder, held: list[tuple[Any, Any, str, torch.Tensor]], forms: dict[str, Any]) -> Record:
    paths = [name for _, _, name, _ in held]
    why: dict[str, str] = {paths[target]: reason for target, reason in recorder.spoiled.items()}
    over = superseded(recorder.copies)
    feeds: dict[str, set[int]] = {}
    by_target: dict[int, list[tuple[int, Copy]]] = {}
    for order, copy in enumerate(recorder.copies):
        feeds.setdefault(copy.source, set()).add(copy.target)
        if order not in over:
            by_target.setdefault(copy.target, []).append((order, copy))
    for name, operation in recorder.used.items():
        for target in feeds.get(name, ()):
            why.setdefault(paths[target], f"{operation} on {name} while it is loaded")
        if name not in feeds:
            why.setdefault(name, f"{operation} on it while it is loaded")
    fills = {target: [fill for fill in recorder.fills if fill.target == target] for target in range(len(held))}
    same: dict[tuple[int, int], int] = {}
    for target, (*_, name, tensor) in enumerate(held):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        alias = same.setdefault((tensor.data_ptr(), tensor.numel()), target)
        if alias != target:
            continue
        copies = by_target.get(target, [])
        if (copies or is_parameter) and (problem := problem_of(tensor.data, copies, fills[target])):
            why.setdefault(name, problem)
    if why:
        raise Distrusted(why)
    copies, twins = dict[str, list[Copy]](), dict[str, list[Copy]]()
    for order, copy in enumerate(recorder.copies):
        (twins if order in over else copies).setdefault(copy.source, []).append(copy)
    written = {target for target, found in by_target.items() if found}
    rest = [tensor.data for target, (*_, tensor) in enumerate(held) if target not in written]
    kept = kept_of(tensor for tensor in rest if not _covered(tensor, held, written))
    if kept is None:
        raise Distrusted(TOO_MUCH)
    at = [(where, name.rpartition(".")[2]) for _, where, name, _ in held]
    written |= {target for target, found in fills.items() if found}
    needed = [target in written or isinstance(held[target][3], torch.nn.Parameter) for target in range(len(held))]
    return Record(
        forms=forms,
        copies=copies,
        fills=[fill for fill in recorder.fills if fill.place.numel()],
        twins=twins,
        paths=paths,
        tensors=Places(place for place, is_needed in zip(at, needed, strict=True) if is_needed),
        buffers=Places(place for place, is_needed in zip(at, needed, strict=True) if not is_needed),
        kept=kept,
        shared={copy.place.data_ptr() for found in twins.values() for copy in found},
    )


def check(made: Record, runner: Any, metadata: Metadata, constants: Kept) -> None:
    """Let the engine reload random weights, and compare with what the record says. Raises `Distrusted`.

    Nor may the reload change `constants`.

    Afterwards the engine holds these random weights: they are replaced at once.
    """
    steady = [(tensor, tensor.clone()) for tensor, _ in constants]
    device = next(iter(made.copies.values()))[0].place.device if made.copies else torch.device("cpu")
    # A name that the loader skips may be a tied weight's other name, which the reload, having untied it, would take.
    metadata = [entry for entry in metadata if entry[0] in made.copies or entry[0] in made.twins]
    random = RandomWeights(metadata, device, _seeds(made, metadata))
    try:
        missing = reload(runner, NamedStream(random))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Distrusted(f"the engine's reload fails: {type(error).__name__}") from error
    if missing:
        raise Distrusted({name: "the trainer's model does not provide it" for name in missing})
    if not made.in_place(buffers=True):
        raise Distrusted("the engine's reload replaces tensors")
    differences = Differences()
    for name, tensor in random:
        for copy, _ in made.of(name):
            differences.compare(made.paths[copy.target], copy.place, copy.part.of(tensor))
    for fill in made.fills:
        differences.compare(made.paths[fill.target], fill.place, torch.full_like(fill.place, fill.value))
    for tensor, content in (*made.kept, *steady):
        differences.compare("a tensor that is not loaded", tensor, content)
    if names := differences.names():
        raise Distrusted({name: "the engine's reload leaves something else than the record" for name in names})


def _seeds(made: Record, metadata: Metadata) -> dict[str, int]:
    """One seed for each name; names of one tied weight share it."""
    seeds = {name: index for index, (name, *_) in enumerate(metadata)}
    place: dict[int, str] = {}
    for found in (made.copies, made.twins):
        for name, copies in found.items():
            for copy in copies:
                if copy.place.data_ptr() in made.shared:
                    seeds[name] = seeds[place.setdefault(copy.place.data_ptr(), name)]
    return seeds


def _registered(model: torch.nn.Module) -> Iterator[tuple[Any, Any, str, torch.Tensor]]:
    """Module, dict, full name and tensor of all parameters and buffers."""
    for path, module in model.named_modules():
        for where in (module._parameters, module._buffers):
            for name, tensor in where.items():
                if tensor is not None:
                    yield module, where, f"{path}.{name}" if path else name, tensor


def _plain(holder: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that it keeps as plain attributes, but for the KV cache."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, torch.Tensor) and name != "kv_cache":
            yield name, value


def _attributes(model: torch.nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """The plain tensors of all modules."""
    return {(path, name): value for path, module in model.named_modules() for name, value in _plain(module)}


def constants_of(model: torch.nn.Module) -> Kept | None:
    """Tensors that modules keep as plain attributes, and their attention backends do, as ALiBi's slopes.

    A level-2 sleep discards these as well, and vLLM does not bring them back. Without views of what is registered, the
    KV cache, and what a layer makes anew of its weights after each loading. None where it is too much to keep.
    """
    own = {0, *(storage_of(tensor) for *_, tensor in _registered(model))}
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if hasattr(module, "process_weights_after_loading") and type(module).__name__ not in ATTENTION:
            continue
        for holder in (module, getattr(module, "impl", None)):
            for _, tensor in _plain(holder):
                if storage_of(tensor) not in own:
                    found.setdefault(id(tensor), tensor.data)
    return kept_of(found.values())


def _covered(tensor: torch.Tensor, held: list[tuple[Any, Any, str, torch.Tensor]], written: set[int]) -> bool:
    """Whether it is empty, or lies in the memory of what is loaded: the other name of a tied weight."""
    storages = {held[target][3].untyped_storage().data_ptr() for target in written}
    return not tensor.numel() or tensor.untyped_storage().data_ptr() in storages


def _moved(tensor: torch.Tensor, address: int, shape: torch.Size) -> bool:
    return tensor.is_meta or tensor.data_ptr() != address or tensor.shape != shape
