"""Loading: precedence, one message with every fault, and no secret in it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from tests.support.required_settings import GOOD
from worker.errors import SettingsError
from worker.settings.load import SECRET_KEYS, SECRET_MAPPINGS, load_settings, load_without_backend
from worker.settings.schema import Settings


def faults(config: Path | None = None, environ: Mapping[str, str] = GOOD, **more: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(str(config) if config else None, environ=environ, **more)
    assert "sk-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_the_environment_alone_is_enough() -> None:
    """Without a file everything else has its default."""
    settings = load_settings(environ=GOOD)
    assert (settings.pubsub.request_subscription, settings.http.port) == ("s", 8080)


def test_flags_win_over_the_environment_and_that_over_the_file(worker_yaml: Path) -> None:
    """Defaults < file < environment < flags, key by key."""
    worker_yaml.write_text("http: {port: 1, host: file}\nlog: {level: error, format: json}\ndrain: {settle_s: 5}\n")
    environ = {**GOOD, "WORKER_HTTP__PORT": "2", "WORKER_LOG__LEVEL": "debug"}
    settings = load_settings(str(worker_yaml), environ=environ, flags={"http.port": 3, "log.format": "console"})
    assert (settings.http.port, settings.http.host) == (3, "file")
    assert (settings.log.level, settings.log.format) == ("debug", "console")
    assert (settings.drain.settle_s, settings.drain.grace_s) == (5, 540)


def test_the_file_may_be_named_by_the_environment(worker_yaml: Path) -> None:
    """`WORKER_CONFIG` stands for `--config`, which wins."""
    worker_yaml.write_text("http: {port: 1}")
    environ = {**GOOD, "WORKER_CONFIG": str(worker_yaml)}
    assert load_settings(environ=environ).http.port == 1
    assert load_settings(str(worker_yaml), environ={**environ, "WORKER_CONFIG": "/nowhere"}).http.port == 1


def test_os_environ_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own environment is read when none is given."""
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert load_settings().pubsub.response_topic == "t"


