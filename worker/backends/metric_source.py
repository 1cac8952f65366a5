"""
The numbers of a metric gate: read from a page of metrics, or asked of Prometheus.

They come over the same kind of connections as requests do, of their own, so that a full pool delays no reading.
Of a page only the lines of the metrics that are asked for are parsed: an engine's has some hundred kilobytes.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/, https://prometheus.io/docs/prometheus/latest/querying/api/
"""

import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from worker.backends.openai import HttpBackend, Reply
from worker.errors import BackendError, MetricSourceError
from worker.settings.schema import MetricGateSettings, MetricSignalSettings, RouteSettings, TimeoutSettings
from worker.wire.http import is_success

MAX_BYTES = 16_000_000
"""Of an answer.  A page of vLLM has 100 kB; one that a whole host exports has megabytes."""
MAX_ERROR_CHARS = 300
PAGE = "/metrics"
QUERY = "/api/v1/query?query="


class HttpMetricSource:
    """
    Reads the numbers over HTTP; see `worker.ports.MetricSource` for the contract.

    Args:
        route: A route to one server.
        gate: Its gate.

    Raises:
        SettingsError: A file of a key or a certificate cannot be read.
    """

    def __init__(self, route: RouteSettings, gate: MetricGateSettings) -> None:
        self._gate = gate
        self._is_query = gate.type == "prometheus"
        self._path = PAGE
        connect_s = min(TimeoutSettings().connect_s, gate.timeout_s)
        if gate.url:
            parts = urlsplit(gate.url)
            base_url = gate.url if self._is_query else f"{parts.scheme}://{parts.netloc}"
            self._path = parts.path or PAGE
            route = RouteSettings(
                name=route.name,
                base_url=base_url,
                api_key=gate.api_key,
                api_key_file=gate.api_key_file,
                headers=gate.headers,
                tls=gate.tls,
                proxy=gate.proxy,
                timeouts=TimeoutSettings(connect_s=connect_s),
            )
        else:
            route = route.model_copy(update={"base_url": route.base_url.removesuffix("/v1")})
        self._address = route.base_url
        self._client = HttpBackend(route)

    async def read(self) -> Sequence[float]:
        """
        Return one number for each signal; see `worker.ports.MetricSource.read`.

        Cancellation: closes the connection.
        """
        signals = self._gate.all_signals
        if self._is_query:
            return [vector_value(await self._get(QUERY + quote(each.query, safe=""))) for each in signals]
        page = (await self._get(self._path)).decode("utf-8", "replace")
        return [page_value(page, each) for each in signals]

    async def _get(self, path: str) -> bytes:
        where = self._address + path.partition("?")[0]
        try:
            reply = await self._client.get(path, timeout_s=self._gate.timeout_s, max_bytes=MAX_BYTES)
        except TimeoutError:
            reason = f"{where} did not answer within {self._gate.timeout_s:g} s"
            raise MetricSourceError("unreachable", reason) from None
        except BackendError as error:
            raise MetricSourceError("unreachable", f"{where}: {error}") from None
        body = bytes(reply.body)
        if not is_success(reply.status):
            raise MetricSourceError("refused", f"{where}: status {reply.status}{_words(reply)}")
        if len(body) >= MAX_BYTES:
            raise MetricSourceError("unusable", f"{where}: more than {MAX_BYTES} bytes")
        return body

    async def aclose(self) -> None:
        """Close every connection; see `worker.ports.MetricSource.aclose`.  Cancellation: as there."""
        await self._client.aclose()


def page_value(page: str, signal: MetricSignalSettings) -> float:
    """
    Return the number of a signal from a page in Prometheus' text form.

    Raises:
        MetricSourceError: It has no such series, a line of it cannot be read, or the number is NaN.
    """
    lines = page.splitlines()
    for name in signal.metric:
        own = "\n".join(line for line in lines if line.startswith((name + "{", name + " ")))
        try:
            samples = [sample for family in text_string_to_metric_families(own) for sample in family.samples]
        except ValueError as error:
            raise MetricSourceError("unusable", f"{name} cannot be read: {error}") from None
        values = [each.value for each in samples if signal.labels.items() <= each.labels.items()]
        if values:
            return _number(max(values) if signal.combine == "max" else sum(values), name)
    labels = f" with the labels {signal.labels}" if signal.labels else ""
    raise MetricSourceError("unusable", f"there is no metric {' or '.join(signal.metric)}{labels}")


def vector_value(answer: bytes) -> float:
    """
    Return the number that an instant query gave: a scalar, or the one element of a vector.

    Raises:
        MetricSourceError: It is no such answer, or gives no number, several, or NaN.
    """
    try:
        data = msgspec.json.decode(answer)["data"]
        kind, result = data["resultType"], data["result"]
        if kind == "scalar":
            return _number(float(result[1]), "the query's result")
        if kind == "vector" and len(result) == 1:
            return _number(float(result[0]["value"][1]), "the query's result")
    except (msgspec.DecodeError, KeyError, IndexError, TypeError, ValueError):
        raise MetricSourceError("unusable", "this is no answer of Prometheus' query API") from None
    if kind == "vector":
        found = f"{len(result)} series, put sum() or max() around it" if result else "no data"
        raise MetricSourceError("unusable", f"the query gives {found}")
    raise MetricSourceError("unusable", f"the query gives a {kind}, not a scalar or a vector of one element")


def _number(value: float, what: str) -> float:
    if math.isnan(value):
        raise MetricSourceError("unusable", f"{what} is NaN")
    return value


def _words(reply: Reply) -> str:
    """Return what a refusal says, as Prometheus does: `{"errorType": "bad_data", "error": "parse error"}`."""
    try:
        document: Any = msgspec.json.decode(bytes(reply.body))
        words = document["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""
    return f": {words[:MAX_ERROR_CHARS]}" if isinstance(words, str) else ""
