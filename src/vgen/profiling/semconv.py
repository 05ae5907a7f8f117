"""The telemetry names of vgen: every span, event, metric and attribute, with its unit and meaning.

vgen emits no other name in the namespaces of `RESERVED`; names of the caller's own, such as `span("reward")`, must
be outside them. The seconds of each span are also the histogram `<span name>.duration`.

As OpenTelemetry requires (https://opentelemetry.io/docs/specs/semconv/general/naming/), the name of an attribute is
never also a namespace of other attributes, and the same for metrics. `python -m vgen.profiling.semconv_docs` makes
`docs/telemetry.md` from this file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .measurement import Instrument

RESERVED = ("vgen.", "gen_ai.", "rl.")
"""A name that starts with one of these must be listed in this file."""


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """The name of a span or an event, and the attributes that it may have; a span also has inherited ones."""

    name: str
    meaning: str
    attributes: tuple[str, ...] = ()
    selected: bool = False
    """Only a selection of the work gets a span. Its seconds are not aggregated: they would not be representative."""


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """An attribute of spans, metrics or resources."""

    name: str
    type: str
    meaning: str
    label: bool = False
    """It has few different values, so it may be a label of a metric."""


@dataclass(frozen=True, slots=True)
class Alias:
    """A metric of another vocabulary that receives the same values as one of vgen's metrics."""

    of: str
    """The name of vgen's metric."""
    instrument: Instrument
    engines: tuple[str, ...]
    """Only for values with one of these as `vgen.engine.kind`."""
    constant: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels that always have the same value."""


@dataclass(frozen=True, slots=True)
class Convention:
    """Another vocabulary that the OpenTelemetry sink can emit: `OTelSink(conventions=(semconv.GEN_AI,))`."""

    spans: Mapping[str, str] = field(default_factory=dict[str, str])
    """Span names of vgen, and of the caller, to the names that replace them, also in `<span name>.duration`."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Attributes that are added to spans, by vgen's span name."""
    metrics: tuple[Alias, ...] = ()


ATTRIBUTES: dict[str, AttributeSpec] = {}
SPANS: dict[str, SpanSpec] = {}
EVENTS: dict[str, SpanSpec] = {}
METRICS: dict[str, Instrument] = {}
RESOURCE: dict[str, AttributeSpec] = {}
"""Attributes of a whole process, set by the providers that vgen makes."""


def _attribute(name: str, type: str, meaning: str, *, label: bool = False) -> str:
    ATTRIBUTES[name] = AttributeSpec(name, type, meaning, label)
    return name


def _event(name: str, meaning: str, *attributes: str) -> str:
    EVENTS[name] = SpanSpec(name, meaning, attributes)
    return name


def _resource(name: str, type: str, meaning: str) -> str:
    RESOURCE[name] = AttributeSpec(name, type, meaning)
    return name


def _span(name: str, meaning: str, attributes: tuple[str, ...] = (), *, selected: bool = False) -> str:
    SPANS[name] = SpanSpec(name, meaning, attributes, selected)
    return name


def _metric(kind: Any, name: str, unit: str, description: str, *labels: str) -> Instrument:
    METRICS[name] = Instrument(name, kind, unit, description, labels)
    return METRICS[name]


_counter, _gauge, _histogram = (functools.partial(_metric, kind) for kind in ("counter", "gauge", "histogram"))


