"""Every span, event, metric and attribute that vgen emits, with unit and meaning. Nothing else may be emitted.

The seconds of each span are aggregated as the histogram `<span name>.duration`. What the caller names
itself (`span("reward")`) is the caller's; the namespaces in `RESERVED` are not. `docs/telemetry.md` is
made from this file: `python -m vgen.profiling.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .records import Instrument

RESERVED = ("vgen.", "gen_ai.", "rl.")
"""A name that starts with one of these must be listed here."""


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """What a span name means and which attributes its spans carry of their own (inherited ones apart)."""

    name: str
    meaning: str
    attributes: tuple[str, ...] = ()
    selected: bool = False
    """Only some of what it stands for become spans: their seconds would be a histogram of nothing in particular."""


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """What an attribute means."""

    name: str
    type: str
    meaning: str
    label: bool = False
    """It takes few values, so that it may be a label of a metric."""


@dataclass(frozen=True, slots=True)
class EventSpec:
    """What an event within a span means."""

    name: str
    meaning: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Alias:
    """A metric of another vocabulary that the values of one of vgen's go to as well."""

    of: str
    """vgen's metric."""
    instrument: Instrument
    engines: tuple[str, ...]
    """The values of `vgen.engine` for which it is so."""
    constant: Mapping[str, str] = field(default_factory=dict[str, str])
    """Labels that always have this value."""


@dataclass(frozen=True, slots=True)
class Convention:
    """Another vocabulary, which the OpenTelemetry sink can speak: `OTelSink(conventions=(names.GEN_AI,))`."""

    spans: Mapping[str, str] = field(default_factory=dict[str, str])
    """What spans are called in it, instead of their own names; their `.duration` too."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """What it adds to spans, by vgen's span name."""
    metrics: tuple[Alias, ...] = ()


ATTRIBUTES: dict[str, AttributeSpec] = {}
SPANS: dict[str, SpanSpec] = {}
EVENTS: dict[str, EventSpec] = {}
METRICS: dict[str, Instrument] = {}
RESOURCE: dict[str, AttributeSpec] = {}
"""What is said once of a whole process, by the providers that vgen sets up."""


def _attribute(name: str, type: str, meaning: str, *, label: bool = False) -> str:
    ATTRIBUTES[name] = AttributeSpec(name, type, meaning, label)
    return name


def _event(name: str, meaning: str, *attributes: str) -> str:
    EVENTS[name] = EventSpec(name, meaning, attributes)
    return name


def _resource(name: str, type: str, meaning: str) -> str:
    RESOURCE[name] = AttributeSpec(name, type, meaning)
    return name


def _span(name: str, meaning: str, *attributes: str, selected: bool = False) -> str:
    SPANS[name] = SpanSpec(name, meaning, attributes, selected)
    return name


def _metric(name: str, kind: str, unit: str, description: str, *attributes: str) -> Instrument:
    METRICS[name] = Instrument(name, kind, unit, description, attributes)  # type: ignore[arg-type]
    return METRICS[name]


