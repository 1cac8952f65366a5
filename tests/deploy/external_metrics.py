"""
Who serves `external.metrics.k8s.io` to the autoscaler: the registration of a server, and a stand-in with one number.

The API server passes the autoscaler's question on to the server that is registered, as it does for every aggregated API.

Source: https://github.com/kubernetes/metrics/blob/master/pkg/apis/external_metrics/v1beta1/types.go
"""

import datetime as dt
import ssl
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.deploy.control_plane import ControlPlane, Object, conditions
from tests.deploy.json_server import JSONServer
from tests.support.waiting import until

VERSION = "external.metrics.k8s.io/v1beta1"
SPACES = f"/apis/{VERSION}/namespaces/"
API_SERVICES = "/apis/apiregistration.k8s.io/v1/apiservices"
NAME = "v1beta1.external.metrics.k8s.io"


class Registration:
    """Sends the autoscaler's questions to a port of 127.0.0.1."""

    def __init__(self, plane: ControlPlane, port: int) -> None:
        self._plane = plane
        self._port = port

    def create(self) -> None:
        """Register the server; `is_available` says when it is reached."""
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "external-metrics"},
            # An address of the cluster would lead nowhere: no node forwards it.
            "spec": {"type": "ExternalName", "externalName": "127.0.0.1"},
        }
        self._plane.create("/api/v1/namespaces/kube-system/services", service).raise_for_status()
        registration = {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": NAME},
            "spec": {
                "group": "external.metrics.k8s.io",
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": {"namespace": "kube-system", "name": "external-metrics", "port": self._port},
            },
        }
        self._plane.create(API_SERVICES, registration).raise_for_status()

    def delete(self) -> None:
        """Take the registration back."""
        self._plane.client.delete(f"{API_SERVICES}/{NAME}")
        self._plane.client.delete("/api/v1/namespaces/kube-system/services/external-metrics")

    def is_available(self) -> bool:
        """Whether the API server reaches it."""
        found = self._plane.find(f"{API_SERVICES}/{NAME}")
        return found is not None and conditions(found).get("Available", {}).get("status") == "True"


class ExternalMetrics:
    """
    Serves one value for every metric that is asked for, for the time of the `with` block.

    Args:
        plane: A running control plane.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self.value: float | None = None
        """`None`: the metric cannot be read."""
        self.asked: set[tuple[str, str, str]] = set()
        """Namespace, metric and label selector of each question."""
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(plane.certificate, plane.certificate.with_suffix(".key"))
        self._server = JSONServer(self._answer, tls)
        self._registration = Registration(plane, self._server.port)

    def __enter__(self) -> Self:
        self._server.__enter__()
        self._registration.create()
        until(self._registration.is_available, 60, "the API server reaches external.metrics.k8s.io")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._registration.delete()
        self._server.__exit__(*exc_info)

    def _answer(self, target: str) -> tuple[int, Object]:
        parts = urlsplit(target)
        if parts.path == f"/apis/{VERSION}":
            return 200, {"kind": "APIResourceList", "groupVersion": VERSION, "resources": []}
        if not parts.path.startswith(SPACES):
            return 404, _failure(404, "no such path")
        namespace, _, metric = parts.path.removeprefix(SPACES).partition("/")
        metric = unquote(metric)
        self.asked.add((namespace, metric, parse_qs(parts.query).get("labelSelector", [""])[0]))
        if self.value is None:
            return 503, _failure(503, "no data")
        item = {
            "metricName": metric,
            "metricLabels": {},
            "timestamp": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "value": str(int(self.value)),
        }
        return 200, {"kind": "ExternalMetricValueList", "apiVersion": VERSION, "metadata": {}, "items": [item]}


def _failure(code: int, message: str) -> Object:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
