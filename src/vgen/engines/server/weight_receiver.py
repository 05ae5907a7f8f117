"""The worker's side of vgen's weight transfers: an engine in vLLM's weight-transfer registry."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.weight_transfer import base

from ...engine_protocol import TensorMetadata
from ...errors import WeightSyncError
from ...weights.load.layerwise_reload import Reload
from ...weights.load.recorded_copy import RecordedCopy
from ...weights.load.unloaded_tensors import UnloadedTensors
from ...weights.transports.buckets import BucketEntry, TensorForm, metadata_of_forms
from ...weights.transports.collective import GroupReceiver
from ...weights.transports.cuda_ipc import NotResident, ResidentWeights
from ...weights.transports.sync_errors import UNKNOWN_HANDLES, UPDATE_OPEN, to_text
from .shared_memory_mapping import SharedMemoryMappings, tensors_in


@dataclass
class InitInfo(base.WeightTransferInitInfo):
    """A trainer introduces itself: how its weights will come. Each transport sets its own fields."""

    paths: list[str] = field(default_factory=list[str])
    """Of its buckets in shared memory. The trainer removes these names once all workers have opened the files."""
    group: dict[str, Any] | None = None
    """How to join the process group in which buckets are broadcast: see `collective.GroupReceiver`."""
    rank_offset: int = 0
    """The rank of this server's first worker in the process group."""
    table: dict[str, Any] | None = None
    """Handles of the trainer's memory on the same GPU: see `cuda_ipc.HandleTable`."""
    forms: list[TensorForm] | None = None
    """The tensors that will come in buckets."""
    ties: dict[str, str] = field(default_factory=dict[str, str])
    """Which of these are now the same tensor as another: see `Source.ties`."""
    forms_name: str = ""
    """A name for `forms` and `ties`. Later syncs send only the name."""


@dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """One bucket, or all weights of a table, or the end of an update that the trainer gave up."""

    path: str = ""
    """The file of the bucket, if it is in shared memory."""
    bytes: int | None = None
    """The size of the bucket, if it is broadcast."""
    tensors: list[BucketEntry] = field(default_factory=list[BucketEntry])
    """The tensors in the bucket."""
    table: str = ""
    """The name of the table whose weights are copied."""
    verify: bool = False
    """Whether every destination is compared with its source, if the weights are copied by a record."""
    last: bool = False
    abort: bool = False


