"""Spans kept in memory, and a collector for those that a process sends."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.virtual_time import loop_time, unix_time
from worker.settings.schema import TracingSettings
from worker.telemetry.otel import build_provider
from worker.telemetry.spans import SpanTracer

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
"""The example of the specification: a publisher's span that is recorded."""


class KeptSpans:
    """A tracer whose spans are there as soon as they end; on the loop's clocks."""

    def __init__(self, *, sample_ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        provider = build_provider(TracingSettings(sample_ratio=sample_ratio))
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.is_closed = False
        self.tracer = SpanTracer(
            provider.get_tracer("test"),
            subscription="requests-worker",
            topic="responses",
            base_urls={"fake": "https://gpu.example:8443/v1", "other": "http://gpu"},
            close=self._close,
            clock=loop_time,
            wall_clock=unix_time,
        )

    async def _close(self) -> None:
        self.is_closed = True

    @property
    def all(self) -> list[ReadableSpan]:
        """Every span that has ended, in that order."""
        return list(self._exporter.get_finished_spans())

    def of(self, name: str) -> list[ReadableSpan]:
        """Return the spans whose name begins so."""
        return [span for span in self.all if span.name.startswith(name)]

    def one(self, name: str) -> ReadableSpan:
        """Return the only one."""
        (span,) = self.of(name)
        return span


def span_id(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def parent_id(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def trace_id(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


class Collector:
    """What an OpenTelemetry collector received over OTLP/HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Any] = []
        """As protobuf messages `opentelemetry.proto.trace.v1.Span`."""
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans


@contextmanager
def collector() -> Iterator[Collector]:
    """Run one on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            kept.take(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        kept = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, name="collector")
        thread.start()
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
