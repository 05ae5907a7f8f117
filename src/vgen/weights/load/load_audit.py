"""Whether every element of what a trainer sends reaches a parameter of the engine, and every parameter is written.

Loaders drop tensors without a word: vLLM ignores any bias that a model has no place for, and cuts a matrix that is too
large. So the engine's own loader runs once on placeholders without data, over the model's tensors as they were before
vLLM repacked them, and each element that it reads and writes is counted. Nothing in the engine changes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...engine_protocol import TensorMetadata
from ...errors import WeightSyncError
from .load_observer import LoadObserver, Reads, Shortfall, as_constructed
from .tensor_accounting import Spans

CONSTANTS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of the names of tensors that engines compute from their config and may ignore: tables of rotary positions."""
_ADVICE = (
    "Start the engine for the model as it is now, change the model back, or leave the tensor out on purpose: "
    "source_of(model, include=...)"
)
_QUANTIZED = (
    ". The engine started from a quantized checkpoint: send its scales too, or start it from a checkpoint that is not "
    "quantized, with engine_kwargs={'quantization': 'fp8'} for example, so that it quantizes what it gets"
)


@dataclass(slots=True)
class LoadAudit:
    """What an engine's loader does with the tensors of one source."""

    unread: dict[str, Shortfall] = field(default_factory=dict[str, Shortfall])
    """Tensors of the source of which some element reaches no parameter."""
    unwritten: dict[str, Shortfall] = field(default_factory=dict[str, Shortfall])
    """Parameters of the engine of which some element is not written."""
    overwritten: dict[str, str] = field(default_factory=dict[str, str])
    """Tensors of the source that another one, which is loaded later, overwrites, and that one's name."""
    mistyped: dict[str, str] = field(default_factory=dict[str, str])
    """Tensors of a dtype that the engine's parameter cannot take, and why."""
    narrowed: tuple[str, ...] = ()
    """Tensors that the source keeps in a wider dtype than most of its others, and the engine does not."""
    loaded: dict[str, float] = field(default_factory=dict[str, float])
    """By parameter: the share of its elements that come from the source. The others are constants, as of padding."""
    nameless: frozenset[str] = frozenset()
    """Tensors whose names the loader refuses. They are tied to others, and must not be given to it."""
    skipped: str = ""
    """Why there was no audit; empty if there was one."""

    def report(self) -> dict[str, Any]:
        """What a worker tells the trainer: `unaudited` says why there was no audit, `narrowed` is as here."""
        return {"unaudited": self.skipped, "narrowed": list(self.narrowed)}

    def require(self, ties: Mapping[str, str], receiver: str) -> None:
        """Raise `WeightSyncError` unless everything is accounted for, with the trainer's tensors tied as in `ties`."""
        for name, why in self.mistyped.items():
            raise _error(f"{why}; send it in the dtype that the engine computes in", name, receiver)
        for name, shortfall in self.unread.items():
            if not any(other not in self.unread for other in _tied_to(name, ties)):
                raise _error(_unread_problem(shortfall), name, receiver)
        for name, winner in self.overwritten.items():
            if winner not in _tied_to(name, ties):
                raise _error(_untied_problem(winner), name, receiver)
        for name, shortfall in self.unwritten.items():
            count = f" ({len(self.unwritten)} such)" if len(self.unwritten) > 1 else ""
            problem = f"the trainer's model does not provide it{count}: {shortfall} are loaded"
            problem += f", from {', '.join(shortfall.others[:8])}" if shortfall.others else ""
            problem += _QUANTIZED if name.rpartition(".")[2].startswith(("weight_scale", "input_scale")) else ""
            raise _error(problem, name, receiver)


def _unread_problem(shortfall: Shortfall) -> str:
    if not shortfall.others:
        where = f"the engine's model has no place for it (shape {list(shortfall.shape)}, not tied to another)"
        return f"{where} and would generate without it. {_ADVICE}"
    places = ", ".join(shortfall.others)
    return f"the engine loads only {shortfall}, into {places}. {_ADVICE}"