class VgenEngine(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what a trainer sends: by the recorded copy if that is safe, else by vLLM's layerwise reload.

    All ranks of a server agree on whether a bucket was loaded, and only the last one raises: vLLM's executor stops
    reading at the first error, and would take the errors of other ranks for the answers to its next calls.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reload: Reload | None = None
        self._open = False
        """Whether an update is open for vLLM's worker: started, and neither finished nor failed on this rank."""
        self._incomplete = False
        """Whether the last bucket of the update has yet to come."""
        self._failed = False
        """Whether this update has failed on some rank. Then the layers have been restored."""
        self._mappings = SharedMemoryMappings()
        self._receiver: GroupReceiver | None = None
        self._resident: ResidentWeights | None = None
        self._outside = UnloadedTensors.outside_registries(self.model)
        self._recorded = RecordedCopy(receiver="server", outside=self._outside)
        self._expected: tuple[str, TensorMetadata, dict[str, str]] | None = None
        """The name of the forms that the trainer announced, what will come, and which of them are tied to which."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Meet a trainer. Raises if this worker cannot read its weights, or if an update is open."""
        problem: WeightSyncError | None = None
        if self._open:
            problem = _sync_error("an earlier weight update was not finished", reason=UPDATE_OPEN)
        try:
            for path in init_info.paths:
                self._mappings.open(path)
            if problem is None and init_info.group is not None:
                self._join(init_info.group, init_info.rank_offset)
            if problem is None and init_info.table is not None:
                self._attach(init_info.table)
            self._expect(init_info)
        except (OSError, WeightSyncError) as error:
            problem = problem or _named(error, None)
        self._raise_together(problem)

    def start_weight_update(self) -> None:
        self._open = self._incomplete = True
        self._failed = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. Overridden because the base class synchronizes an accelerator, and a CPU has none."""
        if self._failed:  # on another rank, but the trainer still calls this one
            return
        problem = None
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            problem = _named(error, self._reload.stream.last if self._reload else None)
        try:
            self._raise_together(problem)
        except WorkerSyncError:
            self._open = False
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.abort:
            raise _sync_error("the trainer gave the update up", phase="load")
        if not self._incomplete:
            raise _sync_error("a bucket came after the last one", phase="load")
        self._copy(update_info) if update_info.table else self._load(update_info)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the trainer may overwrite the memory once this call is answered
        self._incomplete = not update_info.last

    def loaded(self) -> dict[str, Any]:
        """How the last weights were loaded (`way`), the `reason` if not by a record, and what the audit says."""
        return {"way": self._recorded.way, "reason": self._recorded.reason, **self._recorded.audit.report()}

    def _load(self, update_info: UpdateInfo) -> None:
        if self._reload is None and not self._recorded.under_way:
            self._begin(update_info.verify)
        if update_info.bytes is None:
            memory = self._mappings.open(update_info.path).memory()
        elif self._receiver is not None:
            memory = self._receiver.receive(update_info.bytes)
        else:
            raise _sync_error("the worker is in no process group with the trainer")
        tensors = tensors_in(memory, update_info.tensors)
        if self._reload is None:
            self._recorded.take(tensors, last=update_info.last)
            return
        with _partial_loads():
            self._reload.load_part(tensors)
        if update_info.last:
            reload, self._reload = self._reload, None
            reload.finish()
            self._recorded.require_finite(reload.stream.not_finite)
            if self._expected is None:
                self._recorded.require_written(self.model, reload.stream.given)

    def _begin(self, verify: bool) -> None:
        """Prepare for the first of several buckets."""
        self._recorded.forget()  # the server may have slept since, which this engine does not notice
        first = self._recorded.undecided
        metadata, ties = (self._expected[1], self._expected[2]) if self._expected else (None, {})
        if not self._recorded.begin(self._runner(), metadata, ties, verify=verify):
            options = self._recorded.stream_options(finite=first or verify)
            self._reload = Reload(self.model, self.model_config, **options)
            self._reload.start()

    def _expect(self, init_info: InitInfo) -> None:
        """Note which tensors will come in buckets from now on."""
        if self._expected is not None and self._expected[0] == init_info.forms_name:
            return
        self._expected = None
        if init_info.forms is not None:
            self._expected = init_info.forms_name, metadata_of_forms(init_info.forms), init_info.ties
            # A record that was not safe for the earlier tensors may be safe for these.
            self._recorded = RecordedCopy(receiver="server", outside=self._outside)

    def _runner(self) -> Any:
        """The part of a model runner that `RecordedCopy` uses. vLLM's worker resets the adapters itself at the end."""
        model, config = self.model, self.model_config
        return SimpleNamespace(get_model=lambda: model, model_config=config, reset_lora_state=lambda: None)

    def _copy(self, update_info: UpdateInfo) -> None:
        if self._resident is None or self._resident.name != update_info.table:
            raise _sync_error("the worker does not know the handles of these weights", reason=UNKNOWN_HANDLES)
        self._recorded.forget()  # as in `_begin`
        self._recorded.load(self._runner(), self._resident, verify=update_info.verify)

    def _join(self, group: dict[str, Any], rank_offset: int) -> None:
        if self._receiver is not None and self._receiver.name == group["secret"]:
            return
        if group.get("joined"):
            raise _sync_error("the worker has left the process group")
        self._leave()
        parallel = self.parallel_config
        rank = rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = GroupReceiver(group, rank, self.device)

    def _leave(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _attach(self, table: dict[str, Any]) -> None:
        before, self._resident = self._resident, None
        if before is not None:
            before.close()
        try:
            self._resident = ResidentWeights(table, self.device)
        except NotResident as error:
            problem = f"the worker cannot open the trainer's memory: {error}; choose another weight_transport"
            raise _sync_error(problem) from error

    def finish_weight_update(self) -> None:
        """End the update, whether it succeeded or not. The weights are in use since the last bucket."""
        incomplete, self._open, self._incomplete = self._incomplete, False, False
        self._cancel()
        if incomplete:
            self._open = True  # for vLLM's worker the update stays open if this raises
            problem = "the last bucket has not come; finish the update once more to be able to start a new one"
            self._raise_together(_sync_error(problem, phase="load"))

    def shutdown(self) -> None:
        self._cancel()
        self._leave()
        self._mappings.close()
        if self._resident is not None:
            self._resident.close()
            self._resident = None

    def _cancel(self) -> None:
        """Restore the layers of an unfinished reload."""
        self._recorded.give_up()
        if self._reload is not None:
            self._reload.cancel()
            self._reload = None

    def _raise_together(self, error: WeightSyncError | None) -> None:
        """If any rank has an error, cancel the update on all ranks, and raise the error on the last one."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        last, text = True, None if error is None else to_text(error)
        for group in (get_tp_group(), get_pp_group()) if self.parallel_config.world_size > 1 else ():
            if group.world_size > 1:
                texts: list[str | None] = [None] * group.world_size
                torch.distributed.all_gather_object(texts, text, group=group.cpu_group)
                text = next(filter(None, texts), None)
                last = last and group.is_last_rank
        if text is None:
            return
        self._cancel()
        self._failed, self._incomplete = True, False
        # With this executor, each rank is a trainer process with an executor of its own, so each must raise.
        if last or self.parallel_config.distributed_executor_backend == "external_launcher":
            raise WorkerSyncError(text) from error


class WorkerSyncError(RuntimeError):
    """Raised by a worker. vLLM passes on only its text, from which `as_sync_error` makes a `WeightSyncError` again."""


def _sync_error(
    problem: str, *, phase: str = "transfer", parameter: str | None = None, reason: str | None = None
) -> WeightSyncError:
    return WeightSyncError(problem, phase=phase, parameter=parameter, receiver="server", reason=reason)


def _named(error: Exception, parameter: str | None) -> WeightSyncError:
    """`error` as a `WeightSyncError` that names the parameter that was being loaded."""
    if isinstance(error, WeightSyncError):
        return error
    problem = f"{type(error).__name__}: {error}" if str(error) else "it does not fit the engine's layer"
    return _sync_error(problem, phase="load", parameter=parameter)


def _partial_loads() -> AbstractContextManager[None]:
    """A block in which a model that checks that its checkpoint is complete accepts a part of one."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        return nullcontext()
    return disable_mtp_completeness_check()
