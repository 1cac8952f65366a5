"""Putting the SDK together, leaving it out, and closing it in time."""

import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.sdk.trace import SpanProcessor
from pydantic import ValidationError

from tests.support.tracing import collector
from worker.errors import SettingsError
from worker.service import Service
from worker.settings.schema import Settings, TracingSettings
from worker.telemetry.otel import build_provider, build_tracer, shut_down
from worker.telemetry.tracing import Tracer


def settings(**tracing):
    return Settings.model_validate(
        {
            "pubsub": {"request_subscription": "projects/p/subscriptions/s", "response_topic": "t"},
            "backend": {"base_url": "http://localhost:1"},
            "tracing": tracing,
        }
    )


def test_off_nothing_of_it_is_imported():
    """Neither the SDK nor the exporter nor our own part; Google's client brings the bare interface along."""
    code = (
        "import sys; from worker.service import Service; from worker.settings.schema import Settings; Service(Settings());"
        "print(sorted(m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'worker.telemetry.otel',"
        "'worker.span'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_off_is_an_object_that_does_not_listen():
    """The same one for every part."""
    assert type(Service(settings())._tracer) is Tracer


def test_without_the_extra_tracing_is_refused_at_start(monkeypatch):
    """Told with what to install, before anything is leased."""
    for name in [name for name in sys.modules if name == "worker.telemetry.otel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"tracing\.enabled: .* is missing: the extra `otel` .* the image has it"):
        Service(settings(enabled=True))


async def test_spans_reach_a_collector_with_the_services_name():
    """Under the endpoint that is set, at the latest when the tracer closes."""
    with collector() as there:
        tracer = build_tracer(settings(enabled=True, endpoint=f"{there.url}/", service_name="batch"))
        tracer._spans.start_span("one").end()
        await tracer.aclose()
        await tracer.aclose()
    assert [span.name for span in there.spans] == ["one"]
    assert there.services == {"batch"}


async def test_spans_name_subscription_and_topic_in_short():
    """Full names of resources are shortened, as everywhere else."""
    tracer = build_tracer(settings(enabled=True, endpoint="http://127.0.0.1:1"))
    await tracer.aclose()
    assert tracer._process[0] == "process s"
    assert tracer._send[0] == "send t"
    assert tracer._servers == {"default": {"server.address": "localhost", "server.port": 1}}


class _Stuck(SpanProcessor):
    """A collector that hangs."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def shutdown(self) -> None:
        self.release.wait(30)


async def test_a_collector_that_hangs_costs_a_bounded_time():
    """The process ends all the same."""
    provider, stuck = build_provider(TracingSettings()), _Stuck()
    provider.add_span_processor(stuck)
    started = time.monotonic()
    await shut_down(provider, limit_s=0.02)
    assert time.monotonic() - started < 10
    stuck.release.set()


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "grpc://c:4317", "http://", "http://user:key@c:4318", "http://a b"]
)
def test_an_endpoint_is_an_http_address_without_credentials(endpoint):
    """Those belong into a variable that no log shows."""
    with pytest.raises(ValidationError):
        TracingSettings(endpoint=endpoint)