# Attributes ---------------------------------------------------------------------------------------------------------
STEP_NUMBER = _attribute("vgen.step", "int", "The trainer's step number.")
RANK = _attribute("vgen.rank", "int", "The trainer rank whose process made the record.")
ENGINE = _attribute("vgen.engine.kind", "string", "The kind of engine: `colocate` or `server`.", label=True)
ENGINE_NUMBER = _attribute("vgen.engine.number", "int", "Tells engines of one process apart; from 0.", label=True)
DEVICE = _attribute("vgen.engine.device", "string", "The engine's device type: `cpu` or `cuda`.", label=True)
ENGINE_CALL = _attribute("vgen.engine.call", "string", "The ID of the span of the engine call.")
STATE = _attribute("vgen.engine.state.to", "string", "The engine's new state.")
STATE_FROM = _attribute("vgen.engine.state.from", "string", "The engine's old state.")
MODEL = _attribute("gen_ai.request.model", "string", "The model's name or path.", label=True)
PROMPTS = _attribute("vgen.prompts", "int", "Prompts passed to the call.")
REFUSED = _attribute("vgen.refused_prompts", "int", "Prompts that were refused before the engine received them.")
NUM_GENERATIONS = _attribute("vgen.num_generations", "int", "Completions requested for each prompt.")
COMPLETIONS = _attribute("vgen.completions", "int", "Completions returned.")
NAN_COMPLETIONS = _attribute("vgen.nan_completions", "int", "Completions with a log-probability that is NaN, if any.")
INPUT_TOKENS = _attribute("gen_ai.usage.input_tokens", "int", "Prompt tokens, counted once for each completion.")
OUTPUT_TOKENS = _attribute("gen_ai.usage.output_tokens", "int", "Completion tokens.")
WEIGHT_VERSION = _attribute("vgen.weight_version", "string", "The version of the weights in the engine.")
FIRST_VERSION = _attribute("vgen.first_weight_version", "string", "The weight version that sampled the first token.")
REQUEST_ID = _attribute("gen_ai.request.id", "string", "The engine's ID of the request.")
FINISH_REASON = _attribute("gen_ai.response.finish_reasons", "string[]", "Why the completion ended.")
FINISHED_BY = _attribute("vgen.request.finish_reason", "string", "Why completions ended.", label=True)
REBUILT = _attribute("vgen.rebuilt", "bool", "The span was made afterwards, from the engine's own timings.")
PROMPT_INDEX = _attribute("vgen.prompt.index", "int", "The prompt's index in the call, from 0.")
GENERATION_INDEX = _attribute("vgen.generation.index", "int", "The completion's index for its prompt, from 0.")
ADMISSION_SECONDS = _attribute("vgen.request.admission", "double", "Seconds from arrival to the queue in the core.")
QUEUE_SECONDS = _attribute("vgen.request.queue", "double", "Seconds in the queue, to the first scheduling.")
PREFILL_SECONDS = _attribute("vgen.request.prefill", "double", "Seconds from scheduling to the first token.")
DECODE_SECONDS = _attribute("vgen.request.decode", "double", "Seconds from the first token to the last.")
E2E_SECONDS = _attribute(
    "vgen.request.e2e", "double", "Seconds from arrival to the last token: admission + queue + prefill + decode."
)
TTFT_SECONDS = _attribute("vgen.request.time_to_first_token", "double", "Seconds to the first token at the front end.")
TPOT_SECONDS = _attribute("vgen.request.time_per_output_token", "double", "Decode seconds per token after the first.")
PREEMPTIONS = _attribute("vgen.request.preemptions", "int", "How often the scheduler preempted the request.")
CACHED_TOKENS = _attribute("vgen.request.cached_tokens", "int", "Prompt tokens found in the prefix cache.")
SERVER = _attribute("vgen.server", "string", "The server that answered: its URL without credentials.")
RANKS_BYTES = _attribute("vgen.ranks.bytes", "int", "Bytes that this rank sent to or received from other ranks.")
TRANSPORT = _attribute("vgen.weight_sync.transport.name", "string", "How the weights were sent.", label=True)
TRANSPORT_REASON = _attribute("vgen.weight_sync.transport.reason", "string", "Why that transport was chosen.")
PLAN_MODULES = _attribute("vgen.weight_sync.plan.modules", "int", "The engine's modules that have weights.")
PLAN_RELOADED = _attribute("vgen.weight_sync.plan.reload_modules", "int", "Modules loaded by the engine's own reload.")
PLAN_WAY = _attribute(
    "vgen.weight_sync.plan.way",
    "string",
    "How the engine loaded the weights: `kernel` or `foreach` from a recorded load, or `reload`; joined by `+` for "
    "several servers.",
    label=True,
)
PLAN_REASON = _attribute("vgen.weight_sync.plan.reason", "string", "Why servers used `reload`.")
AUDIT = _attribute(
    "vgen.weight_sync.audit.outcome",
    "string",
    "`passed` if every element sent is known to reach a parameter and every parameter is written, else `unaudited`.",
    label=True,
)
AUDIT_REASON = _attribute("vgen.weight_sync.audit.reason", "string", "Why the sync was not audited.")
AUDIT_NARROWED = _attribute(
    "vgen.weight_sync.audit.narrowed",
    "string[]",
    "Tensors that the trainer keeps in a wider dtype than most of its others, and the engine does not.",
)
VERIFY = _attribute(
    "vgen.weight_sync.verify.how",
    "string",
    "How the sync was verified: `bits`, `logprobs`, `deferred` (until the engine is awake), or `skipped`.",
    label=True,
)
VERIFY_REASON = _attribute("vgen.weight_sync.verify.reason", "string", "Why verification was skipped.")
VERIFY_DIFFERENCE = _attribute(
    "vgen.weight_sync.verify.difference",
    "double",
    "Mean difference of log-probabilities between engine and trainer, in nats.",
)
VERIFY_RATIO = _attribute(
    "vgen.weight_sync.verify.ratio",
    "double",
    "Differences of log-probabilities, as a multiple of what rounding errors cause. At most 2 is right.",
)
DRIFT_MEAN = _attribute(
    "vgen.generate.drift.mean", "double", "Mean difference of log-probabilities between engine and trainer, in nats."
)
DRIFT_MAX = _attribute("vgen.generate.drift.max", "double", "The largest of these differences, in nats.")
DRIFT_SKIPPED = _attribute("vgen.generate.drift.skipped", "string", "Why a comparison that was due was not made.")
SYNC_BYTES = _attribute("vgen.weight_sync.bytes", "int", "Bytes of weights sent.")
SYNC_TENSORS = _attribute("vgen.weight_sync.tensors", "int", "Tensors sent.")
SYNC_RATE = _attribute("vgen.weight_sync.bandwidth", "double", "Bytes sent per second of the whole sync.")
GATHER_SECONDS = _attribute("vgen.weight_sync.gather", "double", "Seconds spent waiting for the trainer's model.")
SYNC_RECEIVERS = _attribute("vgen.weight_sync.receivers", "int", "Servers that received the weights.")
COPY_SECONDS = _attribute("vgen.weight_sync.copy", "double", "Seconds spent copying the weights into buckets.")
BUCKETS = _attribute("vgen.weight_sync.buckets", "int", "Parts in which the weights were sent.")
RECEIVER_MIN = _attribute("vgen.weight_sync.receiver.min", "double", "Seconds that the fastest server took.")
RECEIVER_MEDIAN = _attribute("vgen.weight_sync.receiver.median", "double", "Seconds that the median server took.")
RECEIVER_MAX = _attribute("vgen.weight_sync.receiver.max", "double", "Seconds that the slowest server took.")
FOREIGN_VERSION = _attribute("vgen.weight_sync.foreign_version", "string", "The unexpected version found on a server.")
PAUSED_SECONDS = _attribute("vgen.weight_sync.paused", "double", "Seconds for which the engines were paused.")
PAUSE_MODE = _attribute("vgen.pause.mode", "string", "`abort`, `wait` or `keep`.", label=True)
SLEEP_LEVEL = _attribute(
    "vgen.sleep.level", "int", "1 keeps weights in host memory, 2 discards them. Both discard the KV cache.", label=True
)
MEMORY_FREED = _attribute("vgen.sleep.memory_freed", "bool", "Whether sleeping freed memory: false on a CPU.")
LEAKED = _attribute(
    "vgen.sleep.leaked_bytes",
    "int",
    "Device memory in use after sleeping, beyond that after the first sleep of this level; without what torch's "
    "allocator holds.",
)
WAKE_TAGS = _attribute("vgen.wake_up.tags", "string[]", "What was woken: `weights`, `kv_cache`.")
RESTORED = _attribute("vgen.wake_up.restores_weights", "bool", "The next generation restores the weights first.")
DEVICE_BYTES = _attribute("vgen.memory.device.bytes", "int", "Device memory freed or allocated; absent on a CPU.")
MEMORY_EXPECTED = _attribute("vgen.memory.device.expected", "int", "Expected device memory, by the engine's own list.")
WEIGHTS_BYTES = _attribute("vgen.memory.weights.bytes", "int", "Device memory that waking allocated for the weights.")
WEIGHTS_EXPECTED = _attribute("vgen.memory.weights.expected", "int", "Expected weights, by the engine's own list.")
KV_CACHE_BYTES = _attribute("vgen.memory.kv_cache.bytes", "int", "Device memory that waking allocated for KV cache.")
KV_CACHE_EXPECTED = _attribute("vgen.memory.kv_cache.expected", "int", "Expected KV cache, by the engine's own list.")
HOST_BYTES = _attribute(
    "vgen.memory.host.bytes", "int", "Host memory taken (sleep) or freed (wake up) for the weights; absent on a CPU."
)
DEVICE_FREE = _attribute("vgen.memory.device.free", "int", "Free device memory by the driver, in bytes.")
DEVICE_USED = _attribute("vgen.memory.device.used", "int", "Device memory in use by all processes, in bytes.")
ALLOCATED = _attribute("vgen.memory.device.allocated", "int", "Memory that torch's allocator has allocated, in bytes.")
RESERVED_MEMORY = _attribute("vgen.memory.device.reserved", "int", "Memory that torch's allocator holds, in bytes.")
HOST_RESIDENT = _attribute("vgen.memory.host.resident", "int", "Resident host memory of this process, in bytes.")
HOST_AVAILABLE = _attribute("vgen.memory.host.available", "int", "Available host memory, in bytes.")
STALLED_CALL = _attribute(
    "vgen.stall.call", "string", "The call that makes no progress: `generate`, `sync_weights`, `sleep`, …", label=True
)
STALL_SECONDS = _attribute("vgen.stall.seconds", "double", "How long there was no progress.")
OPEN_SPANS = _attribute("vgen.stall.open_spans", "string[]", "The spans that were open, the outermost first.")
TIMED_SPAN = _attribute("vgen.timed_span.name", "string", "The span whose device work was timed.", label=True)
TIMED_SPAN_ID = _attribute("vgen.timed_span.id", "string", "The ID of the timed span.")
INPUT_CONTENT = _attribute("gen_ai.input.messages", "string", "The prompt. Only if content capture is on.")
OUTPUT_CONTENT = _attribute("gen_ai.output.messages", "string", "The completion. Only if content capture is on.")
EXCEPTION_MESSAGE = _attribute("exception.message", "string", "The exception's message. Only if content capture is on.")
EXCEPTION = _attribute("exception.type", "string", "The type of the exception that ended the span.")
ERROR_TYPE = _attribute(
    "error.type",
    "string",
    "The type of the exception, or of another error, that ended the work. On spans only with `OTelSink`.",
    label=True,
)
SINK = _attribute("vgen.telemetry.sink.name", "string", "The class of the sink.", label=True)
SINK_NUMBER = _attribute("vgen.telemetry.sink.number", "int", "Tells sinks apart, on the scope of observed gauges.")

