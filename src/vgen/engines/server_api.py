"""The HTTP interface of a `vgen serve` server: the names that client and server share."""

from __future__ import annotations

from enum import StrEnum

CONTROL_HEADER = "X-Vgen-Control-Key"
"""Carries the control key, which opens every route except inference."""
LEASE_HEADER = "X-Vgen-Lease"
"""Carries the token of the lease, which permits changes to the server."""
KEY_FILE_VARIABLE = "VGEN_CONTROL_KEY_FILE"
"""The environment variable of a server that names the file with its control key."""
EXTENSION = "vgen.engines.memory.WorkerMemory"
"""The class that adds vgen's methods to a server's workers: memory, GPU, how weights were loaded."""

# vgen's own routes. The batch route is `completion_codec.PATH`.
INFO = "/vgen/info"
"""GET: what the server and its model are."""
INSTANCE = "/vgen/instance"
"""GET, without a key: an identifier of this server process, which tells it from others behind the same address."""
HEALTH = "/health"
"""GET, without a key, answered at once: 200 (also if it is busy), or 503 if the engine was stopped or has ended.

All calls that need it are then refused by `RefusalReason.ENGINE`, and completions of the batch route fail with 503."""
LEASE, LEASE_RENEW, LEASE_RELEASE = "/vgen/lease", "/vgen/lease/renew", "/vgen/lease/release"
PAUSE = "/vgen/pause"
"""POST: vLLM's `/pause` without its wait of 20 ms."""
WEIGHTS = "/vgen/weights"
"""POST: a whole weight update in one call."""

# vLLM's routes for a weight update.
INIT_TRANSFER = "/init_weight_transfer_engine"
START_UPDATE, UPDATE_WEIGHTS, FINISH_UPDATE = "/start_weight_update", "/update_weights", "/finish_weight_update"
SET_VERSION = "/update_weight_version"

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Configuration fields in which the trainer's model and the server's model must agree."""


class Feature(StrEnum):
    """What a `vgen serve` server can do. A stock vLLM server has none of these."""

    BATCH = "batch"
    """The batch route: one call for many completions."""
    CONTROL_KEY = "control_key"
    LEASE = "lease"
    PAUSE = "pause"
    """The route `PAUSE`."""
    WEIGHTS_STATE = "weights_state"
    """`INFO` says whether the weights are ready, updating or failed."""
    MEMORY = "memory"
    """Workers have the methods of `engines.memory.WorkerMemory`."""
    SHARED_MEMORY = "shared_memory"
    """Weights come in buckets through shared memory."""
    GROUP = "group_with_secret"
    """Weights come in buckets that a process group broadcasts, whose members prove that they know its secret."""
    RESIDENT = "resident"
    """Workers read weights from the trainer's memory on the same GPU."""
    RECORDED = "recorded"
    """The server is told which tensors will come, and copies buckets by the loader's record where that is safe."""
