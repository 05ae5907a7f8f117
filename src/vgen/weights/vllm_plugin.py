"""vgen inside vLLM's processes: its engine in the weight-transfer registry.

vLLM calls `register` in each of its processes, through the entry point group `vllm.general_plugins`.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer import base, factory

from ..engines.lifeline import follow_parent
from ..engines.reload import Reload
from ..errors import WeightSyncError
from .buckets import BUCKETS, LEFT_OPEN, Described, Form
from .group import Receiver
from .proven import constants_of
from .recorded import RecordedCopy
from .recorder import Metadata
from .resident import UNKNOWN, NotResident, ResidentWeights
from .shared_memory import BACKEND, BUCKET_BYTES, SharedMemoryTransfer, shared_directory


def register() -> None:
    """Make vgen known to this process. May be called any number of times."""
    follow_parent()
    if BACKEND not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(BACKEND, VgenEngine)
    if BACKEND not in factory.WeightTransferTrainerFactory._registry:
        factory.WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemorySender)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # Without it the first bf16 matrix product ends the process with an illegal instruction.
        torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]


@dataclass
class InitInfo(base.WeightTransferInitInfo):
    """A trainer introduces itself, by one of these: how its weights will come."""

    paths: list[str] = field(default_factory=list[str])
    """Of its buckets in shared memory, which have no name any more once all workers have opened them."""
    group: dict[str, Any] | None = None
    """Where the trainer and all workers meet, for buckets that are broadcast: see `group.Receiver`."""
    rank_offset: int = 0
    """The rank in that group of this server's first worker."""
    table: dict[str, Any] | None = None
    """Where the weights lie on this very GPU: see `resident.Table`."""
    forms: list[Form] | None = None
    """What will come in its buckets."""
    forms_name: str = ""
    """A name for these, which alone is said again."""


@dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """One bucket, or all weights of a table; or that the update is over and came to nothing."""

    path: str = ""
    """The file in which the tensors lie."""
    bytes: int | None = None
    """So many are broadcast, and the tensors lie in them."""
    tensors: list[Described] = field(default_factory=list[Described])
    table: str = ""
    verify: bool = False
    """Whether every destination is compared with its source, where a record is copied."""
    last: bool = False
    abort: bool = False