# Spans --------------------------------------------------------------------------------------------------------------
_VERIFICATION = (VERIFY, VERIFY_REASON, VERIFY_RATIO, VERIFY_DIFFERENCE)
_VERIFIED = (VERIFY, VERIFY_RATIO, VERIFY_DIFFERENCE)
_RECEIVERS = (RECEIVER_MIN, RECEIVER_MEDIAN, RECEIVER_MAX)
_EXPECTED = (MEMORY_EXPECTED, WEIGHTS_EXPECTED, KV_CACHE_EXPECTED)
_TOKENS = (INPUT_TOKENS, OUTPUT_TOKENS)
_REQUEST = (REQUEST_ID, PROMPT_INDEX, GENERATION_INDEX, *_TOKENS, FINISH_REASON, WEIGHT_VERSION, FIRST_VERSION, SERVER)
_REQUEST_PHASES = (ADMISSION_SECONDS, QUEUE_SECONDS, PREFILL_SECONDS, DECODE_SECONDS)
_REQUEST_TIMES = (*_REQUEST_PHASES, E2E_SECONDS, TTFT_SECONDS, TPOT_SECONDS, PREEMPTIONS, CACHED_TOKENS)
_DRIFT = (DRIFT_MEAN, DRIFT_MAX, DRIFT_SKIPPED)
_GENERATE = (PROMPTS, REFUSED, NUM_GENERATIONS, COMPLETIONS, NAN_COMPLETIONS, *_TOKENS, *_DRIFT, WEIGHT_VERSION, ENGINE)
_SYNC_SIZE = (WEIGHT_VERSION, SYNC_BYTES, SYNC_TENSORS, SYNC_RATE)
_SYNC_WAY = (TRANSPORT, TRANSPORT_REASON, SYNC_RECEIVERS, PAUSED_SECONDS, FOREIGN_VERSION)
_SYNC_PLAN = (PLAN_MODULES, PLAN_RELOADED, PLAN_WAY, PLAN_REASON, AUDIT, AUDIT_REASON, AUDIT_NARROWED)
_MEMORY = (DEVICE_FREE, DEVICE_USED, ALLOCATED, RESERVED_MEMORY, HOST_RESIDENT, HOST_AVAILABLE)
_SYNC = (*_SYNC_SIZE, *_SYNC_WAY, *_SYNC_PLAN, *_VERIFICATION, *_MEMORY, ENGINE)
_SLEEP = (SLEEP_LEVEL, MEMORY_FREED, DEVICE_BYTES, *_EXPECTED, HOST_BYTES, LEAKED, *_MEMORY, ENGINE)
_WAKE_BYTES = (MEMORY_FREED, DEVICE_BYTES, WEIGHTS_BYTES, KV_CACHE_BYTES)
_WAKE_UP = (WAKE_TAGS, SLEEP_LEVEL, *_WAKE_BYTES, *_EXPECTED, HOST_BYTES, RESTORED, *_VERIFICATION, *_MEMORY, ENGINE)
_STALL = (STALLED_CALL, OPEN_SPANS, ENGINE)

