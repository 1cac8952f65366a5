"""The section `tracing`: whether spans are sent, and where to."""

from typing import Annotated

from pydantic import Field

from worker.settings.backend import Section


class TracingSettings(Section):
    """OpenTelemetry traces of every message: see docs/tracing.md.  Needs the extra `otel`."""

    enabled: bool = False
    """Continue the trace that a request brings along, and send spans.  Off, none of it is even imported."""
    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(?:/[^\s@]*)?$")] | None = None
    """Where spans are sent by OTLP over HTTP, without `/v1/traces`: `http://collector:4318`.  Default:
    `OTEL_EXPORTER_OTLP_ENDPOINT`, or else port 4318 of this host.  Credentials belong into
    `OTEL_EXPORTER_OTLP_HEADERS`."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of traces that are recorded, among those that begin here; where a request brings a trace along, its
    publisher has decided.  An unrecorded trace is passed on all the same."""
    service_name: Annotated[str, Field(min_length=1, max_length=255)] = "inference-worker"
    """`service.name` of the spans."""