class VgenEngine(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what a trainer sends: by the recorded copy where that is safe, else by vLLM's layerwise reload.

    All ranks of a server agree on whether a bucket was loaded, and the last one alone raises: vLLM's executor
    reads no further than the first error, and would take the others' for the answers to its next calls.
    Files must lie in the directory that was allowed when the server started.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reload: Reload | None = None
        self._open = self._pending = False
        """As the worker sees it: an update has been started, and neither finished nor failed on this rank; and its
        last bucket has not come."""
        self._failed = False
        """This update has failed, on this rank or another, and its layers are back."""
        self._maps: OrderedDict[str, _Mapping] = OrderedDict()
        self._receiver: Receiver | None = None
        self._resident: ResidentWeights | None = None
        self._constants = constants_of(self.model)
        self._recorded = RecordedCopy(receiver="server", constants=self._constants)
        self._forms: tuple[str, Metadata] | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """A new trainer. Raises where it shares nothing with this worker, or found an update left open."""
        problem: str | None = LEFT_OPEN if self._open else None
        try:
            for path in init_info.paths:
                self._mapping(path)
            if problem is None and init_info.group is not None:
                self._join(init_info.group, init_info.rank_offset)
            if problem is None and init_info.table is not None:
                self._attach(init_info.table)
            self._expect(init_info)
        except (OSError, WeightSyncError) as error:
            problem = problem or str(error)
        self._agree(problem)

    def start_weight_update(self) -> None:
        self._open = self._pending = True
        self._failed = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. The base would synchronize an accelerator, which a CPU has not."""
        if self._failed:  # on another rank, while this one is still asked
            return
        problem = None
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            problem = str(_named(error, self._reload.stream.last if self._reload else None))
        try:
            self._agree(problem)
        except WeightSyncFailure:
            self._open = False
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.abort:
            raise WeightSyncError("its trainer gave it up", phase="load", receiver="server")
        if not self._pending:
            raise WeightSyncError("a bucket came after the last one", phase="load", receiver="server")
        missing = self._copy(update_info) if update_info.table else self._load(update_info)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the memory may be overwritten as soon as this call is answered
        self._pending = not update_info.last
        if missing:
            raise WeightSyncError(
                f"the trainer's model does not provide it ({len(missing)} such)",
                phase="load",
                parameter=missing[0],
                receiver="server",
            )

    def loaded(self) -> dict[str, Any]:
        """How the last weights were loaded, and why not by the record where they were not."""
        return {"way": self._recorded.way, "reason": self._recorded.reason}

    def _load(self, update_info: UpdateInfo) -> tuple[str, ...]:
        if self._reload is None and not self._recorded.under_way:
            self._begin(update_info.verify)
        if update_info.bytes is None:
            mapping = self._mapping(update_info.path)
            tensors = _tensors(update_info.tensors, mapping.memory())
        elif self._receiver is not None:
            tensors = _tensors(update_info.tensors, self._receiver.receive(update_info.bytes))
        else:
            raise WeightSyncError("it is in no group with its trainer", phase="transfer", receiver="server")
        if self._reload is None:
            self._recorded.take(tensors, last=update_info.last)
            return ()
        with _partial_loads():
            self._reload.load_part(tensors)
        if not update_info.last:
            return ()
        missing, self._reload = self._reload.finish(), None
        return missing

    def _begin(self, verify: bool) -> None:
        """Get ready for the first of several buckets."""
        self._recorded.forget()  # whether the server has slept since is not known here
        if not self._recorded.begin(self._runner(), self._forms and self._forms[1], verify=verify):
            self._reload = Reload(self.model, self.model_config)
            self._reload.start()

    def _expect(self, init_info: InitInfo) -> None:
        """What comes in buckets from now on."""
        if self._forms is not None and self._forms[0] == init_info.forms_name:
            return
        self._forms = None
        if init_info.forms is not None:
            known = [(name, tuple(shape), _dtype(kind, name)) for name, kind, shape in init_info.forms]
            self._forms = init_info.forms_name, known
            # What was not safe for others may be for these.
            self._recorded = RecordedCopy(receiver="server", constants=self._constants)

    def _runner(self) -> Any:
        """What a `RecordedCopy` asks of one. vLLM's worker resets the state of adapters when an update is finished."""
        model, config = self.model, self.model_config
        return SimpleNamespace(get_model=lambda: model, model_config=config, reset_lora_state=lambda: None)

    def _copy(self, update_info: UpdateInfo) -> tuple[str, ...]:
        if self._resident is None or self._resident.name != update_info.table:
            raise WeightSyncError(UNKNOWN, phase="transfer", receiver="server")
        self._recorded.forget()  # as in `_begin`
        return self._recorded.load(self._runner(), self._resident, verify=update_info.verify)

    def _join(self, group: dict[str, Any], rank_offset: int) -> None:
        name = group["address"], group["port"], group["name"]
        if self._receiver is not None and self._receiver.name == name:
            return
        if group.get("joined"):
            raise WeightSyncError("it has left the group", phase="transfer", receiver="server")
        self._leave()
        parallel = self.parallel_config
        rank = rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = Receiver(group, rank, self.device)

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
            raise WeightSyncError(
                f"it cannot open the trainer's memory: {error}; choose another weight_transport",
                phase="transfer",
                receiver="server",
            ) from error

    def finish_weight_update(self) -> None:
        """End the update, whether or not it came to something; the last bucket has put the weights to use."""
        unfinished, self._open, self._pending = self._pending, False, False
        self._cancel()
        if unfinished:
            self._open = True  # vLLM's worker takes it for still under way when this raises
            self._agree("it was finished before its last bucket came; finish it once more to begin anew")

    def shutdown(self) -> None:
        self._cancel()
        self._leave()
        self._maps.clear()
        if self._resident is not None:
            self._resident.close()
            self._resident = None

    def _cancel(self) -> None:
        """Put the layers of an unfinished reload back."""
        self._recorded.give_up()
        if self._reload is not None:
            self._reload.cancel()
            self._reload = None

    def _agree(self, problem: str | None) -> None:
        """Raise on the last rank what is wrong on any; each rank has cancelled its part then."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        last = True
        for group in (get_tp_group(), get_pp_group()) if self.parallel_config.world_size > 1 else ():
            if group.world_size > 1:
                problems: list[str | None] = [None] * group.world_size
                torch.distributed.all_gather_object(problems, problem, group=group.cpu_group)
                problem = next(filter(None, problems), None)
                last = last and group.is_last_rank
        if problem is None:
            return
        self._cancel()
        self._failed, self._pending = True, False
        # There the ranks are the trainer's own processes, and each has an executor to itself.
        if last or self.parallel_config.distributed_executor_backend == "external_launcher":
            raise WeightSyncFailure(problem)

    def _mapping(self, path: str) -> _Mapping:
        if path not in self._maps:
            self._maps[path] = _Mapping(path)
        self._maps.move_to_end(path)
        while len(self._maps) > BUCKETS:
            self._maps.popitem(last=False)
        return self._maps[path]


class WeightSyncFailure(RuntimeError):
    """What a rank raises. Its text is all that reaches the trainer, and says where and at which parameter."""


class _Mapping:
    """A trainer's file, mapped as far as it has grown."""

    def __init__(self, path: str) -> None:
        allowed = shared_directory()
        if os.path.realpath(os.path.dirname(path)) != os.path.realpath(allowed):
            raise WeightSyncError(
                f"this server opens files in {allowed} alone (--shared-memory-dir)", phase="load", receiver="server"
            )
        try:
            self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise WeightSyncError(
                f"this server cannot open the trainer's shared memory in {allowed} ({error.strerror}): "
                "is it on the same host, with the same /dev/shm and the same user?",
                phase="load",
                receiver="server",
            ) from error
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise WeightSyncError("shared memory must be a plain file", phase="load", receiver="server")
        self._map: mmap.mmap | None = None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            with suppress(OSError):
                os.close(self._file)

    def memory(self) -> torch.Tensor:
        """All of its bytes."""
        size = os.fstat(self._file).st_size
        if size and (self._map is None or len(self._map) < size):
            self._map = mmap.mmap(self._file, size)
        if not size or self._map is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size)