STEP = _span("train.step", "One training step. The caller opens it with `step(n)`.", (STEP_NUMBER,))
ENGINE_INIT = _span(
    "vgen.engine.init", "The engine starts: model, KV cache, warm-up.", (ENGINE, MODEL, DEVICE, *_MEMORY)
)
GENERATE = _span("vgen.generate", "One call of `generate`.", _GENERATE)
RANKS_GATHER = _span("vgen.ranks.gather", "All ranks send their prompts to the rank with the engine.", (RANKS_BYTES,))
RANKS_SCATTER = _span("vgen.ranks.scatter", "Each rank receives its own completions.", (RANKS_BYTES,))
ENGINE_GENERATE = _span(
    "vgen.engine.generate", "The engine call. On a rank without an engine: the wait for the rank that has one."
)
REQUEST = _span(
    "vgen.request", "One completion, as the engine timed it.", (*_REQUEST, *_REQUEST_TIMES, REBUILT), selected=True
)
DECODE_OUTPUTS = _span("vgen.decode_outputs", "The engine's outputs are converted to completions.")
WEIGHT_SYNC = _span("vgen.weight_sync", "The trainer's weights replace those of the engine.", _SYNC)
SYNC_TRANSFER = _span(
    "vgen.weight_sync.transfer",
    "The weights are sent to where the engines can read them. If sent in buckets, they are loaded as well.",
    (GATHER_SECONDS, COPY_SECONDS, BUCKETS, *_RECEIVERS),
)
SYNC_PAUSE = _span("vgen.weight_sync.pause", "Servers stop scheduling.")
SYNC_RESUME = _span("vgen.weight_sync.resume", "Servers schedule again.")
SYNC_LOAD = _span("vgen.weight_sync.load", "The engine loads the weights.", (GATHER_SECONDS, *_RECEIVERS))
SYNC_VERIFY = _span(
    "vgen.weight_sync.verify",
    "Log-probabilities of engine and trainer model are compared, once the engine is awake.",
    _VERIFICATION,
)
SYNC_RESET = _span("vgen.weight_sync.reset_cache", "The engine's caches, computed with the old weights, are emptied.")
VERIFICATION = _span(
    "vgen.verify",
    "The engine's weights are compared with those of the trainer's model, without a sync.",
    (WEIGHT_VERSION, *_VERIFIED, ENGINE),
)
PAUSE = _span("vgen.pause", "The engine stops scheduling.", (PAUSE_MODE, ENGINE))
RESUME = _span("vgen.resume", "The engine schedules again.", (*_VERIFICATION, ENGINE))
SLEEP = _span("vgen.sleep", "The engine goes to sleep.", _SLEEP)
WAKE_UP = _span("vgen.wake_up", "The engine wakes up, fully or in part.", _WAKE_UP)
ENGINE_CLOSE = _span("vgen.engine.close", "The engine is shut down, or its servers are released.", (ENGINE,))
STALL = _span("vgen.stall", "An engine call brings no token, completion or phase. Open while that lasts.", _STALL)

