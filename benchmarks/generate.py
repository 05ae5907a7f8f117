"""The time of generation through a server, compared with other clients.

    python benchmarks/generate.py                      # a page of tables
    python benchmarks/generate.py --json               # one JSON object
    python benchmarks/generate.py --from result.json   # the page of an earlier result: docs/generate.md
    python benchmarks/generate.py --size 1.5b --prompts 256 --tokens 256   # on a GPU

`vgen serve` starts two servers of the same model, one of them with vLLM's own tracing. All cases get the same prompts.
Each of `--rounds` rounds runs every case once, so that a machine that slows down slows all cases. The page has
medians, and the median of the ratios to the batched call of the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is the result's

from pairs import interval

from vgen import Completion, Generation, RequestTracing, Sampling, ServerConnection, ServerGeneration
from vgen.engines.server.launcher import on_cpu, start_server
from vgen.engines.server.server_process import ServerProcess

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(max_position_embeddings=4096),
    "1.5b": dict(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
}
RECEIVER = """
import http.server

class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
print(server.server_port, flush=True)
server.serve_forever()
"""
IN_FLIGHT = 4096
PRECISION = 0.03
"""Of the ratios in process: half the width of their 95 % interval. Pairs are added until it is reached."""
DECODED = 256, 2048
TRL = "TRL's VLLMClient"


def post(url: str, body: Any, key: str) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


def wants(model: str, prompt: Any, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **more,
    }


@contextmanager
def receiver() -> Iterator[str]:
    """The endpoint of one that takes OTLP over HTTP, in a process of its own, and throws it away."""
    with subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1/traces"
        finally:
            process.terminate()


def cases(
    server: ServerProcess,
    tracing: ServerProcess,
    key: str,
    generation: dict[str, ServerGeneration],
    prompts: list[list[int]],
    tokens: int,
) -> dict[str, Callable[[], int]]:
    """Each samples a completion of every prompt and returns how many tokens it got."""
    url, model = server.url, server.model
    pool = ThreadPoolExecutor(256)

    def count(answer: Any) -> int:
        return sum(len(choice["token_ids"]) for choice in answer["choices"])

    def batched(to: str) -> Callable[[], int]:
        return lambda: count(post(f"{to}/v1/completions", wants(model, prompts, tokens), key))

    def single() -> int:
        def one(prompt):
            return count(post(f"{url}/v1/completions", wants(model, prompt, tokens), key))

        return sum(pool.map(one, prompts))

    def token_in_token_out() -> int:
        params = {"max_tokens": tokens, "ignore_eos": True, "logprobs": 0}

        def one(prompt):
            return count(post(f"{url}/inference/v1/generate", {"token_ids": prompt, "sampling_params": params}, key))

        return sum(pool.map(one, prompts))

    def ours(name: str) -> Callable[[], int]:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        return lambda: generation[name].generate(prompts, sampling).output_tokens

    found: dict[str, Callable[[], int]] = {"/v1/completions, one call": batched(url)}
    try:
        from trl.generation.vllm_client import VLLMClient
    except ImportError:
        pass
    else:
        # It has no way to pass a key: it is given one here, as its users do.
        client = VLLMClient.__new__(VLLMClient)
        import requests

        client.session, client.base_url, client.model = requests.Session(), url, model
        client.session.headers["Authorization"] = f"Bearer {key}"

        def trl() -> int:
            more = {"ignore_eos": True}
            answer = client.generate(prompts, max_tokens=tokens, temperature=1.0, generation_kwargs=more)
            return sum(map(len, answer["completion_ids"]))

        found[TRL] = trl
    found |= {
        "vgen, without timing, stock routes": ours("batched"),
        "/v1/completions, a call for each": single,
        "/inference/v1/generate, a call for each": token_in_token_out,
        "vgen, with timing, stock routes": ours("single"),
        "vgen": ours("vgen"),
        "/v1/completions, one call, vLLM's tracing": batched(tracing.url),
        "vgen, vLLM's tracing, two requests traced": ours("some traced"),
        "vgen, vLLM's tracing, every request traced": ours("all traced"),
    }
    return found


def connect(server: ServerProcess, tracing: ServerProcess, key: str) -> dict[str, ServerGeneration]:
    from vgen import ProfilingContext
    from vgen.testing import MemorySink

    def one(to: ServerProcess, stock: bool = False, traced_requests: int = 2, **more: Any) -> ServerGeneration:
        tracing = RequestTracing(request_spans=0, traced_requests=traced_requests)
        made = ServerGeneration(None, base_urls=to.url, api_key=key, request_tracing=tracing, **more)
        if stock:
            for endpoint in made.engine.endpoints:
                endpoint.features = frozenset()
        return made

    def traced(count: int) -> ServerGeneration:
        return one(tracing, traced_requests=count, profiling=ProfilingContext([MemorySink()]))

    return {
        "batched": one(server, stock=True, connection=ServerConnection(request_timing=False)),
        "single": one(server, stock=True),
        "vgen": one(server),
        "some traced": traced(2),
        "all traced": traced(sys.maxsize),
    }


def in_process(size: str, prompts: list[list[int]], tokens: int, least: int, minutes: float) -> dict[str, Any]:
    """One engine in this process: its bare `vllm.LLM`, vgen without profiling, vgen with every sink, in turn."""
    from vgen import ColocateGeneration, ProfilingContext
    from vgen.testing import tiny_model

    with tempfile.TemporaryDirectory(prefix="vgen-benchmark-") as folder:
        model, _ = tiny_model(folder, **SIZES[size])
        options: dict[str, Any] = {"gpu_memory_utilization": 0.4, "max_model_length": 1024}
        if not on_cpu():
            import torch

            model = model.to("cuda", torch.bfloat16)
        options["engine_kwargs"] = {"enable_prefix_caching": False}
        recording = ProfilingContext(every_sink(folder))
        with ColocateGeneration(model, max_num_seqs=len(prompts), **options) as generation:
            generation.sync_weights()
            # The same engine, held by a second object that records.
            recorded = Generation(generation.engine, None, profiling=recording)
            rows = compare_in_process(generation, recorded, recording, prompts, tokens, least, minutes)
        recording.close()
    return rows


def every_sink(folder: str) -> list[Any]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from vgen.profiling.sinks.jsonl import JsonlSink
    from vgen.profiling.sinks.otel import OTelSink

    spans = TracerProvider()
    spans.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    return [JsonlSink(f"{folder}/run"), OTelSink(spans, MeterProvider(metric_readers=[InMemoryMetricReader()]))]


def compare_in_process(
    off: Any, recorded: Any, recording: Any, prompts: list[list[int]], tokens: int, least: int, minutes: float
) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    steps = iter(range(1 << 30))

    def with_sinks() -> None:
        with recording.step(next(steps)):
            recorded.generate(prompts, sampling)

    ways: dict[str, Callable[[], object]] = {
        "vllm.LLM, in process": lambda: off.engine.llm.generate(inputs, params, use_tqdm=False),
        "vgen, in process": lambda: off.generate(prompts, sampling),
        "vgen, in process, with every sink": with_sinks,
    }
    bare, *others = ways
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warms up
    ends = time.monotonic() + 60 * minutes

    def ratio(name: str) -> dict[str, Any]:
        return interval([a / b for a, b in zip(seconds[name], seconds[bare], strict=True)])

    while len(seconds[bare]) < least or any(ratio(name)["reach"] > PRECISION for name in others):
        if time.monotonic() > ends:
            break
        for name in list(ways) if len(seconds[bare]) % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
        print({name: round(row[-1], 3) for name, row in seconds.items()}, file=sys.stderr, flush=True)
    return {
        name: {"seconds": statistics.median(row), "min": min(row), "max": max(row)}
        | ({} if name == bare else {"of_llm": ratio(name)})
        for name, row in seconds.items()
    }


def decode(rounds: int = 5) -> dict[str, Any]:
    """Making Python lists of a reply of 256 × 2,048 tokens with log-probabilities, as it comes over the wire."""
    from vgen import completion_codec as codec
    from vgen.engine_protocol import Request
    from vgen.engines.client import batch_client, openai_client

    many, length = DECODED
    ids = [[(i * 7919 + j) % 150_000 for j in range(length)] for i in range(many)]
    values = [[-((j % 97) / 7 + 1e-3) for j in range(length)] for _ in range(many)]
    choices = [
        {
            "index": i,
            "text": "x" * length,
            "logprobs": {
                "text_offset": list(range(length)),
                "token_logprobs": values[i],
                "tokens": [f"token_id:{token}" for token in ids[i]],
                "top_logprobs": [{f"token_id:{token}": value} for token, value in zip(ids[i], values[i], strict=True)],
            },
            "finish_reason": "length",
            "token_ids": ids[i],
            "prompt_token_ids": [1, 2, 3],
        }
        for i in range(many)
    ]
    reply = json.dumps({"id": "cmpl-x", "choices": choices}).encode()
    requests = [Request(i, 0, [1, 2, 3], None) for i in range(many)]
    made = [
        Completion(
            prompt_index=i, generation_index=0, token_ids=ids[i], logprobs=_singles(values[i]), finish_reason="length"
        )
        for i in range(many)
    ]
    packed = [codec.encode(codec.Done(i, codec.pack(each), 0)) for i, each in enumerate(made)]

    def stock() -> Any:
        answer = openai_client._decode(openai_client._Logprobs, reply)
        pairs = zip(requests, answer.choices, strict=True)
        return [openai_client._completion(request, choice, "", "", None) for request, choice in pairs]

    def route() -> Any:
        done = [codec.decode_frame(raw) for raw in packed]
        return [batch_client.completion_of(requests[each.index], each, "") for each in done]

    ways: dict[str, Callable[[], Any]] = {"vgen, stock routes": stock, "vgen": route}
    try:
        from trl.generation.vllm_client import parse_logprobs
    except ImportError:
        pass
    else:

        def trl() -> Any:
            found = json.loads(reply)["choices"]
            return [choice["token_ids"] for choice in found], parse_logprobs([choice["logprobs"] for choice in found])

        ways = {TRL: trl, **ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    assert [c.token_ids for c in route()] == ids == [c.token_ids for c in stock()]
    return {
        "seconds": medians,
        "bytes": {"/v1/completions": len(reply), "vgen": sum(map(len, packed))},
        "of_trl": {name: found / medians[TRL] for name, found in medians.items()} if TRL in medians else {},
    }


def _singles(values: list[float]) -> list[float | None]:
    """In single precision, as an engine's log-probabilities are."""
    return array("f", values).tolist()