def _tensors(described: list[Described], memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor as a view of the bucket's memory."""
    for name, dtype_name, shape, offset in described:
        dtype = _dtype(dtype_name, name)
        if min([offset, *shape], default=0) < 0:
            raise _misdescribed(name, f"shape {shape}, offset {offset}")
        count = prod(shape) * dtype.itemsize
        if offset + count > memory.numel():
            raise _misdescribed(name, f"it ends beyond the {memory.numel()} bytes of its bucket")
        if count == 0:
            yield name, torch.empty(shape, dtype=dtype)
        else:
            yield name, memory[offset : offset + count].view(dtype).view(shape)


def _dtype(kind: str, name: str) -> torch.dtype:
    found = getattr(torch, kind, None)
    if not isinstance(found, torch.dtype):
        raise _misdescribed(name, f"dtype {kind!r}")
    return found


def _misdescribed(name: str, problem: str) -> WeightSyncError:
    return WeightSyncError(problem, phase="load", parameter=name, receiver="server")


def _named(error: Exception, parameter: str | None) -> WeightSyncError:
    if isinstance(error, WeightSyncError):
        return error
    problem = f"{type(error).__name__}: {error}" if str(error) else "it does not fit the engine's layer"
    return WeightSyncError(problem, phase="load", parameter=parameter, receiver="server")


def _partial_loads() -> AbstractContextManager[None]:
    """Within it, a model that checks its checkpoint for completeness takes a part of one."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        return nullcontext()
    return disable_mtp_completeness_check()


@dataclass
class SenderInit(base.TrainerInitInfo):
    """What `WeightTransferTrainerFactory.trainer_init` takes for this engine."""

    backend: ClassVar[str] = BACKEND
    bucket_bytes: int = BUCKET_BYTES
    directory: str | None = None


class SharedMemorySender(base.TrainerWeightTransferEngine[SenderInit]):
    """The trainer's side for those who drive it through vLLM's factory; it is `SharedMemoryTransfer` underneath."""

    init_info_cls = SenderInit
    _transfer: SharedMemoryTransfer

    @classmethod
    def trainer_init(cls, init_info: SenderInit, *, client: Any, source: Any = None) -> SharedMemorySender:
        if source is None:
            raise ValueError("shared-memory weight transfer needs a source")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._transfer = SharedMemoryTransfer(
            client, bucket_bytes=init_info.bucket_bytes, directory=init_info.directory
        )
        return engine

    def send_weights(self) -> None:
        """On the sender's rank, send all; on others iterate the source along with it, which may gather."""
        assert self.source is not None
        if self.is_sender:
            self._transfer.send(self.source)
        else:
            for _ in self.source:
                pass

    def shutdown(self) -> None:
        self._transfer.close()