def _untied_problem(winner: str) -> str:
    return (
        f"the engine keeps one tensor for it and {winner!r}, but the trainer's model has two that are not tied (now). "
        "Tie them, with PEFT by ensure_weight_tying=True, or start the engine from a config with "
        "tie_word_embeddings=False"
    )


def _error(problem: str, name: str | None, receiver: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="load", parameter=name, receiver=receiver)


def _tied_to(name: str, ties: Mapping[str, str]) -> set[str]:
    """The other names that are tied to `name`."""
    first = ties.get(name, name)
    return {first, *(other for other, of in ties.items() if of == first)} - {name}


@torch.no_grad()
def audit_load(model: torch.nn.Module, metadata: TensorMetadata, ties: Mapping[str, str], receiver: str) -> LoadAudit:
    """Run the model's loader on placeholders of `metadata`, and count. Changes nothing.

    A tensor whose name the loader refuses is left out if the trainer ties it to another: an engine that keeps one
    tensor for both may not know the name. Under tensor, pipeline and expert parallelism all ranks call this together:
    an element counts as read if it is on any of them.

    Raises:
        WeightSyncError: The loader refuses a tensor.
    """
    nameless = set[str]()
    while True:
        given = [entry for entry in metadata if entry[0] not in nameless]
        with as_constructed(model) as shared:
            observer = LoadObserver(model, shared)
            error = observer.run(given)
            if error is None:
                audit = _audit_of(observer, given)
                whole = {name: Shortfall(name, tuple(shape), 0) for name, shape, _ in metadata if name in nameless}
                audit.unread, audit.nameless = whole | audit.unread, frozenset(nameless)
                return audit
            if observer.lacks_data(error):
                return LoadAudit(
                    nameless=frozenset(nameless), skipped=f"its loader needs values: {type(error).__name__}"
                )
            refused = observer.last
            if not _tied_to(refused, ties) - nameless:
                raise _error(f"{observer.refusal(error, metadata)}. {_ADVICE}", refused or None, receiver) from error
            nameless.add(refused)


def _audit_of(observer: LoadObserver, metadata: TensorMetadata) -> LoadAudit:
    audit = LoadAudit()
    reads = _on_all_ranks(observer.shortfalls())
    for name, shape, dtype in metadata:
        if name in reads and not name.endswith(CONSTANTS):
            spans, extra = reads[name]
            total, elements = torch.Size(shape).numel(), spans.elements(dtype.itemsize) + extra
            if elements < total:
                audit.unread[name] = Shortfall(name, tuple(shape), elements, observer.places(name))
    audit.unwritten = {shortfall.name: shortfall for shortfall in observer.unwritten()}
    audit.loaded = observer.loaded()
    audit.overwritten = observer.overwritten()
    audit.mistyped = observer.mistyped
    sizes = defaultdict[torch.dtype, int](int)
    for _, shape, dtype in metadata:
        sizes[dtype] += torch.Size(shape).numel()
    usual = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    audit.narrowed = tuple(name for name, _, dtype in metadata if dtype != usual and name in observer.narrowed)
    return audit


def _on_all_ranks(partial: dict[str, Reads]) -> dict[str, Reads]:
    """What is read of tensors that no rank reads as a whole, by all ranks of the engine together."""
    parallel: Any = sys.modules.get("vllm.distributed.parallel_state")
    for group in (parallel._TP, parallel._PP, parallel._EP) if parallel else ():
        if group is not None and group.world_size > 1:
            parts: list[dict[str, Reads]] = [{} for _ in range(group.world_size)]
            torch.distributed.all_gather_object(parts, partial, group=group.cpu_group)
            partial = _together(parts)
    return partial


def _together(parts: Sequence[dict[str, Reads]]) -> dict[str, Reads]:
    """What several ranks read of the tensors that none of them reads as a whole."""
    names = sorted(set.intersection(*map(set, parts)))
    return {name: (Spans.union(p[name][0] for p in parts), sum(p[name][1] for p in parts)) for name in names}