SELECTED = frozenset(name for name, spec in SPANS.items() if spec.selected)
"""Names of spans that only a selection of the work gets; see `SpanSpec.selected`."""

# Metrics ------------------------------------------------------------------------------------------------------------
GENERATED_TOKENS = _counter("vgen.generate.output_tokens", "{token}", "Completion tokens.", ENGINE)
PROMPT_TOKENS = _counter("vgen.generate.input_tokens", "{token}", "Prompt tokens.", ENGINE)
THROUGHPUT = _gauge("vgen.generate.throughput", "{token}/s", "Completion tokens per second of the last call.", ENGINE)
NAN_LOGPROBS = _counter(
    "vgen.generate.nan_logprobs", "{completion}", "Completions with a log-probability that is NaN.", ENGINE
)
DRIFT = _histogram(
    "vgen.weight_sync.drift",
    "{nat}",
    "Differences of log-probabilities of sampled tokens between engine and trainer.",
    ENGINE,
)
COMPLETION_LENGTH = _histogram("vgen.completion.length", "{token}", "Tokens of a completion.", ENGINE)
PROMPT_LENGTH = _histogram("vgen.prompt.length", "{token}", "Prompt tokens of a request, once per completion.", ENGINE)
REQUEST_START = _histogram("vgen.request.start", "s", "From the start of the engine call to arrival.", ENGINE)
REQUEST_E2E = _histogram("vgen.request.e2e", "s", "From arrival to the last token.", ENGINE)
REQUEST_ADMISSION = _histogram("vgen.request.admission", "s", "From arrival to the queue in the core.", ENGINE)
REQUEST_QUEUE = _histogram("vgen.request.queue", "s", "Time in the queue, to the first scheduling.", ENGINE)
REQUEST_PREFILL = _histogram("vgen.request.prefill", "s", "From scheduling to the first token.", ENGINE)
REQUEST_DECODE = _histogram("vgen.request.decode", "s", "From the first token to the last.", ENGINE)
REQUEST_TTFT = _histogram("vgen.request.time_to_first_token", "s", "Time to the first token at the front end.", ENGINE)
REQUEST_TPOT = _histogram("vgen.request.time_per_output_token", "s", "Decode time per token after the first.", ENGINE)
REQUEST_PREEMPTED = _counter("vgen.request.preemptions", "{preemption}", "How often requests were preempted.", ENGINE)
REQUEST_CACHED = _counter("vgen.request.cached_tokens", "{token}", "Prompt tokens found in the prefix cache.", ENGINE)
REQUEST_FINISHED = _counter("vgen.request.finished", "{request}", "Completions, by finish reason.", ENGINE, FINISHED_BY)
SYNCED_BYTES = _counter("vgen.weight_sync.sent", "By", "Bytes of weights sent.", ENGINE, TRANSPORT)
SYNC_BANDWIDTH = _gauge("vgen.weight_sync.rate", "By/s", "Bytes sent per second of the last sync.", ENGINE, TRANSPORT)
STATES = ("starting", "awake", "paused", "syncing", "asleep", "waking", "failed", "closed")
"""The engine's states. The value of the gauge is the index."""
_STATES = ", ".join(f"{number} {state}" for number, state in enumerate(STATES))
_WHICH_ENGINE = (ENGINE, ENGINE_NUMBER)
ENGINE_STATE = _gauge("vgen.engine.state", "{state}", f"The engine's state: {_STATES}.", *_WHICH_ENGINE)
ENGINE_STATE_AGE = _gauge("vgen.engine.state_age", "s", "How long the engine has been in its state.", *_WHICH_ENGINE)
STALLED = _gauge(
    "vgen.engine.stalled", "s", "How long a stalled call has made no progress; 0 if none is stalled.", *_WHICH_ENGINE
)
STALLS = _counter("vgen.engine.stalls", "{stall}", "Stalls that have begun.", *_WHICH_ENGINE)
LEAKED_TOTAL = _counter(
    "vgen.sleep.leaked",
    "By",
    "Device memory that sleeping freed at first and does not free any more, by level; without what torch's allocator "
    "holds.",
    ENGINE,
    SLEEP_LEVEL,
)
SLEEP_FREED = _counter("vgen.sleep.freed", "By", "Device memory that sleeping has freed.", ENGINE, SLEEP_LEVEL)
WAKE_TAKEN = _counter("vgen.wake_up.taken", "By", "Device memory that waking up has allocated.", ENGINE)
_LAST = "when an engine last slept, woke up or received weights."
MEMORY_USED = _gauge(DEVICE_USED, "By", f"Device memory in use by all processes, {_LAST}", ENGINE)
MEMORY_RESIDENT = _gauge(HOST_RESIDENT, "By", f"Host memory of the trainer's process, {_LAST}", ENGINE)
DEVICE_TIME = _histogram("vgen.device.time", "s", "Device time of a span's work, by device events.", TIMED_SPAN)
DEVICE_PENDING = _gauge("vgen.device.pending", "{span}", "Timed spans whose device work is not done yet.")
DROPPED = _counter("vgen.telemetry.dropped", "{record}", "Telemetry records lost to a full queue or a dead sink.", SINK)

