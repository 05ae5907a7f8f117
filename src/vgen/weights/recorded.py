"""The recorded copy: an engine's own loader runs once on placeholders, and its copies are made again at each sync.

A record is used only where every module of the model is on the lists of `trusted` and it was proven (see `proven`).
Anything else takes the engine's own reload, with the reason on the span.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

from ..engines.base import InProcess
from ..engines.reload import NamedStream, reload
from ..errors import WeightSyncError
from .kept import Kept
from .live import Live, Located, Places
from .mover import Mover, copy_together, mover_of
from .proven import TOO_MUCH, Distrusted, Record, check, make_record
from .recorder import Metadata
from .source import model_of
from .spoil import RandomWeights, metadata_of
from .trusted import distrust
from .verify import Differences

NONE = Kept(())
"""Of a model without constants."""


class RecordedCopy:
    """Brings weights into the model of one runner: by its record where that is safe, else by the engine's reload.

    Everything here runs in the worker's process, on the current stream. `constants` are the model's own, as
    `constants_of` found them before anything was discarded.
    """

    def __init__(
        self, *, receiver: str = "engine", transport: InProcess | None = None, constants: Kept | None = NONE
    ) -> None:
        self._transport, self._constants = transport, constants
        self.reasons: dict[str, str] = {}
        """Why modules are not trusted, by their path; with `""` for the model as a whole."""
        self.modules = 0
        """How many modules have weights."""
        self.way = ""
        """Of the last load: `reload`, or how the record was copied."""
        self._receiver = receiver
        self._record: Record | None = None
        self._live: Located | None = None
        self._mover: Mover | None = None
        self._largest: tuple[Places, Places] | None = None
        """What must lie where it lay for the mover to start: of the model, and of the source."""
        self._source: Any = None
        """What the mover brings."""
        self._lost = self._decided = False
        self._parts: _Pass | None = None
        """A load that comes in parts, and is not over."""

    @property
    def trusted(self) -> bool:
        """Whether the last load was made by the record."""
        return self._record is not None

    @property
    def reason(self) -> str:
        """Why the whole model is reloaded, in a few words; empty where it is not."""
        if self._record is not None or not self.reasons:
            return ""
        path, why = next(iter(self.reasons.items()))
        return f"{path}: {why}" if path else why

    def forget(self) -> None:
        """Level-2 sleep has discarded the memory of the weights; the addresses stay."""
        self._lost = True

    @torch.no_grad()
    def load(self, runner: Any, source: Any, *, verify: bool = False) -> tuple[str, ...]:
        """Replace the weights; returns the engine's parameters that nothing was loaded into.

        With `verify` every destination is compared with its source, as it always is in the first load by a record.

        Raises:
            WeightSyncError: In phase `verify`: something differs. The record is not used again.
        """
        ahead = not verify and self._start(source)
        first = self._prepare(runner, source)
        if self._record is None:
            if self._transport == "recorded":
                self._decided = False
                raise self._failed(f"the recorded copy is not safe here: {self.reason}", "load", None)
            if first:
                _spoil(runner, source)
            return self._reload(runner, source)
        if first or not ahead:
            self._restore()
        self._replay(source, verify or first, ahead)
        runner.reset_lora_state()
        self._lost = False
        return ()

    @torch.no_grad()
    def begin(self, runner: Any, metadata: Metadata | None, *, verify: bool = False) -> bool:
        """Start a load whose tensors come in parts, by `take`; False where the record is not safe.

        These parts are for the engine's own reload then. `verify` is as in `load`.
        """
        self._mover = self._source = None
        self.way, self._parts = "reload", None
        if metadata is None:
            self._drop()
            self._decided, self.reasons = False, {"": "the trainer does not say beforehand what it sends"}
            return False
        first = self._prepare(runner, SimpleNamespace(metadata=lambda: metadata))
        if self._record is not None:
            self._restore()
            self.way, self._parts = "foreach", _Pass(self._record, parts=True, verify=verify or first)
        return self._record is not None

    @torch.no_grad()
    def take(self, part: Iterable[tuple[str, torch.Tensor]], *, last: bool) -> None:
        """Copy one part. Its memory may be overwritten once the device has come to this.

        Raises:
            WeightSyncError: As `load` does; what is missing, and what differs, in the last part.
        """
        this = self._parts
        assert this is not None
        for name, tensor in part:
            self._add(this, name, tensor)
        this.copy()
        if last:
            self._complete(this)
            self._parts, self._lost = None, False
            self._finish(this)

    @property
    def under_way(self) -> bool:
        """Whether a load in parts has begun and not ended."""
        return self._parts is not None

    def give_up(self) -> None:
        """No more parts will come; what has come is there."""
        self._parts = None

    def _prepare(self, runner: Any, source: Any) -> bool:
        """Make sure that what is known of the model still holds. Whether it had to be found out."""
        if self._lost and self._constants is not None:
            self._constants.restore()
        if self._record is not None and not (self._record.in_place(buffers=self._lost) and self._same(source)):
            self._drop()
            self._decided = False
        if first := not self._decided:
            self._decide(runner, source)
        return first

    def _reload(self, runner: Any, source: Any) -> tuple[str, ...]:
        self.way = "reload"
        stream = NamedStream(source)
        try:
            return reload(runner, stream)
        except WeightSyncError:
            raise
        except Exception as error:
            raise self._failed(f"{type(error).__name__}: {error}", "load", stream.last) from error

    def _failed(self, problem: str, phase: str, parameter: str | None) -> WeightSyncError:
        return WeightSyncError(problem, phase=phase, parameter=parameter, receiver=self._receiver)

    def _drop(self) -> None:
        self._record = self._live = self._mover = self._source = None

    def _same(self, source: Any) -> bool:
        """Whether the source brings what was recorded, as far as it can say without a pass."""
        if self._record is None or self._mover is not None or not hasattr(source, "metadata"):
            return True
        return {name: (tuple(shape), dtype) for name, shape, dtype in source.metadata()} == self._record.forms

    def _decide(self, runner: Any, source: Any) -> None:
        """Record the loader, or find out why that cannot be trusted."""
        self.reasons, self._decided = {}, True
        model = runner.get_model()
        modules = [(path, module) for path, module in model.named_modules() if module._parameters]
        self.modules = len(modules)
        if self._transport == "reload":
            self.reasons = {"": "asked for"}
            return
        self.reasons = {path: why for path, module in model.named_modules() if (why := distrust(module))}
        if self.reasons:
            return
        if self._constants is None:
            self.reasons = {"": TOO_MUCH}
            return
        try:
            metadata = metadata_of(source)
            made = make_record(model, metadata)
            check(made, runner, metadata, self._constants)
            self._record = made
        except Distrusted as error:
            self.reasons = error.reasons
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            self.reasons = {"": "no memory to prove the record"}

    def _restore(self) -> None:
        """Write what does not come from a source."""
        assert self._record is not None
        if self._lost:
            self._record.kept.restore()
        for fill in self._record.fills:
            fill.place.fill_(fill.value)

    def _start(self, source: Any) -> bool:
        """Start with the largest copies where these still are what they were; all others are looked at meanwhile."""
        if self._mover is None or self._largest is None or self._source is not source or self._lost:
            return False
        if not all(places.kept() for places in self._largest):
            return False
        self._restore()
        self._mover.start()
        return True

    def _replay(self, source: Any, verify: bool, ahead: bool) -> None:
        mover, live = self._mover, self._live
        if mover is not None and live is not None and self._source is source and not verify and live.near():
            mover.finish() if ahead else mover.run()
            if live.whole():
                self.way = mover.how
                source.seconds = 0.0  # a pass that was not needed has brought as much as the last one, in no time
                return
        self._mover = None
        self._walk(source, verify)

    def _walk(self, source: Any, verify: bool) -> None:
        """One pass over the source. Parts of a plain model are copied together at its end, all else as it comes."""
        assert self._record is not None
        live = _live_of(source)
        this = _Pass(self._record, live=live, verify=verify)
        for name, tensor in source:
            self._add(this, name, tensor)
        self._complete(this)
        self._together(this.waiting, live if this.everything else None)
        if this.host:  # a copy from pinned memory is still under way, and its owner is free to write there from now on
            torch.cuda.current_stream().synchronize()
        self._source = source
        this.compare()
        self._finish(this)

    def _add(self, this: _Pass, name: str, tensor: torch.Tensor) -> None:
        if not this.add(name, tensor):
            known = this.expected(name)
            self._drop()
            self._decided = False  # the next sync records anew
            came = f"a size of {list(tensor.shape)} in {tensor.dtype}"
            raise self._failed(f"it is not as it was recorded: {came} came, where {known} was", "load", name)

    def _complete(self, this: _Pass) -> None:
        if missing := this.missing():
            problem = f"the trainer's model does not provide it ({len(missing)} such)"
            raise self._failed(problem, "load", missing[0])

    def _finish(self, this: _Pass) -> None:
        self._judge(this.differences.names(), "it differs from its source")
        self._judge(this.twins.names(), "two sources with different content are loaded into it")

    def _together(self, waiting: list[tuple[torch.Tensor, torch.Tensor]], live: Located | None) -> None:
        """Copy the parts of a plain model; once they lie where they lay the last time, in the best way."""
        again = live is not None and live.same_as(self._live)
        self._live = live
        if again and live is not None and waiting and (mover := mover_of(waiting)) is not None:
            self._mover, self.way, self._largest = mover, mover.how, self._needed(mover, live)
            return
        self.way = "foreach"
        copy_together(waiting)

    def _needed(self, mover: Mover, live: Located) -> tuple[Places, Places] | None:
        """What the mover's start and the constants need; None where it is not known of all of it."""
        assert self._record is not None
        storages = mover.largest | {fill.place.untyped_storage().data_ptr() for fill in self._record.fills}
        own, of_source = self._record.tensors.within(storages), live.places.within(storages)
        return (own, of_source) if own.storages() | of_source.storages() == storages else None

    def _judge(self, names: tuple[str, ...], problem: str) -> None:
        if names:
            self._drop()
            self.reasons = {name: problem for name in names}
            more = f" (as do {len(names) - 1} more: {', '.join(names[1:10])})" if len(names) > 1 else ""
            raise self._failed(problem + more, "verify", next(iter(names)))