# Attributes ---------------------------------------------------------------------------------------------------------
STEP_NUMBER = _attribute("vgen.step", "int", "The trainer's step number.")
RANK = _attribute("vgen.rank", "int", "The trainer rank in whose process the record was made.")
ENGINE = _attribute("vgen.engine", "string", "Which kind of engine: `colocate`, `server` or `ray`.", label=True)
DEVICE = _attribute("vgen.engine.device", "string", "The engine's device type: `cpu` or `cuda`.", label=True)
MODEL = _attribute("gen_ai.request.model", "string", "The model's name or path.", label=True)
PROMPTS = _attribute("vgen.prompts", "int", "Prompts passed to the call.")
REFUSED = _attribute("vgen.prompts.refused", "int", "Prompts refused before the engine saw them.")
NUM_GENERATIONS = _attribute("vgen.num_generations", "int", "Completions asked for each prompt.")
COMPLETIONS = _attribute("vgen.completions", "int", "Completions returned.")
INPUT_TOKENS = _attribute("gen_ai.usage.input_tokens", "int", "Prompt tokens, each prompt once for each completion.")
OUTPUT_TOKENS = _attribute("gen_ai.usage.output_tokens", "int", "Completion tokens.")
WEIGHT_VERSION = _attribute("vgen.weight_version", "string", "The version of the weights in the engine.")
REQUEST_ID = _attribute("gen_ai.request.id", "string", "The engine's id of the request.")
FINISH_REASON = _attribute("gen_ai.response.finish_reasons", "string[]", "Why the completion ended.")
REBUILT = _attribute("vgen.rebuilt", "bool", "The span was made after the fact, from the engine's own timings.")
PROMPT_INDEX = _attribute("vgen.prompt.index", "int", "Which prompt of the call, from 0.")
GENERATION_INDEX = _attribute("vgen.generation.index", "int", "Which completion of the prompt, from 0.")
FINISHED_BY = _attribute("vgen.request.finish_reason", "string", "Why completions ended.", label=True)
FIRST_VERSION = _attribute(
    "vgen.weight_version.first", "string", "The version of the weights that sampled the first token."
)
ADMISSION_SECONDS = _attribute(
    "vgen.request.admission", "double", "Seconds from arriving at the engine's front end to queueing in its core."
)
QUEUE_SECONDS = _attribute("vgen.request.queue", "double", "Seconds from queueing to the first scheduling.")
PREFILL_SECONDS = _attribute("vgen.request.prefill", "double", "Seconds from scheduling to the first token.")
DECODE_SECONDS = _attribute("vgen.request.decode", "double", "Seconds from the first token to the last.")
E2E_SECONDS = _attribute("vgen.request.e2e", "double", "Seconds from arriving to the last token: the four together.")
TTFT_SECONDS = _attribute(
    "vgen.request.time_to_first_token", "double", "Seconds from arriving until the front end had the first token."
)
TPOT_SECONDS = _attribute(
    "vgen.request.time_per_output_token", "double", "Decode seconds for each token after the first."
)
PREEMPTIONS = _attribute("vgen.request.preemptions", "int", "How often the scheduler took the request off the device.")
CACHED_TOKENS = _attribute("vgen.request.cached_tokens", "int", "Prompt tokens found in the prefix cache.")
ENGINE_CALL = _attribute("vgen.engine.call", "string", "The id of the span in which the engine worked on the requests.")
SERVER = _attribute("vgen.server", "string", "Which server answered: its URL, without credentials.")
TRANSPORT = _attribute("vgen.weight_sync.transport", "string", "How the weights travelled.", label=True)
TRANSPORT_REASON = _attribute("vgen.weight_sync.transport.reason", "string", "Why that transport was taken.")
RANKS_BYTES = _attribute(
    "vgen.ranks.bytes", "int", "What this rank sent to or received from the others, headers and all."
)
PLAN_MODULES = _attribute("vgen.weight_sync.plan.modules", "int", "The engine's modules that have weights.")
PLAN_RELOADED = _attribute(
    "vgen.weight_sync.plan.reload_modules", "int", "Of these, how many went through the engine's own reload."
)
PLAN_WAY = _attribute(
    "vgen.weight_sync.plan.way",
    "string",
    "How the engine loaded them: `kernel` or `foreach` by its record, or `reload`; several servers' joined by `+`.",
    label=True,
)
PLAN_REASON = _attribute("vgen.weight_sync.plan.reason", "string", "Why servers have reloaded: `plan.way` is `reload`.")
VERIFY = _attribute(
    "vgen.weight_sync.verify.how",
    "string",
    "How the sync was verified: `bits`, `logprobs`, `deferred` until the engine is awake, or `skipped`.",
    label=True,
)
VERIFY_REASON = _attribute("vgen.weight_sync.verify.reason", "string", "Why verification was skipped.")
VERIFY_DIFFERENCE = _attribute(
    "vgen.weight_sync.verify.difference",
    "double",
    "Between the log-probabilities of engine and trainer: the largest in float32, the mean otherwise.",
)
SYNC_BYTES = _attribute("vgen.weight_sync.bytes", "int", "Bytes of weights sent.")
SYNC_TENSORS = _attribute("vgen.weight_sync.tensors", "int", "Tensors sent.")
SYNC_RATE = _attribute("vgen.weight_sync.bandwidth", "double", "Bytes sent for each second of the whole sync.")
GATHER_SECONDS = _attribute(
    "vgen.weight_sync.gather", "double", "Seconds of the load phase spent waiting for the trainer's model."
)
SYNC_RECEIVERS = _attribute("vgen.weight_sync.receivers", "int", "Servers that the weights went to.")
COPY_SECONDS = _attribute("vgen.weight_sync.copy", "double", "Seconds spent on writing the weights into buckets.")
BUCKETS = _attribute("vgen.weight_sync.buckets", "int", "Parts that the weights were sent in.")
RECEIVER_MIN = _attribute("vgen.weight_sync.receiver.min", "double", "Seconds that the fastest server took for it.")
RECEIVER_MEDIAN = _attribute("vgen.weight_sync.receiver.median", "double", "Seconds that the median server took.")
RECEIVER_MAX = _attribute("vgen.weight_sync.receiver.max", "double", "Seconds that the slowest server took.")
FOREIGN_VERSION = _attribute(
    "vgen.weight_sync.foreign_version", "string", "What a server held instead of what was expected: another's weights."
)
SLEEP_LEVEL = _attribute(
    "vgen.sleep.level",
    "int",
    "1 keeps the weights in host memory, 2 discards them; both discard the KV cache.",
    label=True,
)
WAKE_TAGS = _attribute("vgen.wake_up.tags", "string[]", "What was woken: `weights`, `kv_cache`.")
PAUSE_MODE = _attribute("vgen.pause.mode", "string", "`abort`, `wait` or `keep`.", label=True)
PAUSED_SECONDS = _attribute("vgen.weight_sync.paused", "double", "Seconds in which the engines were really paused.")
MEMORY_FREED = _attribute("vgen.sleep.memory_freed", "bool", "Whether sleeping gave memory back: false on a CPU.")
DEVICE_BYTES = _attribute(
    "vgen.memory.device.bytes", "int", "Device memory given back (sleep) or taken (wake up); absent on a CPU."
)
MEMORY_EXPECTED = _attribute(
    "vgen.memory.device.expected", "int", "What that should be by the engine's own list of its memory."
)
WEIGHTS_BYTES = _attribute("vgen.memory.weights.bytes", "int", "Device memory that waking took for the weights.")
WEIGHTS_EXPECTED = _attribute(
    "vgen.memory.weights.expected", "int", "The engine's memory for weights, by its own list: given back or taken."
)
KV_CACHE_BYTES = _attribute("vgen.memory.kv_cache.bytes", "int", "Device memory that waking took for the KV cache.")
KV_CACHE_EXPECTED = _attribute(
    "vgen.memory.kv_cache.expected", "int", "The engine's KV cache, by its own list: given back or taken."
)
HOST_BYTES = _attribute(
    "vgen.memory.host.bytes",
    "int",
    "Host memory taken (sleep: the weights' copy) or given back (wake up); absent on a CPU.",
)
LEAKED = _attribute(
    "vgen.sleep.leaked_bytes",
    "int",
    "Device memory in use after sleeping beyond what was after the first sleep of this level, without what torch's "
    "allocator holds.",
)
RESTORED = _attribute("vgen.wake_up.restores_weights", "bool", "The next generation restores the weights first.")
DEVICE_FREE = _attribute("vgen.memory.device.free", "int", "Free device memory by the driver, in bytes.")
DEVICE_USED = _attribute("vgen.memory.device.used", "int", "Device memory in use, of all processes, in bytes.")
STATE = _attribute("vgen.engine.state.to", "string", "The engine's new state.")
STATE_FROM = _attribute("vgen.engine.state.from", "string", "The state that it left.")
ENGINE_NUMBER = _attribute(
    "vgen.engine.number", "int", "Which engine of the process, from 0: where there are several of a kind.", label=True
)
STALLED_CALL = _attribute(
    "vgen.stall.call", "string", "What does not go on: `generate`, `sync_weights`, `sleep`, …", label=True
)
STALL_SECONDS = _attribute("vgen.stall.seconds", "double", "How long nothing came.")
OPEN_SPANS = _attribute("vgen.stall.open_spans", "string[]", "The spans that were open, the outermost first.")
ALLOCATED = _attribute("vgen.memory.device.allocated", "int", "What torch's allocator has handed out, in bytes.")
RESERVED_MEMORY = _attribute("vgen.memory.device.reserved", "int", "What torch's allocator holds, in bytes.")
HOST_RESIDENT = _attribute("vgen.memory.host.resident", "int", "Host memory of this process, in bytes.")
HOST_AVAILABLE = _attribute("vgen.memory.host.available", "int", "Host memory still to be had, in bytes.")
TIMED_SPAN = _attribute("vgen.timed_span.name", "string", "Which span's device work was timed.", label=True)
TIMED_SPAN_ID = _attribute("vgen.timed_span.id", "string", "That span's id.")
INPUT_CONTENT = _attribute("gen_ai.input.messages", "string", "The prompt. Only where content capture is on.")
OUTPUT_CONTENT = _attribute("gen_ai.output.messages", "string", "The completion. Only where content capture is on.")
EXCEPTION_MESSAGE = _attribute(
    "exception.message", "string", "What the exception says. Only where content capture is on."
)
EXCEPTION = _attribute("exception.type", "string", "The type of the exception that ended the span.")
ERROR_TYPE = _attribute("error.type", "string", "The same, under the name that OpenTelemetry has for it.", label=True)
SINK = _attribute("vgen.telemetry.sink", "string", "The sink's class.", label=True)

