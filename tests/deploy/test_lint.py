"""Dockerfile, lock files, YAML and scripts: what linters say, and what podman, buildah and docker all must be able to build."""

import itertools
import re
import sys
import tomllib

import pytest

from tests.deploy.tools import DEPLOY, ROOT, call, need_tool

DOCKERFILE = ROOT / "Dockerfile"
LOCKS = ("requirements.lock", "requirements-core.lock", "requirements-build.lock")
OF_A_CHECKOUT = {"parquet"}
"""Extras of commands that nobody runs in the image."""
DEV_LOCK = "requirements-dev.lock"
SCRIPTS = sorted([*ROOT.glob(".ci/run"), *(ROOT / "tests" / "deploy").rglob("*.sh"), *DEPLOY.rglob("*.sh")])
YAMLLINT = """
extends: default
rules:
  document-start: disable
  line-length: {max: 120, allow-non-breakable-words: true, allow-non-breakable-inline-mappings: true}
  comments: {min-spaces-from-content: 1}
ignore: [rules_test.yaml, templates/]
"""


def test_the_dockerfile_is_clean():
    """hadolint has nothing to say that is not answered beside the line."""
    done = call(need_tool("hadolint"), "--no-color", DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_builder_can_build_it():
    """No here-document, no `COPY --link` or `--exclude`, no cache mount: older buildah fails on the first three."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines)
    assert "<<" not in text
    assert "--link" not in text
    assert "--exclude" not in text
    assert "--mount" not in text


def test_the_process_is_started_directly():
    """Exec form, so that SIGTERM reaches the program; a numeric user, so that Kubernetes can check it."""
    text = DOCKERFILE.read_text()
    assert re.search(r'^ENTRYPOINT \["python3", "-m", "worker"\]$', text, re.MULTILINE)
    assert re.search(r"^USER 65532:65532$", text, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", text, re.MULTILINE)
    assert "HEALTHCHECK" not in text


def test_the_image_installs_by_hash_only():
    """Every installation from an index demands hashes and takes wheels; the project's own wheel asks no index."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
    installs = re.findall(r"pip install (.+?)(?: &&|\n)", text)
    assert len(installs) == 3
    for install in installs:
        from_index = "--require-hashes" in install and "--only-binary :all:" in install
        assert from_index or ("--no-index" in install and "--no-deps" in install), install


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_by_hash_and_name_no_host(name: str):
    """Every requirement has a version and hashes; where it comes from is the builder's business."""
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|index-url|find-links|trusted-host", text)
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.strip())
    assert len(entries) > 1
    for entry in entries:
        assert re.match(r"[A-Za-z0-9_.-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_the_lock_holds_every_dependency():
    """What the project asks for is locked, at a version that it accepts; the build backend and all extras too."""
    requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, groups = document["project"], document["dependency-groups"]
    everything = [
        *project["dependencies"],
        *itertools.chain.from_iterable(project["optional-dependencies"].values()),
        *itertools.chain.from_iterable(groups.values()),
    ]
    core, extras = project["dependencies"], project["optional-dependencies"]
    in_image = [text for extra, wanted in extras.items() if extra not in OF_A_CHECKOUT for text in wanted]
    locked = ([*core, *in_image], core, document["build-system"]["requires"], everything)
    for name, wanted in zip((*LOCKS, DEV_LOCK), locked, strict=True):
        pins = _pins(name)
        for text in wanted:
            requirement = requirements.Requirement(text)
            if requirement.name == project["name"]:  # an extra that is made of others
                continue
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text


def _pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_the_image_has_every_extra_that_a_setting_switches_on():
    """`image` names them all, so that a setting never fails for want of a package; without them it is the same image."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.fullmatch(r"[a-z-]+\[([a-z,]+)\]", extras["image"][0])
    assert named
    assert set(named[1].split(",")) == extras.keys() - OF_A_CHECKOUT - {"image"}
    whole, core = (ROOT / LOCKS[0]).read_text(), (ROOT / LOCKS[1]).read_text()
    for entry in re.split(r"\n(?=[A-Za-z0-9])", core.strip()):
        assert entry in whole, "the same version and hashes in both"
    assert len(_pins(LOCKS[1])) < len(_pins(LOCKS[0]))
    text = DOCKERFILE.read_text()
    assert f"ARG REQUIREMENTS={LOCKS[0]}\n" in text
    assert f"COPY {LOCKS[0]} {LOCKS[1]} ./" in text


def test_the_lock_of_a_checkout_names_no_host():
    """Each line is a name and its version, and a marker where it has one."""
    lines = (ROOT / DEV_LOCK).read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s;]+( ; .+)?", line), line


def test_yaml_is_tidy():
    """yamllint has nothing to say about deploy/."""
    pytest.importorskip("yamllint", reason="yamllint is not installed")
    done = call(sys.executable, "-m", "yamllint", "--strict", "-d", YAMLLINT, DEPLOY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(script):
    """shellcheck has nothing to say."""
    done = call(need_tool("shellcheck"), script)
    assert done.returncode == 0, done.stdout + done.stderr
