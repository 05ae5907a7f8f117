"""OTLP collectors for tests: real receivers over HTTP and gRPC that keep what arrives, and ones that misbehave."""

from __future__ import annotations

import gzip
import socket
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Received:
    """What has arrived, as flat lists."""

    def __init__(self) -> None:
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        self.metrics: list[Any] = []
        self.scopes: list[Any] = []
        self.headers: list[dict[str, str]] = []

    def traces(self, request: Any) -> None:
        for of_resource in request.resource_spans:
            self.resources.append(attributes(of_resource.resource))
            for of_scope in of_resource.scope_spans:
                self.scopes.append(of_scope)
                self.spans.extend(of_scope.spans)

    def measured(self, request: Any) -> None:
        for of_resource in request.resource_metrics:
            self.resources.append(attributes(of_resource.resource))
            for of_scope in of_resource.scope_metrics:
                self.scopes.append(of_scope)
                self.metrics.extend(of_scope.metrics)

    def span(self, name: str) -> Any:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def metric(self, name: str) -> Any:
        return [metric for metric in self.metrics if metric.name == name][-1]


def attributes(record: Any) -> dict[str, Any]:
    """Attributes of a protobuf record as a plain dict."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in record.attributes}


class HttpCollector(Received):
    """Listens on `endpoint` and answers with `status`. With `hang` it accepts requests and never answers."""

    def __init__(self, status: int = 200, hang: bool = False, fail_after: int | None = None) -> None:
        super().__init__()
        self.status, self.requests = status, 0
        self._release = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.requests += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if hang or (fail_after is not None and collector.requests > fail_after):
                    collector._release.wait(60)
                    return
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.status == 200:
                    collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                    if self.path == "/v1/traces":
                        collector.traces(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
                    elif self.path == "/v1/metrics":
                        collector.measured(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()


class GrpcCollector(Received):
    """The same over gRPC. With `hang` it accepts calls and never answers."""

    def __init__(self, hang: bool = False) -> None:
        import grpc

        super().__init__()
        self.requests = 0
        self._release = threading.Event()
        if not hang:
            self._release.set()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        collector = self

        class Traces(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                collector.requests += 1
                collector._release.wait(60)
                collector.headers.append(dict(context.invocation_metadata()))
                collector.traces(request)
                return trace_service_pb2.ExportTraceServiceResponse()

        class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                collector.requests += 1
                collector._release.wait(60)
                collector.measured(request)
                return metrics_service_pb2.ExportMetricsServiceResponse()

        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), self._server)
        self._server.start()

    def close(self) -> None:
        self._release.set()
        self._server.stop(None)


def refusing() -> str:
    """Return an endpoint on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