SINK_NUMBER = _attribute(
    "vgen.telemetry.sink.number", "int", "Of the scope of observed gauges: which of the process's OpenTelemetry sinks."
)

# Spans --------------------------------------------------------------------------------------------------------------
STEP = _span("train.step", "One training step: the caller's, opened with `step(n)`.", STEP_NUMBER)
ENGINE_INIT = _span("vgen.engine.init", "The engine starts: model, KV cache, warm-up.", ENGINE, MODEL, DEVICE)
GENERATE = _span(
    "vgen.generate",
    "One call of `generate`.",
    PROMPTS,
    REFUSED,
    NUM_GENERATIONS,
    COMPLETIONS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    WEIGHT_VERSION,
    ENGINE,
)
RANKS_GATHER = _span(
    "vgen.ranks.gather", "All ranks come to a call; their prompts go to the rank that has the engine.", RANKS_BYTES
)
RANKS_SCATTER = _span("vgen.ranks.scatter", "Each rank is sent its own completions.", RANKS_BYTES)
ENGINE_GENERATE = _span(
    "vgen.engine.generate", "The engine call alone; on a rank without the engine, waiting for the rank that has it."
)
REQUEST = _span(
    "vgen.request",
    "One completion, as the engine timed it.",
    REQUEST_ID,
    PROMPT_INDEX,
    GENERATION_INDEX,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    FINISH_REASON,
    WEIGHT_VERSION,
    FIRST_VERSION,
    SERVER,
    ADMISSION_SECONDS,
    QUEUE_SECONDS,
    PREFILL_SECONDS,
    DECODE_SECONDS,
    E2E_SECONDS,
    TTFT_SECONDS,
    TPOT_SECONDS,
    PREEMPTIONS,
    CACHED_TOKENS,
    REBUILT,
    selected=True,
)
DECODE_OUTPUTS = _span("vgen.decode_outputs", "The engine's outputs become completions.")
WEIGHT_SYNC = _span(
    "vgen.weight_sync",
    "The trainer's weights replace the engine's.",
    WEIGHT_VERSION,
    SYNC_BYTES,
    SYNC_TENSORS,
    SYNC_RATE,
    TRANSPORT,
    TRANSPORT_REASON,
    SYNC_RECEIVERS,
    PAUSED_SECONDS,
    FOREIGN_VERSION,
    PLAN_MODULES,
    PLAN_RELOADED,
    PLAN_WAY,
    PLAN_REASON,
    VERIFY,
    VERIFY_REASON,
    VERIFY_DIFFERENCE,
    ENGINE,
)
_RECEIVERS = (RECEIVER_MIN, RECEIVER_MEDIAN, RECEIVER_MAX)
SYNC_TRANSFER = _span(
    "vgen.weight_sync.transfer",
    "The weights go to where the engines can read them; in buckets, into their layers too.",
    GATHER_SECONDS,
    COPY_SECONDS,
    BUCKETS,
    *_RECEIVERS,
)
SYNC_PAUSE = _span("vgen.weight_sync.pause", "Servers stop scheduling.")
SYNC_RESUME = _span("vgen.weight_sync.resume", "Servers schedule again.")
SYNC_LOAD = _span("vgen.weight_sync.load", "The engine takes the weights in.", GATHER_SECONDS, *_RECEIVERS)
SYNC_VERIFY = _span(
    "vgen.weight_sync.verify",
    "The engine's log-probabilities are compared with the trainer model's, once it is awake.",
    VERIFY,
    VERIFY_REASON,
    VERIFY_DIFFERENCE,
)
SYNC_RESET = _span("vgen.weight_sync.reset_cache", "Caches of what the old weights computed are emptied.")
PAUSE = _span("vgen.pause", "The engine stops scheduling.", PAUSE_MODE, ENGINE)
RESUME = _span("vgen.resume", "It schedules again.", VERIFY, VERIFY_REASON, VERIFY_DIFFERENCE, ENGINE)
_EXPECTED = (MEMORY_EXPECTED, WEIGHTS_EXPECTED, KV_CACHE_EXPECTED)
SLEEP = _span(
    "vgen.sleep",
    "The engine goes to sleep.",
    SLEEP_LEVEL,
    MEMORY_FREED,
    DEVICE_BYTES,
    *_EXPECTED,
    HOST_BYTES,
    LEAKED,
    ENGINE,
)
WAKE_UP = _span(
    "vgen.wake_up",
    "The engine wakes up, in whole or in part.",
    WAKE_TAGS,
    SLEEP_LEVEL,
    MEMORY_FREED,
    DEVICE_BYTES,
    WEIGHTS_BYTES,
    KV_CACHE_BYTES,
    *_EXPECTED,
    HOST_BYTES,
    RESTORED,
    VERIFY,
    VERIFY_REASON,
    VERIFY_DIFFERENCE,
    ENGINE,
)
ENGINE_CLOSE = _span("vgen.engine.close", "The engine is shut down, or its servers are let go.", ENGINE)
STALL = _span(
    "vgen.stall",
    "A call of the engine's did not go on: no token, no completion, no phase. Open while that lasts.",
    STALLED_CALL,
    OPEN_SPANS,
    ENGINE,
)

