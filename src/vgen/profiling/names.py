"""Every span, metric and attribute that vgen emits, with unit and meaning. Nothing else may be emitted.

The seconds of each span are aggregated as the histogram `<span name>.duration`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .records import Instrument


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """What a span name means and which attributes its spans carry of their own (inherited ones apart)."""

    name: str
    meaning: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """What an attribute means."""

    name: str
    type: str
    meaning: str


ATTRIBUTES: dict[str, AttributeSpec] = {}
SPANS: dict[str, SpanSpec] = {}
METRICS: dict[str, Instrument] = {}


def _attribute(name: str, type: str, meaning: str) -> str:
    ATTRIBUTES[name] = AttributeSpec(name, type, meaning)
    return name


def _span(name: str, meaning: str, *attributes: str) -> str:
    SPANS[name] = SpanSpec(name, meaning, attributes)
    return name


def _metric(name: str, kind: str, unit: str, description: str, *attributes: str) -> Instrument:
    METRICS[name] = Instrument(name, kind, unit, description, attributes)  # type: ignore[arg-type]
    return METRICS[name]


# Attributes ---------------------------------------------------------------------------------------------------------
STEP_NUMBER = _attribute("vgen.step", "int", "The trainer's step number.")
RANK = _attribute("vgen.rank", "int", "The trainer rank in whose process the record was made.")
ENGINE = _attribute("vgen.engine", "string", "Which kind of engine: `colocate`, `server` or `ray`.")
DEVICE = _attribute("vgen.engine.device", "string", "The engine's device type: `cpu` or `cuda`.")
MODEL = _attribute("gen_ai.request.model", "string", "The model's name or path.")
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
QUEUE_SECONDS = _attribute("vgen.request.queue", "double", "Seconds from queueing to the first scheduling.")
TTFT_SECONDS = _attribute("vgen.request.time_to_first_token", "double", "Seconds from queueing to the first token.")
TPOT_SECONDS = _attribute(
    "vgen.request.time_per_output_token", "double", "Decode seconds for each token after the first."
)
PREEMPTIONS = _attribute("vgen.request.preemptions", "int", "How often the scheduler took the request off the device.")
CACHED_TOKENS = _attribute("vgen.request.cached_tokens", "int", "Prompt tokens found in the prefix cache.")
TRANSPORT = _attribute("vgen.weight_sync.transport", "string", "How the weights travelled.")
TRANSPORT_REASON = _attribute("vgen.weight_sync.transport.reason", "string", "Why that transport was taken.")
SYNC_BYTES = _attribute("vgen.weight_sync.bytes", "int", "Bytes of weights sent.")
SYNC_TENSORS = _attribute("vgen.weight_sync.tensors", "int", "Tensors sent.")
SYNC_RATE = _attribute("vgen.weight_sync.bandwidth", "double", "Bytes sent for each second of the whole sync.")
GATHER_SECONDS = _attribute(
    "vgen.weight_sync.gather", "double", "Seconds of the load phase spent waiting for the trainer's model."
)
SLEEP_LEVEL = _attribute(
    "vgen.sleep.level", "int", "1 keeps the weights in host memory, 2 discards them; both discard the KV cache."
)
WAKE_TAGS = _attribute("vgen.wake_up.tags", "string[]", "What was woken: `weights`, `kv_cache`.")
MEMORY_FREED = _attribute("vgen.sleep.memory_freed", "bool", "Whether sleeping gave memory back: false on a CPU.")
DEVICE_BYTES = _attribute(
    "vgen.memory.device.bytes", "int", "Device memory given back (sleep) or taken (wake up); absent on a CPU."
)
RESTORED = _attribute("vgen.wake_up.restores_weights", "bool", "The next generation restores the weights first.")
EXCEPTION = _attribute("exception.type", "string", "The type of the exception that ended the span.")
ERROR_TYPE = _attribute("error.type", "string", "OpenTelemetry's name for the same.")
SINK = _attribute("vgen.telemetry.sink", "string", "The sink's class.")

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
ENGINE_GENERATE = _span("vgen.engine.generate", "The engine call alone.")
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
    QUEUE_SECONDS,
    TTFT_SECONDS,
    TPOT_SECONDS,
    PREEMPTIONS,
    CACHED_TOKENS,
    REBUILT,
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
    ENGINE,
)
SYNC_LOAD = _span("vgen.weight_sync.load", "The engine takes the weights in.", GATHER_SECONDS)
SYNC_RESET = _span("vgen.weight_sync.reset_cache", "Caches of what the old weights computed are emptied.")
SLEEP = _span("vgen.sleep", "The engine goes to sleep.", SLEEP_LEVEL, MEMORY_FREED, DEVICE_BYTES, ENGINE)
WAKE_UP = _span("vgen.wake_up", "The engine wakes up, in whole or in part.", WAKE_TAGS, DEVICE_BYTES, RESTORED, ENGINE)

# Metrics ------------------------------------------------------------------------------------------------------------
GENERATED_TOKENS = _metric("vgen.generate.output_tokens", "counter", "{token}", "Completion tokens.", ENGINE)
PROMPT_TOKENS = _metric("vgen.generate.input_tokens", "counter", "{token}", "Prompt tokens.", ENGINE)
THROUGHPUT = _metric(
    "vgen.generate.throughput", "gauge", "{token}/s", "Completion tokens for each second of the last call.", ENGINE
)
COMPLETION_LENGTH = _metric("vgen.completion.length", "histogram", "{token}", "Tokens of a completion.", ENGINE)
REQUEST_E2E = _metric("vgen.request.e2e", "histogram", "s", "From queueing to the last token.", ENGINE)
REQUEST_QUEUE = _metric("vgen.request.queue", "histogram", "s", "From queueing to the first scheduling.", ENGINE)
REQUEST_PREFILL = _metric("vgen.request.prefill", "histogram", "s", "From scheduling to the first token.", ENGINE)
REQUEST_TTFT = _metric(
    "vgen.request.time_to_first_token", "histogram", "s", "From queueing to the first token.", ENGINE
)
REQUEST_TPOT = _metric(
    "vgen.request.time_per_output_token", "histogram", "s", "Decode time for each token after the first.", ENGINE
)
SYNCED_BYTES = _metric("vgen.weight_sync.sent", "counter", "By", "Bytes of weights sent.", ENGINE, TRANSPORT)
SYNC_BANDWIDTH = _metric(
    "vgen.weight_sync.rate", "gauge", "By/s", "Bytes sent for each second of the last sync.", ENGINE, TRANSPORT
)
DROPPED = _metric(
    "vgen.telemetry.dropped", "counter", "{record}", "Telemetry records lost to a full queue or a dead sink.", SINK
)
