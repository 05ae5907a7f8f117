"""The trainer's side of vgen's weight transfer, for trainers that use vLLM's own factory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.distributed.weight_transfer import base

from ...engine_protocol import BUCKET_BYTES
from ...weights.transports.shared_memory import BACKEND, SharedMemoryTransport
from ...weights.transports.weight_transport import TransportSettings


@dataclass
class SenderInit(base.TrainerInitInfo):
    """The argument of `WeightTransferTrainerFactory.trainer_init` for this engine."""

    backend: ClassVar[str] = BACKEND
    bucket_bytes: int = BUCKET_BYTES
    directory: str | None = None


class SharedMemorySender(base.TrainerWeightTransferEngine[SenderInit]):
    """A `SharedMemoryTransport` behind vLLM's interface."""

    init_info_cls = SenderInit
    _transport: SharedMemoryTransport

    @classmethod
    def trainer_init(cls, init_info: SenderInit, *, client: Any, source: Any = None) -> SharedMemorySender:
        if source is None:
            raise ValueError("shared-memory weight transfer needs a source")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        settings = TransportSettings(bucket_bytes=init_info.bucket_bytes)
        engine._transport = SharedMemoryTransport(settings, directory=init_info.directory)
        engine._transport.client = client
        return engine

    def send_weights(self) -> None:
        """Send all weights. A rank that does not send iterates the source too, because that may gather."""
        assert self.source is not None
        if self.is_sender:
            self._transport.replace_weights(self.source)
        else:
            for _ in self.source:
                pass

    def shutdown(self) -> None:
        self._transport.close()