SELECTED = frozenset(name for name, spec in SPANS.items() if spec.selected)
"""Spans that only some of what they stand for get: their seconds are no distribution, so they are not aggregated."""

# Metrics ------------------------------------------------------------------------------------------------------------
GENERATED_TOKENS = _metric("vgen.generate.output_tokens", "counter", "{token}", "Completion tokens.", ENGINE)
PROMPT_TOKENS = _metric("vgen.generate.input_tokens", "counter", "{token}", "Prompt tokens.", ENGINE)
THROUGHPUT = _metric(
    "vgen.generate.throughput", "gauge", "{token}/s", "Completion tokens for each second of the last call.", ENGINE
)
COMPLETION_LENGTH = _metric("vgen.completion.length", "histogram", "{token}", "Tokens of a completion.", ENGINE)
PROMPT_LENGTH = _metric(
    "vgen.prompt.length", "histogram", "{token}", "Prompt tokens of a request, once for each completion.", ENGINE
)
REQUEST_START = _metric(
    "vgen.request.start", "histogram", "s", "From the start of the engine call to arriving at the engine.", ENGINE
)
REQUEST_E2E = _metric("vgen.request.e2e", "histogram", "s", "From arriving to the last token.", ENGINE)
REQUEST_ADMISSION = _metric(
    "vgen.request.admission",
    "histogram",
    "s",
    "From arriving at the engine's front end to queueing in its core.",
    ENGINE,
)
REQUEST_QUEUE = _metric("vgen.request.queue", "histogram", "s", "From queueing to the first scheduling.", ENGINE)
REQUEST_PREFILL = _metric("vgen.request.prefill", "histogram", "s", "From scheduling to the first token.", ENGINE)
REQUEST_DECODE = _metric("vgen.request.decode", "histogram", "s", "From the first token to the last.", ENGINE)
REQUEST_TTFT = _metric(
    "vgen.request.time_to_first_token",
    "histogram",
    "s",
    "From arriving until the engine's front end had the first token.",
    ENGINE,
)
REQUEST_TPOT = _metric(
    "vgen.request.time_per_output_token", "histogram", "s", "Decode time for each token after the first.", ENGINE
)
REQUEST_PREEMPTED = _metric(
    "vgen.request.preemptions", "counter", "{preemption}", "How often requests were taken off the device.", ENGINE
)
REQUEST_CACHED = _metric(
    "vgen.request.cached_tokens", "counter", "{token}", "Prompt tokens found in the prefix cache.", ENGINE
)
REQUEST_FINISHED = _metric(
    "vgen.request.finished", "counter", "{request}", "Completions, by what ended them.", ENGINE, FINISHED_BY
)
SYNCED_BYTES = _metric("vgen.weight_sync.sent", "counter", "By", "Bytes of weights sent.", ENGINE, TRANSPORT)
SYNC_BANDWIDTH = _metric(
    "vgen.weight_sync.rate", "gauge", "By/s", "Bytes sent for each second of the last sync.", ENGINE, TRANSPORT
)
STATES = ("starting", "awake", "paused", "syncing", "asleep", "waking", "failed", "closed")
"""The engine's states; the gauge's value is the place."""
ENGINE_STATE = _metric(
    "vgen.engine.state",
    "gauge",
    "{state}",
    "What the engine is doing: " + ", ".join(f"{number} {state}" for number, state in enumerate(STATES)) + ".",
    ENGINE,
    ENGINE_NUMBER,
)
ENGINE_STATE_AGE = _metric(
    "vgen.engine.state.age", "gauge", "s", "How long it has been doing that.", ENGINE, ENGINE_NUMBER
)
STALLED = _metric(
    "vgen.engine.stalled",
    "gauge",
    "s",
    "How long a call that has stalled has had no token, completion or phase; 0 while all goes on.",
    ENGINE,
    ENGINE_NUMBER,
)
STALLS = _metric("vgen.engine.stalls", "counter", "{stall}", "Stalls that have begun.", ENGINE, ENGINE_NUMBER)
LEAKED_TOTAL = _metric(
    "vgen.sleep.leaked",
    "counter",
    "By",
    "Device memory that sleeping gave back at first and does not any more, by level; what torch's allocator holds is "
    "none of it.",
    ENGINE,
    SLEEP_LEVEL,
)
SLEEP_FREED = _metric(
    "vgen.sleep.freed", "counter", "By", "Device memory that sleeping has given back.", ENGINE, SLEEP_LEVEL
)
WAKE_TAKEN = _metric("vgen.wake_up.taken", "counter", "By", "Device memory that waking up has taken.", ENGINE)
_LAST = "when an engine last slept, woke up or was brought new weights."
MEMORY_USED = _metric(DEVICE_USED, "gauge", "By", f"Device memory in use, of all processes, {_LAST}", ENGINE)
MEMORY_RESIDENT = _metric(HOST_RESIDENT, "gauge", "By", f"Host memory of the trainer's process, {_LAST}", ENGINE)
DEVICE_TIME = _metric(
    "vgen.device.time", "histogram", "s", "What a span's work took on the device, by device events.", TIMED_SPAN
)
DEVICE_PENDING = _metric("vgen.device.pending", "gauge", "{span}", "Timed spans whose device work is not done yet.")
DROPPED = _metric(
    "vgen.telemetry.dropped", "counter", "{record}", "Telemetry records lost to a full queue or a dead sink.", SINK
)