def test_the_emulators_own_variable_is_understood(worker_yaml: Path) -> None:
    """`PUBSUB_EMULATOR_HOST` wins over the file, like any variable, and loses against ours."""
    worker_yaml.write_text("pubsub: {emulator_host: 'file:1'}")
    environ = {**GOOD, "PUBSUB_EMULATOR_HOST": "env:2"}
    assert load_settings(str(worker_yaml), environ=GOOD).pubsub.emulator_host == "file:1"
    assert load_settings(str(worker_yaml), environ=environ).pubsub.emulator_host == "env:2"
    ours = {**environ, "WORKER_PUBSUB__EMULATOR_HOST": "ours:3"}
    assert load_settings(str(worker_yaml), environ=ours).pubsub.emulator_host == "ours:3"
    assert load_settings(environ={**GOOD, "PUBSUB_EMULATOR_HOST": ""}).pubsub.emulator_host is None
    assert faults(environ={**GOOD, "PUBSUB_EMULATOR_HOST": "x"})[0].startswith(
        "pubsub.emulator_host (from PUBSUB_EMULATOR_HOST): "
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WORKER_REQUEST__ALLOWED_PATHS", "['/v1/*', /x]", ["/v1/*", "/x"]),
        ("WORKER_POLICY__RULES", '[{"name": "a"}]', [{"name": "a"}]),
        ("WORKER_REQUEST__IDEMPOTENCY_KEY", "true", True),
        ("WORKER_PUBSUB__MAX_DELIVERY_ATTEMPTS", "7", 7),
        ("WORKER_PUBSUB__MAX_DELIVERY_ATTEMPTS", "auto", "auto"),
        ("WORKER_PUBSUB__PROJECT_ID", "0123", "0123"),
        ("WORKER_DRAIN__GRACE_S", "600.5", 600.5),
    ],
)
def test_variables_are_text_lists_or_mappings(name: str, text: str, value: object) -> None:
    """A variable's text is coerced to its key's type; lists and mappings are YAML flow."""
    section, key = name.removeprefix("WORKER_").lower().split("__")
    settings = load_settings(environ={**GOOD, name: text})
    assert getattr(getattr(settings, section), key) == value


def test_nested_sections_and_whole_sections_come_from_variables() -> None:
    """Any depth is reached, and a variable may give a whole section."""
    environ = {
        "WORKER_PUBSUB": "{request_subscription: s, response_topic: t}",
        "WORKER_BACKEND": "{base_url: 'http://h'}",
        "WORKER_BACKEND__TIMEOUTS__TOTAL_S": "9",
        "WORKER_ROUTES": "[{name: a, base_url: 'http://a', match: {models: ['m*']}}]",
    }
    settings = load_settings(environ=environ)
    assert settings.backend is not None
    assert settings.backend.timeouts.total_s == 9
    assert settings.routes[0].match.models == ["m*"]


def sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, field in model.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation)) if get_origin(field.annotation) is not list else ()
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part, (*path, name))


@pytest.mark.parametrize("path", list(sections(Settings)), ids=".".join)
@pytest.mark.parametrize("way", ["file", "environment", "flag"])
def test_unknown_keys_fail_in_every_section(path: tuple[str, ...], way: str, worker_yaml: Path) -> None:
    """A typo never passes silently, wherever it stands."""
    key = ".".join((*path, "nonesuch"))
    if way == "file":
        worker_yaml.write_text(
            "".join(f"{'  ' * n}{name}:\n" for n, name in enumerate(path)) + "  " * len(path) + "nonesuch: 1"
        )
        assert faults(worker_yaml) == [f"{key}: unknown key"]
    elif way == "environment":
        name = "WORKER_" + key.replace(".", "__").upper()
        found = faults(environ={**GOOD, name: "1"})
        assert found[0].startswith(f"{key} (from {name}): unknown key")
        assert len(found) == 1
    else:
        assert faults(flags={key: 1}) == [f"{key}: unknown key"]


def test_unknown_keys_fail_in_routes(worker_yaml: Path) -> None:
    """The items of lists are sections too."""
    worker_yaml.write_text("routes: [{name: a, base_url: 'http://a', modle: m, match: {model: m}}]")
    assert faults(worker_yaml) == [
        "routes.0.match.model: unknown key; did you mean models?",
        "routes.0.modle: unknown key; did you mean model?",
    ]


def test_a_single_underscore_is_pointed_at() -> None:
    """The commonest typo of all is explained."""
    (fault,) = faults(environ={**GOOD, "WORKER_HTTP_PORT": "8081"})
    assert fault == (
        "http_port (from WORKER_HTTP_PORT): unknown key; sections and keys are joined by two underscores; "
        "did you mean http.port?"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("backend: {timeouts: {idel_s: 1}}", "backend.timeouts.idel_s: unknown key; did you mean idle_s?"),
        (
            "routes: [{name: a, base_url: 'http://a', window: {initail: 1}}]",
            "routes.0.window.initail: unknown key; did you mean initial?",
        ),
        ("backends: {}", "backends: unknown key; did you mean backend?"),
        ("backend: {headers: {x: 1}, zzz: 1}", "backend.zzz: unknown key"),
    ],
)
def test_the_nearest_key_is_suggested(worker_yaml: Path, text: str, fault: str) -> None:
    """Of the same section, also in lists; none where none is near."""
    worker_yaml.write_text(text)
    assert fault in faults(worker_yaml)


def test_every_fault_stands_in_one_message(worker_yaml: Path) -> None:
    """Wrong types, ranges, unknown keys and conflicts of what is right are named together, each once."""
    worker_yaml.write_text(
        "pubsub: {max_in_flight: 0, max_delivery_attempts: many, x: 1}\n"
        "drain: {grace_s: 480}\nhttp: {port: 70000}\nfoo: 1\nlog: {level: loud}\n"
    )
    assert faults(worker_yaml, {**GOOD, "WORKER_LOG__FORMAT": "xml"}) == [
        "pubsub.max_in_flight: input should be greater than or equal to 1 (got 0)",
        "pubsub.max_delivery_attempts: input should be 'auto', or input should be a valid integer, unable to parse string as an integer (got 'many')",
        "pubsub.x: unknown key",
        "http.port: input should be less than or equal to 65535 (got 70000)",
        "log.format (from WORKER_LOG__FORMAT): input should be 'auto', 'json' or 'console' (got 'xml')",
        "log.level: input should be 'debug', 'info', 'warning' or 'error' (got 'loud')",
        "foo: unknown key",
        "backend.timeouts.total_s: 480 s is not less than drain.grace_s (480 s), so a shutdown would cut requests; lower it, raise the grace, or accept it with drain.cut_longer_requests",
    ]


def test_nothing_given_names_what_is_required() -> None:
    """A first start says what to set."""
    assert [fault.partition(":")[0] for fault in faults(environ={})] == [
        "pubsub.request_subscription",
        "pubsub.response_topic",
        "backend.base_url",
    ]


@pytest.mark.parametrize("value", ["", "ftp://h"])
def test_a_bad_url_is_not_called_missing_as_well(value: str) -> None:
    """The consequence of a fault is not a second fault."""
    assert len(faults(environ={**GOOD, "WORKER_BACKEND__BASE_URL": value})) == 1


def test_faults_of_a_flag_are_not_blamed_on_the_environment() -> None:
    """Where a flag replaced a variable, the variable is not named."""
    assert faults(environ={**GOOD, "WORKER_HTTP__PORT": "1"}, flags={"http.port": -1})[0].startswith("http.port: ")


def test_a_variable_below_a_value_is_named() -> None:
    """A variable that goes deeper than the settings do is found by its name."""
    name = "WORKER_BACKEND__TIMEOUTS__TOTAL_S__X"
    assert faults(environ={**GOOD, name: "1"}) == [
        f"backend.timeouts.total_s (from {name}): input should be a valid number"
    ]


def test_sections_written_as_values_are_faults(worker_yaml: Path) -> None:
    """A section that is text or a list is said so."""
    worker_yaml.write_text("http: 8080\nlog: [x]\n")
    found = faults(worker_yaml, {**GOOD, "WORKER_LOG__LEVEL": "info"})
    assert [fault.partition(":")[0] for fault in found] == ["WORKER_LOG__LEVEL", "http", "log"]


def test_an_empty_section_has_its_defaults(worker_yaml: Path) -> None:
    """A section or key without a value is as if it were not there, unless it is unknown."""
    worker_yaml.write_text("drain:\npubsub: {max_in_flight: , publish: }\nlog: {level: null}\n")
    assert load_settings(str(worker_yaml), environ=GOOD) == load_settings(environ=GOOD)
    worker_yaml.write_text("drian:\nlog: {levle: }\n")
    assert faults(worker_yaml) == [
        "log.levle: unknown key; did you mean level?",
        "drian: unknown key; did you mean drain?",
    ]


SERVICE_LINKS = {
    "WORKER_SERVICE_HOST": "10.0.0.1",
    "WORKER_SERVICE_PORT": "8080",
    "WORKER_SERVICE_PORT_HTTP_METRICS": "8080",
    "WORKER_PORT": "tcp://10.0.0.1:8080",
    "WORKER_PORT_8080_TCP": "tcp://10.0.0.1:8080",
    "WORKER_PORT_8080_TCP_PROTO": "tcp",
    "WORKER_PORT_8080_TCP_PORT": "8080",
    "WORKER_PORT_8080_TCP_ADDR": "10.0.0.1",
    "WORKER_METRICS_SERVICE_HOST": "10.0.0.2",
    "WORKER_METRICS_SERVICE_PORT_HTTP": "80",
    "WORKER_METRICS_PORT": "udp://10.0.0.2:80",
    "WORKER_METRICS_PORT_80_UDP_ADDR": "10.0.0.2",
}


def test_service_links_are_not_ours() -> None:
    """What Kubernetes sets for Services named `worker` or `worker-metrics` is ignored."""
    assert load_settings(environ={**GOOD, **SERVICE_LINKS}) == load_settings(environ=GOOD)


@pytest.mark.parametrize("name", ["WORKER_PORT", "WORKER_HTTP_PORT", "WORKER_HTTP__SERVICE_HOST", "WORKER_"])
def test_what_only_looks_like_a_service_link_is_a_typo(name: str) -> None:
    """A mistyped setting is not ignored as if Kubernetes had set it."""
    assert len(faults(environ={**GOOD, name: "8080"})) == 1


@pytest.mark.parametrize("key", ["[sk-secret", "{sk-secret", "[sk-secret]", "{sk:secret}"])
def test_a_key_may_begin_with_a_bracket(key: str) -> None:
    """A secret is text, whatever it looks like."""
    settings = load_settings(environ={**GOOD, "WORKER_BACKEND__API_KEY": key})
    assert settings.backend is not None
    assert settings.backend.api_key == SecretStr(key)


def test_every_secret_is_known_to_the_loader() -> None:
    """Keys that are masked in settings are masked in messages."""

    def parts_of(annotation: Any) -> Iterator[Any]:
        yield annotation
        for part in get_args(annotation):
            yield from parts_of(part)

    def secrets(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            parts = tuple(parts_of(field.annotation))
            if SecretStr in parts:
                yield name
            for part in parts:
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from secrets(part)

    assert {*SECRET_KEYS, *SECRET_MAPPINGS} == set(secrets(Settings))


@pytest.mark.parametrize(
    "backend",
    [
        "",
        "backend: {base_url: http://a}\n",
        "routes: [{name: default, base_url: http://b}]\n",
        "routes: [{name: a, base_url: http://b}]\n",
    ],
    ids=["none", "short form", "a route of that name", "routes"],
)
def test_commands_that_call_no_backend_need_none(backend: str, tmp_path: Path) -> None:
    """`setup` and `replay` take a worker's file as it is, and one without any backend; of what is there nothing changes."""
    path = tmp_path / "worker.yaml"
    path.write_text("pubsub: {request_subscription: s, response_topic: t}\n" + backend)
    routes = load_without_backend(str(path), flags={"pubsub.project_id": "p"}).all_routes()
    if backend:
        assert routes == load_settings(str(path)).all_routes()


def test_commands_that_call_no_backend_need_the_rest(tmp_path: Path) -> None:
    """Every other fault is told."""
    path = tmp_path / "worker.yaml"
    path.write_text("pubsub: {request_subscription: s}\n")
    with pytest.raises(SettingsError, match=r"pubsub\.response_topic"):
        load_without_backend(str(path))


# Bad files and variables: always one SettingsError, and never a secret in its text.

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
    """Any bad file gives one sentence."""
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


def test_off_needs_no_quotes(worker_yaml: Path) -> None:
    """YAML 1.1 reads it as false."""
    gate = "metric_gate: {type: off}, continuation: off"
    worker_yaml.write_text(
        f"pubsub: {{request_subscription: s, response_topic: t}}\nbackend: {{base_url: 'http://h', {gate}}}"
    )
    backend = load_settings(worker_yaml, environ={}).backend
    assert backend is not None
    assert (backend.metric_gate.type, backend.continuation) == ("off", "off")
