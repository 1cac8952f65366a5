"""
The image, really built, and the pod, really run from its manifest: where podman and the images are at hand.

The slow ones play `overlays/emulator` with Google's emulator or the embedded server and the simulated backend, kill the
worker once, stop it once, and count.  Where there is no engine every test here says so and is skipped.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy import manifests
from tests.deploy.cluster import Cluster, cluster
from tests.deploy.engine import Engine, NoEngineError, find_engine
from tests.deploy.tools import ROOT
from tests.support.waiting import until

IMAGE = "localhost/inference-worker:dev"
"""What overlays/emulator names."""
MOST_BYTES = 180_000_000
HARDENED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--user=65532:65532")
MESSAGES = 1000
LEASE_S = 60
"""The longest that a killed pod's messages wait for another."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return find_engine()
    except NoEngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """Build the image from the Dockerfile at the top."""
    arguments = [f"--build-arg={key.upper()}_IMAGE={engine.images[key]}" for key in ("python", "runtime")]
    engine("build", "--format=docker", *engine.build_flags, *arguments, f"--tag={IMAGE}", ROOT)
    return IMAGE


def test_the_image_is_small(engine: Engine, image: str):
    """Unpacked it is at most 180 MB, with everything that a setting switches on."""
    assert engine.inspect(image, image=True)["Size"] <= MOST_BYTES


