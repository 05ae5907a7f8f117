"""The recorded copy: an engine's own loader runs once on placeholders, and each sync repeats the copies that it made.

A record is used only if every module of the model is on the lists of `weight_layout_allowlist`, and if the record was
verified against the engine's own reload (see `load_record`). Otherwise the weights are loaded by that reload, and the
span says why.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...engine_protocol import InProcess, Source, SourceAddresses, TensorMetadata
from ...errors import WeightSyncError
from ..source.address_snapshot import TensorAddresses
from ..source.module_source import metadata_of
from ..verification.bit_check import NotFinite
from .batched_copy import BatchedCopy, Pair, batched_copy_of, copy_pairs
from .layerwise_reload import Layouts, NamedStream, not_as_said, reload
from .load_audit import LoadAudit, audit_load
from .load_record import TOO_MUCH_UNLOADED, LoadRecord, UnsafeRecord, make_record, verify_record
from .record_replay import RecordReplay
from .reload_check import unchanged_by_reload
from .unloaded_tensors import UnloadedTensors
from .weight_layout_allowlist import layout_change

NOTHING_OUTSIDE = UnloadedTensors(())
"""For a model without tensors outside of its modules' registries."""


class RecordedCopy:
    """Loads weights into the model of one vLLM runner: by a record if that is safe, else by the engine's reload.

    Everything here runs in the worker's process, on the current stream.

    Args:
        receiver: The engine's name in errors.
        transport: `recorded` to refuse a reload, `reload` to always reload, None for whichever is safe.
        outside: The model's tensors outside of its modules' registries (`UnloadedTensors.outside_registries`), taken
            before any sleep discarded them; None if they are too much to keep, which rules out a record.
    """

    def __init__(
        self,
        *,
        receiver: str = "engine",
        transport: InProcess | None = None,
        outside: UnloadedTensors | None = NOTHING_OUTSIDE,
    ) -> None:
        self._receiver, self._transport, self._outside = receiver, transport, outside
        self.reasons: dict[str, str] = {}
        """Why no record is used: by the path of a module or tensor, or by `""` for the model as a whole."""
        self.modules = 0
        """The number of modules that have weights."""
        self.way = ""
        """How the last load was made: `reload`, or the kind of copies that replayed the record."""
        self.audit = LoadAudit(skipped="nothing was loaded yet")
        """What the loader does with the tensors that the source has now."""
        self._layouts: Layouts | None = None
        """Shape and dtype, by name, of the tensors that the audit is of."""
        self._record: LoadRecord | None = None
        self._addresses: SourceAddresses | None = None
        self._batched_copy: BatchedCopy | None = None
        """Repeats the copies from `_source` while the addresses on both sides stay the same."""
        self._largest: tuple[TensorAddresses, TensorAddresses] | None = None
        """The model's and the source's tensors that must be in place before the batched copy starts."""
        self._source: Source | None = None
        self._decided = False
        """Whether it is known that the record is safe, or why not."""
        self._discarded = False
        """Whether a level-2 sleep has discarded the model's memory since the last load."""
        self._replay: RecordReplay | None = None
        """The load in parts that has begun and not ended."""

    @property
    def recorded(self) -> bool:
        """Whether the last load was made by the record."""
        return self._record is not None

    @property
    def undecided(self) -> bool:
        """Whether the next load finds out anew what the loader does, and how weights can be loaded."""
        return not self._decided

    @property
    def reason(self) -> str:
        """Why the last load was a reload, in a few words; empty if it was not."""
        if self._record is not None or not self.reasons:
            return ""
        path, why = next(iter(self.reasons.items()))
        return f"{path}: {why}" if path else why

    def forget(self) -> None:
        """Note that a level-2 sleep has discarded the content of the weights. Their addresses stay."""
        self._discarded = True

    def discard_record(self) -> None:
        """Forget the record, and whether one is safe: the next load finds out again."""
        self._drop_record()
        self._decided = False

    @torch.no_grad()
    def load(self, runner: Any, source: Source, *, verify: bool = False) -> None:
        """Replace the weights.

        With `verify`, and always in the first load, every source is examined for values that are not finite, and
        every destination of a record is compared with its source.

        Raises:
            WeightSyncError: In phase `load`. Before anything in the engine has changed if it is known from names,
                shapes, dtypes and ties. Or in phase `verify`: a destination differs from its source, and the record
                is not used again; or a tensor is not finite.
        """
        if not verify and self._repeat(source):
            runner.reset_lora_state()
            self._discarded = False
            return
        first = self._prepare(runner, self._metadata_of(source), source.ties())
        if self._record is None:
            if self._transport == "recorded":
                self._decided = False
                raise self._error(f"the recorded copy is not safe here: {self.reason}", "load", None)
            self._reload(runner, source, first=first, verify=verify)
            return
        self._restore(self._record)
        self._copy_pass(self._record, source, verify or first)
        runner.reset_lora_state()
        self._discarded = False

    @torch.no_grad()
    def begin(
        self, runner: Any, metadata: TensorMetadata | None, ties: Mapping[str, str], *, verify: bool = False
    ) -> bool:
        """Begin a load whose tensors come in parts, by `take`. False if the caller must use the engine's own reload.

        `metadata` describes all parts together; None if that is unknown. `verify` is as in `load`. Raises as `load`.
        """
        self._batched_copy = self._source = None
        self.way, self._replay = "reload", None
        if metadata is None:
            self.discard_record()
            self.reasons = {"": "the trainer does not say beforehand what it sends"}
            self.audit = LoadAudit(skipped="the trainer does not say beforehand what it sends")
            self._layouts = None
            return False
        first = self._prepare(runner, metadata, ties)
        if self._record is not None:
            self._restore(self._record)
            self.way, self._replay = "foreach", self._replay_of(self._record, parts=True, verify=verify or first)
        elif first:
            self._check_reload(runner)
        return self._record is not None

    @torch.no_grad()
    def take(self, part: Iterable[tuple[str, torch.Tensor]], *, last: bool) -> None:
        """Copy one part. Its memory may be overwritten when the current stream has finished this call's work.

        Raises:
            WeightSyncError: As `load` does; for the last part also if tensors are missing.
        """
        replay = self._replay
        assert replay is not None
        for name, tensor in part:
            self._add(replay, name, tensor)
        replay.copy()
        if last:
            self._require_all(replay)
            self._replay, self._discarded = None, False
            self._require_equal(replay)

    @property
    def under_way(self) -> bool:
        """Whether a load in parts has begun and not ended."""
        return self._replay is not None

    def give_up(self) -> None:
        """End a load in parts: no more parts will come. The weights are then a mix of old and new."""
        self._replay = None

    def _metadata_of(self, source: Source) -> TensorMetadata | None:
        """What the source will yield; None if only a pass can tell. The pass to come must then be like the last."""
        metadata = source.metadata()
        return metadata_of(source) if metadata is None and not self._decided else metadata

    def _prepare(self, runner: Any, metadata: TensorMetadata | None, ties: Mapping[str, str]) -> bool:
        """Make sure that audit and record fit model and source. Returns whether they had to be made anew."""
        if self._discarded and self._outside is not None:
            self._outside.restore()
        layouts = self._layouts if metadata is None else {n: (tuple(shape), dtype) for n, shape, dtype in metadata}
        in_place = self._record is None or self._record.in_place(buffers=self._discarded)
        if not in_place or layouts != self._layouts:
            self.discard_record()
        if not (first := not self._decided):
            self._require_accounted(ties)
            return False
        metadata = [(name, *layout) for name, layout in (layouts or {}).items()]
        self.audit, self._layouts = audit_load(runner.get_model(), metadata, ties, self._receiver), layouts
        self._require_accounted(ties)
        self._decide(runner, [entry for entry in metadata if entry[0] not in self.audit.nameless])
        return first

    def _require_accounted(self, ties: Mapping[str, str]) -> None:
        try:
            self.audit.require(ties, self._receiver)
        except WeightSyncError:
            self.discard_record()
            raise

    def _decide(self, runner: Any, metadata: TensorMetadata) -> None:
        """Record the loader, or find out why that is not safe."""
        self.reasons, self._decided = {}, True
        model = runner.get_model()
        self.modules = sum(bool(module._parameters) for module in model.modules())
        if self._transport == "reload":
            self.reasons = {"": "asked for"}
            return
        self.reasons = {path: why for path, module in model.named_modules() if (why := layout_change(module))}
        if self.reasons:
            return
        if self._outside is None:
            self.reasons = {"": TOO_MUCH_UNLOADED}
            return
        try:
            record = make_record(model, metadata)
            verify_record(record, runner, metadata, self._outside)
            self._record = record
        except UnsafeRecord as error:
            self.reasons = error.reasons
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            self.reasons = {"": "no memory to prove the record"}

    def _drop_record(self) -> None:
        self._record = self._addresses = self._batched_copy = self._source = None

    def _reload(self, runner: Any, source: Source, *, first: bool, verify: bool) -> None:
        self.way = "reload"
        if first:
            self._check_reload(runner)
        stream = NamedStream(source, **self.stream_options(finite=first or verify))
        try:
            reload(runner, stream)
        except WeightSyncError as error:
            raise self._error(error.problem, error.phase, error.parameter) from error.__cause__
        except Exception as error:
            raise self._error(f"{type(error).__name__}: {error}", "load", stream.last) from error
        self.require_finite(stream.not_finite)

    def stream_options(self, *, finite: bool) -> dict[str, Any]:
        """For the `NamedStream` of a reload."""
        return {"layouts": self._layouts, "without": self.audit.nameless, "finite": finite}

    def _check_reload(self, runner: Any) -> None:
        """Have the engine reload random weights twice, and raise if parts of what its kernels read stay as they are.

        The engine then holds random weights, so that a probe sees whatever the true reload fails to replace.
        """
        try:
            metadata = [(name, *layout) for name, layout in (self._layouts or {}).items()]
            unchanged = unchanged_by_reload(runner, metadata, self.audit)
        except WeightSyncError:
            self.discard_record()
            raise
        except Exception as error:  # if it comes again with the true weights, it names the tensor
            self.audit.skipped = f"the engine does not reload random weights: {type(error).__name__}"
            return
        if unchanged:
            self.discard_record()  # the next sync must find out again
            problem = f"the engine's reload leaves old values in it ({', '.join(unchanged[:10])})"
            raise self._error(f"{problem}; generation would go on with them", "load", unchanged[0])

    def require_written(self, model: torch.nn.Module, given: Layouts) -> None:
        """After a load of tensors that were not announced: raise if there is a parameter that none of them wrote."""
        audit = audit_load(model, [(name, *layout) for name, layout in given.items()], {}, self._receiver)
        audit.unread, audit.overwritten = {}, {}  # it is unknown which of the trainer's tensors are tied
        audit.require({}, self._receiver)

    def require_finite(self, checked: NotFinite | None) -> None:
        """Raise if a tensor that was examined holds a NaN or an infinity."""
        if names := list(checked.names()) if checked is not None else []:
            more = f" (nor are {len(names) - 1} more: {', '.join(names[1:10])})" if len(names) > 1 else ""
            raise self._error(f"it is not finite: it holds a NaN or an infinity{more}", "verify", names[0])

    def _restore(self, record: LoadRecord) -> None:
        """Write what does not come from a source."""
        if self._discarded:
            record.unloaded.restore()
        for fill in record.fills:
            fill.place.fill_(fill.value)

    def _repeat(self, source: Source) -> bool:
        """Run the batched copy without a pass over the source; False if a pass is needed.

        The device copies the largest tensors, if they are in place, while the others are checked.
        """
        batched, addresses, record = self._batched_copy, self._addresses, self._record
        if batched is None or addresses is None or record is None or self._source is not source:
            return False
        if started := not self._discarded and self._largest is not None and all(a.in_place() for a in self._largest):
            self._restore(record)
            batched.start()
        elif self._discarded and self._outside is not None:
            self._outside.restore()
        if not (addresses.in_place() and record.in_place(buffers=self._discarded)):
            return False
        if started:
            batched.finish()
        else:
            self._restore(record)
            batched.run()
        if unchanged := addresses.unchanged():  # checked while the device copies
            self.way = batched.how
            source.seconds = 0.0  # there was no pass; `bytes` and `tensors` are those of the last one
        return unchanged

    def _copy_pass(self, record: LoadRecord, source: Source, verify: bool) -> None:
        """One pass over the source. Tensors in the trainer's live memory are copied together at its end."""
        self._batched_copy = None
        addresses = source.address_snapshot()
        replay = self._replay_of(record, addresses=addresses, verify=verify)
        for name, tensor in source:
            self._add(replay, name, tensor)
        self._require_all(replay)
        self._copy_waiting(record, replay.waiting, addresses if replay.all_in_place else None)
        if replay.from_host:
            # A copy from pinned memory is asynchronous, and the trainer may write there as soon as the sync returns.
            torch.cuda.current_stream().synchronize()
        self._source = source
        replay.compare()
        self._require_equal(replay)

    def _replay_of(self, record: LoadRecord, **options: Any) -> RecordReplay:
        return RecordReplay(record, nameless=self.audit.nameless, **options)

    def _copy_waiting(self, record: LoadRecord, waiting: list[Pair], addresses: SourceAddresses | None) -> None:
        """Make the copies that wait. From the second pass at the same addresses on, a batched copy is kept for them."""
        repeated = addresses is not None and addresses.same_as(self._addresses)
        self._addresses = addresses
        if repeated and addresses is not None and waiting and (batched := batched_copy_of(waiting)) is not None:
            self._batched_copy, self.way = batched, batched.how
            self._largest = _largest_tensors(record, batched, addresses)
            return
        self.way = "foreach"
        copy_pairs(waiting)

    def _add(self, replay: RecordReplay, name: str, tensor: torch.Tensor) -> None:
        if not replay.add(name, tensor):
            self.discard_record()
            raise self._error(not_as_said(self._layouts or {}, name, tensor), "load", name)

    def _require_all(self, replay: RecordReplay) -> None:
        if missing := replay.missing():
            problem = f"the trainer's model does not provide it ({len(missing)} such)"
            raise self._error(problem, "load", missing[0])

    def _require_equal(self, replay: RecordReplay) -> None:
        self.require_finite(replay.not_finite)
        self._require_none(replay.differences.names(), "it differs from its source")

    def _require_none(self, names: Sequence[str], problem: str) -> None:
        if names:
            self._drop_record()
            self.reasons = {name: problem for name in names}
            more = f" (as do {len(names) - 1} more: {', '.join(names[1:10])})" if len(names) > 1 else ""
            raise self._error(problem + more, "verify", names[0])

    def _error(self, problem: str, phase: str, parameter: str | None) -> WeightSyncError:
        return WeightSyncError(problem, phase=phase, parameter=parameter, receiver=self._receiver)

    @property
    def comparable(self) -> LoadRecord | None:
        """The record of the last load, if what it wrote is in place still and can be compared with a source."""
        return self._record if self._record is not None and not self._discarded and self._record.in_place() else None


def _largest_tensors(
    record: LoadRecord, batched: BatchedCopy, addresses: SourceAddresses
) -> tuple[TensorAddresses, TensorAddresses] | None:
    """The tensors on both sides that the start of the batched copy and the fills use; None if some are not known."""
    storages = batched.largest | {fill.place.untyped_storage().data_ptr() for fill in record.fills}
    of_model, of_source = record.tensors.within(storages), addresses.tensor_addresses.within(storages)
    return (of_model, of_source) if of_model.storages() | of_source.storages() == storages else None