# Events -------------------------------------------------------------------------------------------------------------
EXCEPTION_EVENT = _event("exception", "The exception that ended the span: its type, never its message.", EXCEPTION)

STATE_CHANGED = _event("vgen.engine.state", "The engine's state changed.", STATE_FROM, STATE)
STALL_OVER = _event("vgen.stall", "A stall is over, or was ended.", STALLED_CALL, STALL_SECONDS)

# Resource -----------------------------------------------------------------------------------------------------------
SERVICE_NAME = _resource("service.name", "string", "`OTEL_SERVICE_NAME`, or `vgen`.")
SERVICE_INSTANCE = _resource("service.instance.id", "string", "Host, process and rank: one for each process.")
HOST_NAME = _resource("host.name", "string", "The machine.")
PROCESS_ID = _resource("process.pid", "int", "The process.")
_resource(RANK, "int", "The trainer rank: as passed, or torchrun's `RANK`.")
RL_RUN_ID = _resource("rl.run.id", "string", "The training run; the caller's to pass. Experimental.")
RL_ALGORITHM = _resource("rl.algorithm", "string", "Such as `grpo`; the caller's to pass. Experimental.")

# Buckets ------------------------------------------------------------------------------------------------------------
SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""From one decoded token to an hour's rollout. OpenTelemetry's own default is made for milliseconds."""
BYTES = tuple(float(4**power) for power in range(5, 22))
"""1 KiB to 4 TiB, each bucket four times the one before."""
COUNTS = tuple(float(2**power) for power in range(21))
"""1 to a million, each bucket twice the one before: tokens, requests, tensors."""


def boundaries(instrument: Instrument) -> tuple[float, ...]:
    """The upper bounds of a histogram's buckets: its own, or those of its unit."""
    return instrument.boundaries or {"s": SECONDS, "By": BYTES}.get(instrument.unit, COUNTS)