def test_the_image_says_what_it_is(engine: Engine, image: str):
    """A numeric user, exec form, SIGTERM, labels of the OCI, and no health check that Kubernetes would ignore."""
    config = engine.inspect(image, image=True)["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["python3", "-m", "worker"]
    assert config["Cmd"] == ["run"]
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert "Healthcheck" not in config
    wanted = {"title", "description", "licenses", "version", "revision"}
    assert {f"org.opencontainers.image.{name}" for name in wanted} <= config["Labels"].keys()


def test_there_is_no_shell(engine: Engine, image: str):
    """Nothing to log in to."""
    code, _ = engine.run("--network=none", "--entrypoint=/bin/sh", image, "-c", "true")
    assert code in {126, 127}


def test_every_extension_loads(engine: Engine, image: str):
    """No compiled module lost by stripping what it needs."""
    program = (
        "import importlib, pathlib\n"
        "import psycopg  # before its own extensions, which refuse to be first\n"
        "root = pathlib.Path('/app/lib')\n"
        "found = [path for path in root.rglob('*.so') if '.libs' not in str(path)]\n"
        "for path in found:\n"
        "    importlib.import_module('.'.join([*path.relative_to(root).parts[:-1], path.name.partition('.')[0]]))\n"
        "print('loaded', len(found))\n"
    )
    code, text = engine.run("--network=none", *HARDENED, "--entrypoint=python3", image, "-c", program)
    assert code == 0, text
    assert int(text.split()[-1]) >= 15


def test_every_setting_finds_its_packages(engine: Engine, image: str):
    """Tracing, Redis, object storage, SageMaker and the Batches API are switched on by a setting or a command alone."""
    program = (
        "import botocore.session, redis.asyncio, psycopg, sqlalchemy, starlette, uvicorn\n"
        "import worker.payloads.objects, worker.telemetry.otel\n"
        "for service in ('sts', 'sso', 'sso-oidc', 'sagemaker-runtime'):\n"
        "    botocore.session.Session().create_client(service, region_name='eu-west-1')\n"
        "print('there')\n"
    )
    code, text = engine.run("--network=none", *HARDENED, "--entrypoint=python3", image, "-c", program)
    assert (code, text.strip()) == (0, "there")


def test_everything_is_compiled(engine: Engine, image: str):
    """A start compiles nothing: every module of the program has byte code that is not checked against its source."""
    program = (
        "import importlib.util, pathlib\n"
        "own = [path for path in pathlib.Path('/app/own/worker').rglob('*.py')]\n"
        "code = [pathlib.Path(importlib.util.cache_from_source(path)).read_bytes()[4] for path in own]\n"
        "print(len(own), set(code), len(list(pathlib.Path('/app/lib').rglob('*.py'))))\n"
    )
    code, text = engine.run("--network=none", "--entrypoint=python3", image, "-c", program)
    assert code == 0, text
    count, flags, sources = text.split()
    assert int(count) > 50
    assert flags == "{1}", "hash-based, unchecked: PEP 552"
    assert sources == "0"


def test_unusable_settings_end_with_2(engine: Engine, image: str):
    """Every fault is named, and the exit code says that no restart will help."""
    code, text = engine.run("--network=none", *HARDENED, image, "run", "--set", "drain.grace=5")
    assert code == 2
    assert "pubsub.request_subscription: is required" in text
    assert "drain.grace: unknown key" in text


@pytest.fixture
def started(engine: Engine, image: str, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start emulator and backend; the test creates the resources and plays the pod."""
    with cluster(engine, image, manifests.variant("emulator"), tmp_path) as built:

        def start(*backend: str, broker: str = "emulator") -> Cluster:
            built.start(*backend, broker=broker)
            return built

        yield start


def test_a_missing_subscription_is_named(started: Callable[..., Cluster]):
    """The log says in one line what is missing; the pod starts again until it is there, and then works."""
    pod = started()
    pod.play()
    line = until(lambda: pod.event("startup_failed"), 30, "the worker gives up")
    assert "inference-requests-worker does not exist" in line["error"]
    pod.create_resources()
    pod.wait_ready()
    assert pod.exchange(3, until=3) == 3


def test_a_missing_key_file_is_named(started: Callable[..., Cluster], engine: Engine, image: str):
    """A Secret that is not there: the log names the file, and the exit code says that no restart will help."""
    pod = started()
    pod.create_resources()
    key = "/var/run/secrets/backend/api-key"
    environ = {**manifests.variant("emulator").environ, "WORKER_BACKEND__API_KEY_FILE": key}
    variables = [f"--env={name}={text}" for name, text in environ.items() if name != "WORKER_CONFIG"]
    code, text = engine.run(f"--network={pod.network}", *HARDENED, *variables, image)
    assert code == 2, text
    assert f"api_key_file: {key}: No such file or directory" in text


def test_setup_makes_what_the_worker_needs(started: Callable[..., Cluster], engine: Engine, image: str, tmp_path: Path):
    """The Job of overlays/local, run as its manifest says, creates all that the pod then works with; twice is once."""
    pod = started()
    local = manifests.variant("local")
    (job,) = local.of_kind("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    config = tmp_path / "worker.yaml"
    config.write_text(local.config)
    mounted = f"--volume={config}:/etc/inference-worker/worker.yaml:ro"
    variables = [f"--env={item['name']}={item['value']}" for item in container["env"]]
    for _ in range(2):
        code, text = engine.run(f"--network={pod.network}", *HARDENED, mounted, *variables, image, *container["args"])
        assert code == 0, text
    pod.play()
    pod.wait_ready()


def test_the_manifest_is_enforced(started: Callable[..., Cluster], engine: Engine):
    """Read-only root, no capability, no new privileges, the unprivileged user and the memory limit arrive."""
    pod = started()
    pod.create_resources()
    pod.play()
    pod.wait_ready()
    found = engine.inspect(pod.worker)
    assert found["HostConfig"]["ReadonlyRootfs"] is True
    assert found["HostConfig"]["Memory"] == 512 * 2**20
    assert found["EffectiveCaps"] in (None, [])
    assert "no-new-privileges" in found["HostConfig"]["SecurityOpt"]
    status = engine("exec", pod.worker, "python3", "-c", "print(open('/proc/1/status').read())")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Uid"].split() == ["65532"] * 4
    assert int(facts["CapEff"], 16) == 0
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")


def _are_all_answered(pod: Cluster, engine: Engine) -> None:
    while pod.take(3.0):
        continue
    assert pod.answers.statuses == {200: MESSAGES}
    assert pod.answers.malformed == 0
    assert engine.inspect(pod.worker)["State"]["OOMKilled"] is False


@pytest.mark.parametrize("broker", ["embedded", "emulator"])
def test_a_thousand_in_a_thousand_out(started: Callable[..., Cluster], engine: Engine, broker: str):
    """One SIGKILL and one SIGTERM on the way, on either server: every request has its answer."""
    pod = started("--latency=lognormal:300ms,0.5", broker=broker)
    pod.create_resources()
    pod.play()
    pod.wait_ready()
    assert pod.exchange(MESSAGES, until=300) >= 300
    pod.kill()
    pod.wait_ready()
    assert pod.exchange(MESSAGES, until=650) >= 650
    code, took = pod.terminate(limit_s=60)
    assert (code, took < 30) == (0, True), "drained"
    pod.wait_ready()
    assert pod.exchange(MESSAGES, until=MESSAGES, limit_s=LEASE_S + 60) == MESSAGES
    _are_all_answered(pod, engine)
    at_once = manifests.variant("emulator").settings().pubsub.max_in_flight
    assert pod.answers.duplicates <= at_once, "only what was in flight when it was killed"
    assert pod.stats()["bodies"]["repeats"] <= at_once, "a drain wastes no generation"
    assert set(pod.answers.attempts) <= {1, 2}, "no more than the kill costs an attempt"


def test_what_runs_at_sigterm_is_answered(started: Callable[..., Cluster]):
    """On Google's emulator too: answered before the process ends, at the first attempt, and nothing is generated twice."""
    pod = started("--latency=uniform:500ms,1500ms")
    pod.create_resources()
    pod.play()
    pod.wait_ready()
    pod.publish(8)
    until(lambda: pod.stats()["requests"] == 8, 30, "they run")
    assert pod.stats()["in_flight"] > 0
    code, took = pod.terminate(limit_s=60)
    assert (code, took < 30) == (0, True), "drained"
    assert pod.exchange(8, until=8, limit_s=10) == 8
    assert pod.answers.duplicates == 0
    assert pod.stats()["bodies"]["repeats"] == 0, "a drain wastes no generation"
    assert set(pod.answers.attempts) == {1}