class _Pass:
    """One pass of a source's tensors through a record."""

    def __init__(
        self, record: Record, *, live: Located | None = None, parts: bool = False, verify: bool = False
    ) -> None:
        self._record, self._live, self._lasting, self._verify = record, live, parts, verify
        self._given = set[str]()
        self._written = dict[int, int]()
        """By address what was copied to a place that has twins, -1 for what may be gone."""
        self._names: list[str] = []
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Destinations and values that are still to be copied, together."""
        self.everything = True
        """Whether all of it lies in the trainer's model."""
        self.host = False
        """Whether some of it comes from the host to a device."""
        self.differences, self.twins = Differences(), Differences()

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy one tensor, now or together with others that stay where they are; False if it is not as recorded."""
        self._given.add(name)
        if self._record.forms.get(name) != (tuple(tensor.shape), tensor.dtype):
            return False
        held = self._live is not None and self._live.hold(tensor) and tensor.is_contiguous()
        for copy, wins in self._record.of(name):
            value, address, path = copy.part.of(tensor), copy.place.data_ptr(), self._record.paths[copy.target]
            self.host = self.host or (copy.place.is_cuda and not value.is_cuda)
            has_twins = address in self._record.shared
            if has_twins and address in self._written:
                if self._written[address] != value.data_ptr():
                    self.everything = False
                    self.twins.compare(path, copy.place, value)
                if not wins:
                    continue
            if has_twins:
                self._written[address] = value.data_ptr() if held else -1
            self.everything = self.everything and held
            if has_twins or not (held or self._lasting):
                copy.place.copy_(value, non_blocking=True)
            if held or (self._lasting and not has_twins):
                self.waiting.append((copy.place, value))
                self._names.append(path)
            elif self._verify:
                self.differences.compare(path, copy.place, value)
        return True

    def copy(self) -> None:
        """Copy what waits."""
        copy_together(self.waiting)
        self.compare()
        self.waiting, self._names = [], []

    def compare(self) -> None:
        """Where it is to be verified, what has waited with its source."""
        if self._verify:
            for name, (place, value) in zip(self._names, self.waiting, strict=True):
                self.differences.compare(name, place, value)

    def expected(self, name: str) -> str:
        """What was recorded under `name`."""
        if name not in self._record.forms:
            return "no such tensor"
        shape, dtype = self._record.forms[name]
        return f"{list(shape)} in {dtype}"

    def missing(self) -> list[str]:
        """What was recorded and has not come."""
        return [name for name in self._record.copies if name not in self._given]


def _spoil(runner: Any, source: Any) -> None:
    """Fill the engine with random weights: whatever its reload then fails to replace, a probe cannot miss.

    See `spoil`.
    """
    device = next(runner.get_model().parameters()).device
    random = RandomWeights(metadata_of(source), device)
    with suppress(Exception):  # what it fails at, the reload of the true weights will fail at too
        reload(runner, NamedStream(random))


def _live_of(source: Any) -> Located | None:
    """Where the source's weights lie: as it says itself, or its model."""
    own = getattr(source, "live", None)
    return Live.of(model_of(source)) if own is None else own()
