"""The metrics of vLLM servers that the dashboard shows beside vgen's (vLLM 0.32, `v1/metrics/loggers.py`)."""

from __future__ import annotations

from ..profiling.measurement import Instrument

SERVER = "instance"
MODEL = "model_name"
_LABELS = (SERVER, MODEL)

RUNNING = Instrument("vllm:num_requests_running", "gauge", "{request}", "Requests in the running batch.", _LABELS)
WAITING = Instrument("vllm:num_requests_waiting", "gauge", "{request}", "Requests that wait to be scheduled.", _LABELS)
KV_CACHE = Instrument("vllm:kv_cache_usage_perc", "gauge", "{share}", "Share of the KV cache in use, 0 to 1.", _LABELS)
GENERATED = Instrument("vllm:generation_tokens", "counter", "{token}", "Tokens generated.", _LABELS)
PROMPTED = Instrument("vllm:prompt_tokens", "counter", "{token}", "Prompt tokens processed.", _LABELS)
PREEMPTIONS = Instrument("vllm:num_preemptions", "counter", "{request}", "Requests that were preempted.", _LABELS)
FINISHED = Instrument(
    "vllm:request_success", "counter", "{request}", "Requests that ended, by reason.", (*_LABELS, "finished_reason")
)
PREFIX_QUERIES = Instrument("vllm:prefix_cache_queries", "counter", "{token}", "Tokens that were looked up.", _LABELS)
PREFIX_HITS = Instrument("vllm:prefix_cache_hits", "counter", "{token}", "Tokens found in the prefix cache.", _LABELS)
E2E = Instrument("vllm:e2e_request_latency_seconds", "histogram", "s", "From arrival to the last token.", _LABELS)
TTFT = Instrument("vllm:time_to_first_token_seconds", "histogram", "s", "From arrival to the first token.", _LABELS)
QUEUE = Instrument("vllm:request_queue_time_seconds", "histogram", "s", "From arrival to scheduling.", _LABELS)
SLEEP = Instrument(
    "vllm:engine_sleep_state", "gauge", "{engine}", "1 in the state that the label names.", (*_LABELS, "sleep_state")
)