def in_flight(generation: ServerGeneration, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """`IN_FLIGHT` prompts at once: what they grow this process by, against the same reply as JSON."""
    many = [prompts[i % len(prompts)] for i in range(IN_FLIGHT)]
    gc.collect()
    before = resident()
    peak = [before]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = generation.generate(many, Sampling(max_tokens=tokens, ignore_eos=True))
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    as_json = sum(94 * len(completion.token_ids) + 300 for completion in result)  # as /v1/completions would answer
    return {
        "prompts": IN_FLIGHT,
        "tokens": result.output_tokens,
        "seconds": seconds,
        "growth_bytes": peak[0] - before,
        "reply_as_json_bytes": as_json,
        "of_reply": (peak[0] - before) / as_json,
        "complete": len(result) == IN_FLIGHT,
    }


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from vgen.testing import tiny_model

    size, many, tokens, rounds = options.size, options.prompts, options.tokens, options.rounds
    prompts = [[1 + (i * 31 + j) % 250 for j in range(32)] for i in range(many)]
    found: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "size": size,
        "prompts": many,
        "tokens": tokens,
        "rounds": rounds,
    }
    alone = {} if options.no_bare else in_process(size, prompts, tokens, options.least, options.minutes)
    if options.in_process:
        return found | {"rows": alone}
    folder = tempfile.mkdtemp(prefix="vgen-benchmark-")
    model, _ = tiny_model(folder, **SIZES[size])
    if size != "tiny":
        import torch

        model = model.to(torch.bfloat16)
        model.save_pretrained(folder)
    key = "benchmark-key"
    del model
    arguments = ["--max-model-len", "4096", "--no-enable-prefix-caching"]
    arguments += ["--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 30)] if on_cpu() else []
    if not on_cpu():
        arguments += ["--gpu-memory-utilization", "0.3"]
    with (
        receiver() as endpoint,
        start_server(folder, api_key=key, arguments=arguments) as server,
        start_server(folder, api_key=key, arguments=arguments, otlp_traces_endpoint=endpoint) as tracing,
    ):
        generation = connect(server, tracing, key)
        ways = cases(server, tracing, key, generation, prompts, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                got = way()
                took = time.perf_counter() - start
                assert got == many * tokens, (name, got)
                if round_number:  # the first warms up
                    seconds[name].append(took)
        base = seconds["/v1/completions, one call"]
        each = seconds["/v1/completions, a call for each"]
        found["rows"] = {
            name: {
                "seconds": statistics.median(row),
                "min": min(row),
                "max": max(row),
                "of_one_call": statistics.median(a / b for a, b in zip(row, base, strict=True)),
                "of_a_call_for_each": statistics.median(a / b for a, b in zip(row, each, strict=True)),
            }
            for name, row in seconds.items()
        }
        found["rows"] = {**alone, **found["rows"]}
        found["in_flight"] = in_flight(generation["vgen"], prompts, min(tokens, 64))
        for each_one in generation.values():
            each_one.close()
    found["decode"] = decode()
    return found


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Generation through a server",
        "",
        f"Made by `python benchmarks/generate.py --rounds {found['rounds']} --json > docs/results/generate.json` and "
        "`python benchmarks/generate.py --from docs/results/generate.json > docs/generate.md`; no figure was typed by "
        f"hand. {found['prompts']} prompts × {found['tokens']} tokens, model `{found['size']}`, {found['machine']}.",
        "",
        "| | median s | min | max | × one `/v1/completions` call | × one call per completion |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("of_one_call", "of_a_call_for_each")]
        figures = " | ".join([*(f"{row[key]:.3f}" for key in ("seconds", "min", "max")), *ratios])
        lines.append(f"| {name.replace('a call for each', 'one call per completion')} | {figures} |")
    lines += [
        "",
        "Ratios are medians of the ratios within each round.",
        *(_of_llm(name, row["of_llm"]) for name, row in found["rows"].items() if "of_llm" in row),
    ]
    if "decode" in found:
        lines += _servers(found)
    return "\n".join(lines) + "\n"


def _servers(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "`vgen` is the batch route of a server that `vgen serve` started ([why there is one](servers.md#why-there-is-a-"
        "batch-route)): one call, with timing, weight versions and a seed of its own for every completion. With *stock "
        "routes*, vgen talks to the same server as to a stock one. On a stock server vgen makes one call without "
        "timing, or one call per completion with timing.",
        "",
        "With *vLLM's tracing*, the server exports its own spans: by default for two random requests of each call that "
        "vgen makes, on request for every one ([one trace](servers.md#one-trace)).",
        "",
        f"## Decoding a reply of {DECODED[0]} × {DECODED[1]:,} tokens with log-probabilities",
        "",
        "| | median s | × TRL's |",
        "|---|---:|---:|",
    ]
    decoded = found["decode"]
    for name, seconds in decoded["seconds"].items():
        ratio = f"{decoded['of_trl'][name]:.2f}" if decoded["of_trl"] else ""
        lines.append(f"| {name} | {seconds:.3f} | {ratio} |")
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in decoded["bytes"].items())
    flight = found["in_flight"]
    lines += [
        "",
        f"On the wire: {sizes}.",
        "",
        f"## {flight['prompts']:,} prompts in flight",
        "",
        f"{flight['tokens']:,} tokens in {flight['seconds']:.1f} s; the client's memory grew by at most "
        f"{flight['growth_bytes'] / 1e6:.1f} MB; a `/v1/completions` reply would be "
        f"{flight['reply_as_json_bytes'] / 1e6:.1f} MB.",
    ]
    return lines


def _of_llm(name: str, ratio: dict[str, Any]) -> str:
    between = f"{ratio['low']:.3f} to {ratio['high']:.3f}, 95 %"
    return (
        f"`{name}` takes {ratio['ratio']:.3f} ({between}, {ratio['pairs']} pairs) of the time of its bare `vllm.LLM`."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-bare", action="store_true", help="do not measure vllm.LLM")
    parser.add_argument("--in-process", action="store_true", help="measure nothing else")
    parser.add_argument("--least", type=int, default=15, help="pairs in process, at least")
    parser.add_argument("--minutes", type=float, default=30.0, help="for the pairs in process, at most")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--from",
        dest="result",
        type=Path,
        metavar="FILE",
        help="show the result that --json printed, and measure nothing",
    )
    options = parser.parse_args()
    found = measure(options) if options.result is None else json.loads(options.result.read_text())
    print(json.dumps(found, indent=1) if options.json else page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