STEPLESS = frozenset(each.name for each in (ENGINE_STATE, STALLED, STALLS, DEVICE_TIME, DROPPED))
"""Metrics that vgen's own threads may measure, of an engine or of this process and not of a step's work."""

# Events -------------------------------------------------------------------------------------------------------------
EXCEPTION_EVENT = _event("exception", "An exception ended the span. Only `OTelSink` has this event.", EXCEPTION)
STATE_CHANGED = _event("vgen.engine.state", "The engine's state changed.", STATE_FROM, STATE)
STALL_OVER = _event(
    "vgen.stall", "A stall ended, because the call made progress or ended.", STALLED_CALL, STALL_SECONDS
)

# Resource -----------------------------------------------------------------------------------------------------------
SERVICE_NAME = _resource("service.name", "string", "`OTEL_SERVICE_NAME`, or `vgen`.")
SERVICE_INSTANCE = _resource("service.instance.id", "string", "Host, process and rank: unique for each process.")
HOST_NAME = _resource("host.name", "string", "The name of the host.")
PROCESS_ID = _resource("process.pid", "int", "The ID of the process.")
_resource(RANK, "int", "The trainer rank: as passed, or torchrun's `RANK`.")
RL_RUN_ID = _resource("rl.run.id", "string", "The training run. The caller passes it. Experimental.")
RL_ALGORITHM = _resource("rl.algorithm", "string", "For example `grpo`. The caller passes it. Experimental.")

