"""`inference-worker local`: which server it asks, and what it refuses."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.cli.main import build_parser, run_command
from worker.cli.parser import Parser
from worker.cli.target import find_target
from worker.errors import SettingsError


def options(*arguments: str) -> argparse.Namespace:
    parser: Parser = build_parser(["local"])
    namespace: argparse.Namespace = parser.parse_args(["local", "in.jsonl", "out.jsonl", *arguments])
    return namespace


def test_without_anything_the_server_is_simulated() -> None:
    """Nothing costs money without being asked for."""
    assert find_target(options()).is_simulated


def test_a_key_alone_names_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`OPENAI_API_KEY` stands in many shells."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert find_target(options()).is_simulated


def test_the_variables_of_openais_client_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Address and key; the key goes to the worker in its environment, not on a command line."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://host/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    target = find_target(options())
    (route,) = target.settings.all_routes()
    assert (target.is_simulated, route.base_url) == (False, "http://host/v1")
    assert route.api_key is not None
    assert route.api_key.get_secret_value() == "sk-1"
    assert target.environ == {"WORKER_BACKEND__API_KEY": "sk-1"}
    assert "sk-1" not in str(target.flags)
    assert target.remark == "OPENAI_BASE_URL, OPENAI_API_KEY"


def test_what_is_nearer_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line, then settings, then OpenAI's variables; `--simulated` is the simulated server in any case."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://variable")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-variable")
    config, key = tmp_path / "worker.yaml", tmp_path / "key"
    config.write_text("backend: {base_url: 'http://file', api_key: sk-file}")
    key.write_text("sk-command")

    def of(*arguments: str) -> tuple[str, str | None]:
        (route,) = find_target(options(*arguments)).settings.all_routes()
        return route.base_url, route.api_key_file or (route.api_key and route.api_key.get_secret_value())

    assert of("--config", str(config)) == ("http://file", "sk-file")
    assert of("--config", str(config), "--backend-url", "http://command") == ("http://command", "sk-file")
    assert of("--backend-url", "http://command") == ("http://command", "sk-variable")
    assert of("--backend-url", "http://command", "--api-key-file", str(key)) == ("http://command", str(key))
    assert find_target(options("--config", str(config), "--simulated")).is_simulated
    monkeypatch.setenv("WORKER_BACKEND__BASE_URL", "http://ours")
    assert of("--config", str(config)) == ("http://ours", "sk-file")


def test_routes_of_a_settings_file_are_used(tmp_path: Path) -> None:
    """They are servers too."""
    config = tmp_path / "worker.yaml"
    config.write_text(
        "routes: [{name: a, match: {models: [x]}, base_url: 'http://a'}, {name: b, base_url: 'http://b'}]"
    )
    target = find_target(options("--config", str(config)))
    assert [route.base_url for route in target.settings.all_routes()] == ["http://a", "http://b"]
    assert not target.is_simulated
    assert [
        route.name for route in find_target(options("--config", str(config), "--simulated")).settings.all_routes()
    ] == ["default"]


def test_an_address_or_the_simulated_server_replaces_several(tmp_path: Path) -> None:
    """Servers and fallback of the settings are of no concern then."""
    config = tmp_path / "worker.yaml"
    config.write_text(
        "routes: [{name: c, base_url: 'http://c', only_fallback: true}]\n"
        "backend: {base_urls: ['http://a', 'http://b'], fallback: c}\n"
    )
    several = find_target(options("--config", str(config))).settings.all_routes()[-1]
    assert [target.base_url for target in several.targets()] == ["http://a", "http://b"]
    one = find_target(options("--config", str(config), "--backend-url", "http://d")).settings.all_routes()[-1]
    assert [target.base_url for target in one.targets()] == ["http://d"]
    assert find_target(options("--config", str(config), "--simulated")).is_simulated


def test_headers_are_added_to_those_of_the_settings(tmp_path: Path) -> None:
    """By environment, since a header may be a key."""
    config = tmp_path / "worker.yaml"
    config.write_text("backend: {base_url: 'http://file', headers: {x-a: one, x-b: two}}")
    target = find_target(options("--config", str(config), "--header", "X-B: three", "--header", "x-c:a:b"))
    assert json.loads(target.environ["WORKER_BACKEND__HEADERS"]) == {"x-a": "one", "x-b": "three", "x-c": "a:b"}
    assert "three" not in str(target.flags)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--header", "nothing"), "must be NAME:VALUE"),
        (("--header", "Authorization: Bearer x"), "is set by the worker itself; a key goes into --api-key-file"),
        (("--backend-url", "http://a", "--simulated"), "not allowed with argument"),
    ],
)
def test_options_that_cannot_be_meant_are_told(
    arguments: tuple[str, ...], told: str, read_fault: Callable[[], str]
) -> None:
    """With the usage, and exit 2."""
    with pytest.raises(SystemExit) as raised:
        run_command(["local", "in.jsonl", "out.jsonl", *arguments])
    assert raised.value.code == 2
    assert told in read_fault()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--backend-url", "http://a", "--latency", "1s"), "--latency: is of the simulated server"),
        (("--latency", "soon"), "--latency: 'soon' is not a duration"),
        (("--backend-url", "http://a", "--engine", "llama-8b-h100"), "--engine: is of the simulated server"),
        (("--engine", "llama-8b"), "--engine: must be one of llama-8b-h100, llama-70b-2-h100, qwen-7b-gb200"),
        (("--engine", "llama-8b-h100", "--latency", "1s"), "--engine: its model says how long an answer takes"),
        (("--backend-url", "a:80"), "backend.base_url: must be http://host"),
        (("--backend-url", "http://a", "--header", "x y: 1"), "'x y' is not a usable header"),
    ],
)
def test_settings_that_cannot_be_used_are_told(arguments: tuple[str, ...], told: str) -> None:
    """Before anything is opened."""
    with pytest.raises(SettingsError) as raised:
        find_target(options(*arguments))
    assert told in str(raised.value)


SAGEMAKER = "backend: {sagemaker: {endpoint: e, region: eu-west-1}}"


def test_an_endpoint_of_sagemaker_is_a_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs no address, and takes no key of OpenAI, which stands in many shells."""
    config = tmp_path / "worker.yaml"
    config.write_text(SAGEMAKER)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    target = find_target(options("--config", str(config)))
    (route,) = target.settings.all_routes()
    assert (target.is_simulated, target.remark, route.api_key) == (False, "", None)
    assert route.address == "https://runtime.sagemaker.eu-west-1.amazonaws.com"
    with pytest.raises(SettingsError, match="--simulated: is no endpoint of SageMaker"):
        find_target(options("--config", str(config), "--simulated"))
