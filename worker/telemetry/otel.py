"""
Sends spans: puts the OpenTelemetry SDK together.  Imported only where `tracing.enabled` is set.

The SDK's global provider is left alone, and Google's client has tracing of its own, which stays off: its spans end
when a callback returns, which here is at once.
"""

import asyncio
import threading
from contextlib import suppress
from importlib.metadata import version

from worker.errors import SettingsError, how_to_get
from worker.settings.schema import Settings, TracingSettings

FLUSH_S = 5.0
"""How long the end of the process waits for the last spans; a collector that hangs must not cost the grace."""
MAX_QUEUE = 8192
"""Spans that wait to be sent; beyond, new ones are dropped.  Four times the SDK's: there may be thousands a second."""

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    from worker.telemetry.spans import SpanTracer
except ImportError as error:
    raise SettingsError([f"tracing.enabled: {error.name} is missing: {how_to_get('otel')}"]) from None


def build_tracer(settings: Settings) -> SpanTracer:
    """Return the tracer that sends spans where the settings say; it starts a thread of its own."""
    tracing, pubsub = settings.tracing, settings.pubsub
    provider = build_provider(tracing)
    endpoint = None if tracing.endpoint is None else f"{tracing.endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint), max_queue_size=MAX_QUEUE))

    async def close() -> None:
        await shut_down(provider)

    return SpanTracer(
        provider.get_tracer("inference-worker", version("pubsub-inference-worker")),
        subscription=pubsub.sources()[0].request_subscription.rpartition("/")[2],
        topic=pubsub.response_topic.rpartition("/")[2],
        base_urls={each.name: each.address for route in settings.all_routes() for each in route.targets()},
        close=close,
    )


def build_provider(tracing: TracingSettings) -> TracerProvider:
    """Return a provider without any exporter yet; where a request brings a trace along, its publisher samples."""
    resource = Resource.create(
        {"service.name": tracing.service_name, "service.version": version("pubsub-inference-worker")}
    )
    sampler = ParentBased(TraceIdRatioBased(tracing.sample_ratio))
    return TracerProvider(sampler, resource, shutdown_on_exit=False)


async def shut_down(provider: TracerProvider, limit_s: float = FLUSH_S) -> None:
    """
    Send what is left, for at most `limit_s` seconds; idempotent.

    Cancellation: the thread that sends goes on; it does not keep the process alive.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def work() -> None:
        try:
            provider.shutdown()
        finally:
            with suppress(RuntimeError):  # the loop is closed, and with it every wait
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, name="spans", daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await done.wait()
