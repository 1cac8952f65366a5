"""The worker installed on the control plane of the tests, in a namespace that enforces `restricted`: apply, look, scale."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from tests.deploy.control_plane import ControlPlane, Object
from tests.deploy.manifests import Variant
from tests.support.waiting import until

SPACE = "inference"
WORKERS = "app.kubernetes.io/name=inference-worker,app.kubernetes.io/component=worker"
DEPLOYMENT = f"/apis/apps/v1/namespaces/{SPACE}/deployments/inference-worker"
BUDGET = f"/apis/policy/v1/namespaces/{SPACE}/poddisruptionbudgets/inference-worker"
UNDEFINED = {"AutoscalingMetric", "ClusterRules", "GlobalRules"}
"""Kinds whose definition the tests do not have: they are left out."""


def known(documents: tuple[Object, ...]) -> tuple[Object, ...]:
    """Return the documents that the control plane has a definition for."""
    return tuple(document for document in documents if document["kind"] not in UNDEFINED)


class Installation:
    """What was applied, and what became of it."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def apply(self, documents: tuple[Object, ...]) -> tuple[int, str]:
        """Apply as `kubectl apply` does by default: unknown fields are errors.  A warning counts as one, too."""
        options = ("--validate=strict", "--warnings-as-errors", f"--namespace={SPACE}")
        return self.plane.kubectl("apply", *options, "-f", "-", text=yaml.safe_dump_all(known(documents)))

    def difference(self, documents: tuple[Object, ...]) -> str:
        """Return what an apply would change: what `kubectl diff` prints."""
        text = yaml.safe_dump_all(known(documents))
        code, difference = self.plane.kubectl("diff", f"--namespace={SPACE}", "-f", "-", text=text)
        assert code in {0, 1}, difference
        return difference

    def deployment(self) -> Object:
        """Return the worker's Deployment as it is now."""
        found = self.plane.find(DEPLOYMENT)
        assert found is not None
        return found

    @property
    def replicas(self) -> int:
        """How many workers there shall be."""
        return int(self.deployment()["spec"]["replicas"])

    @property
    def available(self) -> int:
        """How many workers are ready, and have been for `minReadySeconds`."""
        return int(self.deployment()["status"].get("availableReplicas", 0))

    @property
    def evictable(self) -> int:
        """How many evictions the disruption budget allows now."""
        return int((self.plane.find(BUDGET) or {}).get("status", {}).get("disruptionsAllowed", 0))

    def workers(self) -> list[Object]:
        """Return the worker's pods that are not being deleted."""
        return self.plane.pods(SPACE, WORKERS)

    def scale(self, replicas: int) -> None:
        """Do what an autoscaler does, and wait until all are available."""
        self.plane.patch(f"{DEPLOYMENT}/scale", {"spec": {"replicas": replicas}})
        until(lambda: self.available == replicas, 60, f"{replicas} workers are available")

    def evict(self, pod: Object) -> int:
        """Ask for the eviction of a pod as node upgrades do; return the status."""
        name = pod["metadata"]["name"]
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        return self.plane.create(f"/api/v1/namespaces/{SPACE}/pods/{name}/eviction", eviction).status_code

    def pods(self) -> list[Object]:
        """
        Return the pods of everything that makes pods, as soon as all are there.

        Fails at once with the words of the API server when it refuses one.
        """

        def found() -> list[Object]:
            events = self.plane.items(f"/api/v1/namespaces/{SPACE}/events", fieldSelector="reason=FailedCreate")
            assert not events, [event["message"] for event in events]
            made = self.plane.pods(SPACE)
            deployments = self.plane.items(f"/apis/apps/v1/namespaces/{SPACE}/deployments")
            jobs = self.plane.items(f"/apis/batch/v1/namespaces/{SPACE}/jobs")
            wanted = [item["spec"]["replicas"] for item in deployments] + [item["spec"]["parallelism"] for item in jobs]
            return made if len(made) == sum(wanted) > 0 else []

        return until(found, 60, "every pod is there")

    def steps(self, last: int, limit_s: float) -> list[tuple[float, int]]:
        """Return the numbers of workers that are asked for, from now until the last one, as `(seconds from now, number)`."""
        found: list[tuple[float, int]] = []
        began = time.monotonic()

        def is_last() -> bool:
            number = self.replicas
            if not found or found[-1][1] != number:
                found.append((time.monotonic() - began, number))
            return number == last

        until(is_last, limit_s, f"{last} workers")
        return found


@contextmanager
def installed(plane: ControlPlane, given: Variant) -> Iterator[Installation]:
    """Apply a rendering; everything is gone at the end."""
    installation = Installation(plane)
    with plane.namespace(SPACE, create=not given.of_kind("Namespace")):
        code, text = installation.apply(given.documents)
        assert code == 0, text
        yield installation
