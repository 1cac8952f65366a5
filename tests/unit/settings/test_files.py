"""Bad files and variables: always one SettingsError, and never a secret in its text."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.required_settings import GOOD
from worker.errors import SettingsError
from worker.settings.load import load_settings


def faults(config: Path | None = None, environ: Mapping[str, str] = GOOD) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(str(config) if config else None, environ=environ)
    assert "sk-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value.faults


BAD_FILES = {
    "a list": "- a",
    "text": "hello",
    "syntax": "a: [",
    "a tab": "a:\n\tb: 1",
    "two documents": "a: 1\n---\nb: 2",
    "an alias of nothing": "a: *b",
    "Python": "a: !!python/object/apply:os.system ['true']",
    "NUL": "a: \x00",
    "a date that is none": "pubsub: {project_id: 2024-99-99}",
    "a mapping that is none": "pubsub: !!map foo",
    "nested too deeply": "a: " + "[" * 5000,
    "a key that is a mapping": "{a: 1}: 2",
    "a key that is a number": "8080: 1",
    "a key that is true": "http: {yes: 1}",
    "a key twice": "http: {port: 1, port: 2}",
    "a section twice": "http: {port: 1}\nlog: {}\nhttp: {host: a}",
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_one_fault(text: str, worker_yaml: Path) -> None:
    """Whatever stands in the file, the outcome is a sentence."""
    worker_yaml.write_text(text)
    assert len(faults(worker_yaml)) == 1


@pytest.mark.parametrize("text", ["a: [", "- a", None], ids=["no YAML", "no mapping", "no file"])
def test_what_stands_in_a_file_that_cannot_be_read_is_not_called_missing(text: str | None, worker_yaml: Path) -> None:
    """The file is the fault; its keys are looked for once it can be read."""
    if text is not None:
        worker_yaml.write_text(text)
    told = faults(worker_yaml, {"WORKER_HTTP__PORT": "many"})
    assert len(told) == 2
    assert told[0].startswith(f"{worker_yaml}: ")
    assert told[1].startswith("http.port (from WORKER_HTTP__PORT): ")


def test_a_section_that_is_a_value_is_one_fault(worker_yaml: Path) -> None:
    """Told in the words of the file, and what would stand in the section is not called missing."""
    worker_yaml.write_text("pubsub: 3\nbackend: {base_url: 'http://h', headers: [a]}\n")
    assert faults(worker_yaml, {}) == [
        "pubsub: must be a section of keys (got 3)",
        "backend.headers: must be a section of keys",
    ]


def test_a_key_written_twice_is_found_with_its_place(worker_yaml: Path) -> None:
    """YAML would silently take the later one."""
    worker_yaml.write_text("http:\n  port: 1\n  port: 2\n")
    assert faults(worker_yaml) == [f"{worker_yaml}: is not YAML: the key 'port' stands twice (line 3, column 3)"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \xff"])
def test_a_file_that_is_no_text_is_a_fault(content: bytes, worker_yaml: Path) -> None:
    """Bytes that are not UTF-8 are said so."""
    worker_yaml.write_bytes(content)
    assert "is not YAML" in faults(worker_yaml)[0]


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    """A missing file and a folder are named with the reason."""
    assert faults(tmp_path / "none") == [f"{tmp_path / 'none'}: cannot be read (No such file or directory)"]
    assert faults(tmp_path) == [f"{tmp_path}: cannot be read (Is a directory)"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text(st.sampled_from("a:{}[]-&*!?|>'\"%@`#, \n\t0.~<="), max_size=30))
def test_no_text_crashes(worker_yaml: Path, text: str) -> None:
    """Any file loads or gives a SettingsError."""
    worker_yaml.write_text(text)
    with contextlib.suppress(SettingsError):
        load_settings(str(worker_yaml), environ={**GOOD, "WORKER_POLICY__RULES": "[" + text})


@pytest.mark.parametrize(
    "text",
    [
        "backend:\n  api_key: 'sk-secret\n",
        "backend: {api_key: [sk-secret]}",
        "backend: {api_key: {a: sk-secret}}",
        "backend: {headers: {x-api-key: [sk-secret]}}",
        "backend: {headers: {x-api-key: 'sk-secret\\\n\n'}}\nfoo: 1",
        "backend: {headers: {'x y': sk-secret}}",
        "backend: {base_url: 'http://user:sk-secret@h'}",
        "backend: {base_url: 'http://h?key=sk-secret'}",
        "routes: [{name: A, api_key: sk-secret}]",
        "dedupe: {redis_url: [sk-secret]}",
        "backend: [sk-secret]",
        "backend: {api_kye: sk-secret}",
        "policy: {rules: [sk-secret-" + "x" * 100 + "]}",
    ],
)
def test_no_message_holds_a_secret(text: str, worker_yaml: Path) -> None:
    """Neither the file's own line nor the value at fault is shown where it may be a key."""
    worker_yaml.write_text(text)
    assert faults(worker_yaml, environ={})
    assert faults(environ={**GOOD, "WORKER_BACKEND__HEADERS": "{x-api-key: 'sk-secret"})