# Buckets ------------------------------------------------------------------------------------------------------------
SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""From the time of one token to a rollout of an hour. OpenTelemetry's default buckets are meant for milliseconds."""
BYTES = tuple(float(4**power) for power in range(5, 22))
"""1 KiB to 4 TiB, by factors of four."""
COUNTS = tuple(float(2**power) for power in range(21))
"""1 to a million, by factors of two: for tokens, requests, tensors."""

NATS = tuple(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3))
"""Differences of log-probabilities: from the rounding of float32 to another model's."""


def boundaries(instrument: Instrument) -> tuple[float, ...]:
    """Return the upper bounds of a histogram's buckets: its own, or those of its unit."""
    return instrument.boundaries or {"s": SECONDS, "By": BYTES, "{nat}": NATS}.get(instrument.unit, COUNTS)


def duration(span_name: str) -> Instrument:
    """Return the histogram of a span's seconds. Its labels are the span's attributes that have few values."""
    spec = SPANS.get(span_name)
    labels = [name for name in spec.attributes if ATTRIBUTES[name].label] if spec is not None else []
    if span_name.startswith("vgen.") and ENGINE not in labels:
        labels.insert(0, ENGINE)
    return Instrument(f"{span_name}.duration", "histogram", "s", f"Seconds of `{span_name}`.", (*labels, ERROR_TYPE))


# Renamed ------------------------------------------------------------------------------------------------------------
RENAMED_ATTRIBUTES = {
    "vgen.engine": ENGINE,
    "vgen.prompts.refused": REFUSED,
    "vgen.telemetry.sink": SINK,
    "vgen.weight_sync.transport": TRANSPORT,
    "vgen.weight_version.first": FIRST_VERSION,
}
"""Old names to new ones. Readers of recorded runs apply them, so that older runs can still be read."""
RENAMED_METRICS = {"vgen.engine.state.age": ENGINE_STATE_AGE.name}
"""The same for metrics."""

# Other vocabularies -------------------------------------------------------------------------------------------------
OPERATION = _attribute("gen_ai.operation.name", "string", "Always `text_completion`.", label=True)
PROVIDER = _attribute("gen_ai.provider.name", "string", "Always `vllm`.", label=True)
TOKEN_TYPE = _attribute("gen_ai.token.type", "string", "`input` or `output`.", label=True)
TOKEN_MODALITY = _attribute("gen_ai.token.modality", "string", "`text` for output, `unknown` for input.", label=True)

_GEN_AI_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_GEN_AI_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_GEN_AI_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_GEN_AI_TOKENS = tuple(float(4**power) for power in range(14))

