"""
A control plane of Kubernetes on loopback addresses: etcd, kube-apiserver and the controllers that the tests need.

Go builds them of the modules in `tests/deploy/kubernetes`.  No kubelet and no container: `Kubelet` says of each pod what a
kubelet would say, so that rollouts, evictions and the disruption budget go their way.
"""

import json
import os
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.deploy.go_programs import programs
from tests.deploy.tools import call, need_tool
from tests.support.waiting import until

SOURCE = Path(__file__).parent / "kubernetes"
SWITCH = "CONTROL_PLANE_TESTS"
"""The environment variable that asks for these tests."""
START_LIMIT_S = 180.0
BUILD_LIMIT_S = 2 * 3600.0
"""On two cores that others use too."""

Object = dict[str, Any]


def missing() -> str:
    """Return why the tests do not run, or nothing."""
    if os.environ.get(SWITCH):
        return ""
    return f"building a control plane takes 40 minutes and testing on it 20: only with {SWITCH}=1"


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that were free a moment ago, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Processes:
    """
    Programs of one folder, each with a log of its own.

    Args:
        programs: Where they are.
        folder: Where logs go.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, program: str, *arguments: str) -> None:
        """Start one."""
        with (self._folder / f"{program}.log").open("wb") as log:
            command = [self._programs / program, *arguments]
            self._running[program] = subprocess.Popen(command, stdout=log, stderr=log)

    def until(self, program: str, condition: Callable[[], object], limit_s: float, what: str) -> None:
        """Wait for a condition that this program brings about; its end fails with the end of its log."""

        def fulfilled() -> object:
            code = self._running[program].poll()
            assert code is None, f"{program} ended with {code}: {self.log(program)[-3000:]}"
            return condition()

        until(fulfilled, limit_s, what)

    def log(self, program: str) -> str:
        """Return what one has written."""
        return (self._folder / f"{program}.log").read_text(errors="replace")

    def stop(self) -> None:
        """End them, the last one first."""
        for process in reversed(self._running.values()):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class ControlPlane:
    """
    The three programs, and the ways to talk to them: `kubectl`, and HTTP by `client`.

    Args:
        folder: For their data, certificates and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes = Processes(programs(SOURCE, packages=(".", "tool"), limit_s=BUILD_LIMIT_S), folder)
        self._token = secrets.token_hex(16)
        self._peers, self._store, self._port = free_ports(3)
        self.url = f"https://127.0.0.1:{self._port}"
        self.kubeconfig = folder / "kubeconfig"
        self.certificate = folder / "certificates" / "apiserver.crt"
        """Of the API server, which signs it itself; `apiserver.key` is beside it."""

    def start(self) -> None:
        """Start everything and wait until the API server and its controllers are ready."""
        (self.folder / "tokens.csv").write_text(f"{self._token},admin,admin,system:masters\n")
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = serialization.Encoding.PEM
        (self.folder / "accounts.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        (self.folder / "accounts.pub").write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        self._start_etcd()
        self._start_apiserver()
        key_file = self.certificate.with_suffix(".key")  # written after the certificate
        self._processes.until("kube-apiserver", key_file.exists, START_LIMIT_S, "a certificate")
        trusted = ssl.create_default_context(cafile=str(self.certificate))
        self.client = httpx.Client(
            base_url=self.url, verify=trusted, headers={"Authorization": f"Bearer {self._token}"}, timeout=30.0
        )
        self._write_kubeconfig()
        self._processes.until("kube-apiserver", self._is_ready, START_LIMIT_S, "the API server is ready")
        self._processes.start("controllers", str(self.kubeconfig))
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self._processes.until("controllers", lambda: self.find(account), START_LIMIT_S, "the controllers work")

    def _start_etcd(self) -> None:
        clients, peers = f"http://127.0.0.1:{self._store}", f"http://127.0.0.1:{self._peers}"
        self._processes.start(
            "server",  # what Go calls the program of go.etcd.io/etcd/server
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--unsafe-no-fsync",
        )

    def _start_apiserver(self) -> None:
        self._processes.start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._store}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--cert-dir={self.certificate.parent}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'accounts.pub'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
        )

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _write_kubeconfig(self) -> None:
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.certificate)}}
            ],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        self.kubeconfig.write_text(yaml.safe_dump(content))
        self.kubeconfig.chmod(0o600)

    def stop(self) -> None:
        """End the programs."""
        if hasattr(self, "client"):
            self.client.close()
        self._processes.stop()

    def kubectl(self, *arguments: str | Path, text: str = "") -> tuple[int, str]:
        """Return the exit code and everything that kubectl printed."""
        done = call(need_tool("kubectl"), "--kubeconfig", self.kubeconfig, *arguments, text=text)
        return done.returncode, done.stdout + done.stderr

    def define(self, *files: Path) -> None:
        """Add definitions of custom resources, and wait until they can be used."""
        for file in files:
            code, text = self.kubectl("create", "-f", file)
            assert code == 0, text
        code, text = self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        assert code == 0, text

    def find(self, path: str, **query: str) -> Object | None:
        """Return an object or a list by its path, or nothing where there is none."""
        answer = self.client.get(path, params=query)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        answer.raise_for_status()
        return dict(answer.json())

    def items(self, path: str, **query: str) -> list[Object]:
        """Return the objects of a list."""
        found = self.find(path, **query)
        assert found is not None, path
        return list(found["items"])

    def pods(self, namespace: str, selector: str = "") -> list[Object]:
        """Return pods that are not being deleted."""
        found = self.items(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def create(self, path: str, document: Object) -> httpx.Response:
        """Create an object; the answer is the caller's to judge."""
        return self.client.post(path, json=document)

    def patch(self, path: str, change: Object) -> Object:
        """Merge a change into an object."""
        answer = self.client.patch(
            path, content=json.dumps(change), headers={"Content-Type": "application/merge-patch+json"}
        )
        answer.raise_for_status()
        return dict(answer.json())

    @contextmanager
    def namespace(self, name: str, *, create: bool = True) -> Iterator[str]:
        """A namespace that enforces the standard `restricted`, and is gone at the end with everything in it."""
        if create:
            labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
            document = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
            self.create("/api/v1/namespaces", document).raise_for_status()
        try:
            yield name
        finally:
            path = f"/api/v1/namespaces/{name}"
            self.client.delete(path)
            until(lambda: self.find(path) is None, 120, f"the namespace {name} is gone")


class Kubelet:
    """
    Says of every pod what kubelets would say: it runs on a node, is ready, and is gone after it was deleted.

    Args:
        plane: A running control plane.
        nodes: Names of nodes; pods go to the one with the fewest.
    """

    def __init__(self, plane: ControlPlane, nodes: tuple[str, ...] = ("node-1", "node-2")) -> None:
        self._plane = plane
        self._nodes = nodes
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kubelet")

    def __enter__(self) -> Self:
        for name in self._nodes:
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            self._plane.create("/api/v1/nodes", node).raise_for_status()
            # A node is born with the taint that keeps pods away until it is ready.
            self._plane.patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()
        for name in self._nodes:
            self._plane.client.delete(f"/api/v1/nodes/{name}")

    def _work(self) -> None:
        while not self._stopping.wait(0.1):  # pytest fails a test whose thread ends with an exception
            self._round()

    def _round(self) -> None:
        pods = self._plane.items("/api/v1/pods")
        closed = {
            node["metadata"]["name"] for node in self._plane.items("/api/v1/nodes") if node["spec"].get("unschedulable")
        }
        load = {name: 0 for name in self._nodes if name not in closed}
        for pod in pods:
            name = pod["spec"].get("nodeName")
            if name in load:
                load[name] += 1
        for pod in pods:
            path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
            if "deletionTimestamp" in pod["metadata"]:
                self._delete(path)
            elif "nodeName" not in pod["spec"] and load:
                node = min(load, key=lambda name: load[name])
                load[node] += 1
                self._bind(path, pod, node)
            elif "nodeName" in pod["spec"] and pod["status"]["phase"] == "Pending":
                self._report(path)

    def _delete(self, path: str) -> None:
        answer = self._plane.client.request("DELETE", path, json={"gracePeriodSeconds": 0})
        assert answer.status_code in {httpx.codes.OK, httpx.codes.NOT_FOUND, httpx.codes.CONFLICT}, answer.text

    def _bind(self, path: str, pod: Object, node: str) -> None:
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        self._changed(self._plane.create(f"{path}/binding", binding))

    def _report(self, path: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        conditions = [
            {"type": name, "status": "True", "lastTransitionTime": now}
            for name in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        status = {"phase": "Running", "startTime": now, "conditions": conditions}
        self._changed(
            self._plane.client.patch(
                f"{path}/status",
                content=json.dumps({"status": status}),
                headers={"Content-Type": "application/merge-patch+json"},
            )
        )

    @staticmethod
    def _changed(answer: httpx.Response) -> None:
        """A pod that is deleted meanwhile, alone or with its namespace (403), is no error."""
        if answer.status_code not in {httpx.codes.NOT_FOUND, httpx.codes.CONFLICT, httpx.codes.FORBIDDEN}:
            answer.raise_for_status()


def conditions(thing: Object) -> dict[str, Object]:
    """Return `{type: condition}` of an object's status."""
    return {condition["type"]: condition for condition in thing.get("status", {}).get("conditions", ())}