def duration(span_name: str) -> Instrument:
    """The histogram of a span's seconds. Its labels are those of the span's attributes that take few values."""
    spec = SPANS.get(span_name)
    own = [name for name in spec.attributes if ATTRIBUTES[name].label] if spec is not None else []
    shared = [ENGINE] if span_name.startswith("vgen.") and ENGINE not in own else []
    labels = (*shared, *own, ERROR_TYPE)
    return Instrument(span_name + ".duration", "histogram", "s", f"Seconds of `{span_name}`.", labels)


# Other vocabularies -------------------------------------------------------------------------------------------------
OPERATION = _attribute("gen_ai.operation.name", "string", "Always `text_completion`.", label=True)
PROVIDER = _attribute("gen_ai.provider.name", "string", "Always `vllm`.", label=True)
TOKEN_TYPE = _attribute("gen_ai.token.type", "string", "`input` or `output`.", label=True)

_GEN_AI_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_GEN_AI_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_GEN_AI_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_GEN_AI_TOKENS = tuple(float(4**power) for power in range(14))


def _alias(
    of: Instrument, name: str, bounds: tuple[float, ...], engines: tuple[str, ...], tokens: str | None = None
) -> Alias:
    constant = {OPERATION: "text_completion", PROVIDER: "vllm"} | ({TOKEN_TYPE: tokens} if tokens else {})
    description = "Prompt and completion tokens of a request." if tokens else of.description
    return Alias(
        of.name, Instrument(name, "histogram", of.unit, description, (*constant, MODEL), bounds), engines, constant
    )