_OPERATION, _INFERENCE = {"operation"}, {"inference"}
_BOTH = _OPERATION | _INFERENCE
_TEXT, _UNKNOWN = {TOKEN_MODALITY: "text"}, {TOKEN_MODALITY: "unknown"}  # a prompt may have images, too
_IN_PROCESS = ("colocate",)
"""This process runs the engine. Only then is it a model server, with the names `gen_ai.server.*`."""
_REMOTE = ("server",)
"""The engine is in another process, and this one is its client."""
_GEN_AI_METRICS: tuple[tuple[set[str], Instrument, tuple[str, ...], str, tuple[float, ...], dict[str, str]], ...] = (
    # in which of the two conventions, vgen's metric, for which engines, its name there, buckets, constant labels
    (_BOTH, REQUEST_E2E, _IN_PROCESS, "gen_ai.server.request.duration", _GEN_AI_SECONDS, {}),
    (_BOTH, REQUEST_TTFT, _IN_PROCESS, "gen_ai.server.time_to_first_token", _GEN_AI_FIRST, {}),
    (_BOTH, REQUEST_TPOT, _IN_PROCESS, "gen_ai.server.time_per_output_token", _GEN_AI_PER_TOKEN, {}),
    (_OPERATION, REQUEST_E2E, _REMOTE, "gen_ai.client.operation.duration", _GEN_AI_SECONDS, {}),
    (_OPERATION, REQUEST_TTFT, _REMOTE, "gen_ai.client.operation.time_to_first_chunk", _GEN_AI_SECONDS, {}),
    (_OPERATION, PROMPT_LENGTH, _REMOTE, "gen_ai.client.token.usage", _GEN_AI_TOKENS, {TOKEN_TYPE: "input"}),
    (_OPERATION, COMPLETION_LENGTH, _REMOTE, "gen_ai.client.token.usage", _GEN_AI_TOKENS, {TOKEN_TYPE: "output"}),
    (_INFERENCE, REQUEST_E2E, _REMOTE, "gen_ai.client.inference.duration", _GEN_AI_SECONDS, {}),
    (_INFERENCE, REQUEST_TTFT, _REMOTE, "gen_ai.client.inference.time_to_first_chunk", _GEN_AI_SECONDS, {}),
    (_INFERENCE, PROMPT_LENGTH, _REMOTE, "gen_ai.client.inference.operation.input_tokens", _GEN_AI_TOKENS, {}),
    (_INFERENCE, COMPLETION_LENGTH, _REMOTE, "gen_ai.client.inference.operation.output_tokens", _GEN_AI_TOKENS, {}),
    (_INFERENCE, PROMPT_TOKENS, _REMOTE, "gen_ai.client.inference.usage.input_tokens", (), _UNKNOWN),
    (_INFERENCE, GENERATED_TOKENS, _REMOTE, "gen_ai.client.inference.usage.output_tokens", (), _TEXT),
)


def _gen_ai(convention: str) -> Convention:
    common = {OPERATION: "text_completion", PROVIDER: "vllm"}
    aliases: list[Alias] = []
    for conventions, of, engines, name, bounds, labels in _GEN_AI_METRICS:
        if convention in conventions:
            constant = common | labels
            description = "Prompt and completion tokens of a request." if TOKEN_TYPE in labels else of.description
            instrument = Instrument(name, of.kind, of.unit, description, (*constant, MODEL), bounds)
            aliases.append(Alias(of.name, instrument, engines, constant))
    return Convention(attributes={GENERATE: common, REQUEST: common}, metrics=tuple(aliases))


GEN_AI = _gen_ai("operation")
"""OpenTelemetry's generative AI conventions, as most instrumentations emit them: `gen_ai.client.operation.*`, with
the buckets that they ask for. Their status is development.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/"""

GEN_AI_INFERENCE = _gen_ai("inference")
"""The newer names for the same, from release 0.1.0 of their own repository: `gen_ai.client.inference.*`. Status:
development. https://github.com/open-telemetry/semantic-conventions-genai/blob/v0.1.0/docs/gen-ai/client-inference.md"""

RL_EXPERIMENTAL = Convention(
    spans={STEP: "rl.loop", GENERATE: "rl.sample", "reward": "rl.reward", "update": "rl.train", WEIGHT_SYNC: "rl.sync"}
)
"""Experimental: names for reinforcement learning that OpenTelemetry discusses, and that will change with the
discussion: https://github.com/open-telemetry/semantic-conventions-genai/issues/88. The resource attributes `rl.run.id`
and `rl.algorithm` belong to them."""