_HERE = ("colocate",)
"""vgen runs the engine itself: only then is this process a model server."""
_ELSEWHERE = ("server", "ray")
"""The engine is another process, and this one its client."""

GEN_AI = Convention(
    attributes={name: {OPERATION: "text_completion", PROVIDER: "vllm"} for name in (GENERATE, REQUEST)},
    metrics=(
        _alias(REQUEST_E2E, "gen_ai.server.request.duration", _GEN_AI_SECONDS, _HERE),
        _alias(REQUEST_TTFT, "gen_ai.server.time_to_first_token", _GEN_AI_FIRST, _HERE),
        _alias(REQUEST_TPOT, "gen_ai.server.time_per_output_token", _GEN_AI_PER_TOKEN, _HERE),
        _alias(REQUEST_E2E, "gen_ai.client.operation.duration", _GEN_AI_SECONDS, _ELSEWHERE),
        _alias(REQUEST_TTFT, "gen_ai.client.operation.time_to_first_chunk", _GEN_AI_SECONDS, _ELSEWHERE),
        _alias(PROMPT_LENGTH, "gen_ai.client.token.usage", _GEN_AI_TOKENS, _ELSEWHERE, tokens="input"),
        _alias(COMPLETION_LENGTH, "gen_ai.client.token.usage", _GEN_AI_TOKENS, _ELSEWHERE, tokens="output"),
    ),
)
"""OpenTelemetry's generative AI conventions, with their own buckets. Status there: development."""

RL_EXPERIMENTAL = Convention(
    spans={STEP: "rl.loop", GENERATE: "rl.sample", "reward": "rl.reward", "update": "rl.train", WEIGHT_SYNC: "rl.sync"}
)
"""Experimental: the names under discussion for reinforcement learning, open-telemetry/semantic-conventions-genai
issue 88. Resource attributes that belong to it: `rl.run.id`, `rl.algorithm`. It will change with them."""
