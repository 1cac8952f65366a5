"""Names and channels: what a short name becomes, and what is asked of whom."""

from types import SimpleNamespace
from typing import Any

import google.auth
import grpc
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError

from worker.brokers import connection
from worker.brokers.connection import Names, async_channel, full_topic, resolve
from worker.errors import SettingsError
from worker.settings.schema import PubSubSettings


def a_settings(**keys: str) -> PubSubSettings:
    return PubSubSettings.model_validate({"request_subscription": "s", "response_topic": "t", **keys})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> AnonymousCredentials:
    """Credentials that the environment has, with their own project."""
    credentials = AnonymousCredentials()
    monkeypatch.setattr(google.auth, "default", lambda scopes: (credentials, "their-project"))
    return credentials


def test_an_emulator_needs_neither_credentials_nor_a_project() -> None:
    """Nothing of Google's is asked."""
    names, credentials = resolve(a_settings(emulator_host="127.0.0.1:1"))
    assert (names, credentials) == (Names("projects/local/subscriptions/s", "projects/local/topics/t"), None)


def test_a_project_completes_short_names(found: AnonymousCredentials) -> None:
    """The setting's, or the credentials' own."""
    assert resolve(a_settings(project_id="p")) == (Names("projects/p/subscriptions/s", "projects/p/topics/t"), found)
    assert resolve(a_settings())[0] == Names(
        "projects/their-project/subscriptions/s", "projects/their-project/topics/t"
    )


def test_full_names_stay(found: AnonymousCredentials) -> None:
    """They may be in other projects, and need none."""
    settings = a_settings(request_subscription="projects/a/subscriptions/s", response_topic="projects/b/topics/t")
    names, _ = resolve(settings)
    assert names == Names("projects/a/subscriptions/s", "projects/b/topics/t")
    assert full_topic("dead", settings, names) == "projects/b/topics/dead"
    assert full_topic("projects/c/topics/dead", settings, names) == "projects/c/topics/dead"
    assert full_topic("dead", a_settings(project_id="p"), names) == "projects/p/topics/dead"


def test_no_credentials_are_an_unusable_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, not a traceback."""

    def missing(scopes: object) -> None:
        raise DefaultCredentialsError("nothing found\nlong story")

    monkeypatch.setattr(google.auth, "default", missing)
    with pytest.raises(SettingsError) as caught:
        resolve(a_settings(project_id="p"))
    assert caught.value.faults == ["no Google Cloud credentials: nothing found"]


def test_no_project_is_an_unusable_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short name needs one, and the credentials name none."""
    monkeypatch.setattr(google.auth, "default", lambda scopes: (AnonymousCredentials(), None))
    with pytest.raises(SettingsError, match=r"pubsub\.project_id: is required"):
        resolve(a_settings())


async def test_channels_have_no_limit_of_four_megabytes() -> None:
    """gRPC's default would reopen the stream for ever at the first larger response."""
    options = dict(connection.OPTIONS)
    assert (options["grpc.max_receive_message_length"], options["grpc.max_send_message_length"]) == (-1, -1)
    settings = a_settings(emulator_host="127.0.0.1:1")
    await async_channel(settings, None).close(None)


def test_a_connection_that_died_is_noticed_within_what_servers_allow() -> None:
    """The service is pinged every 30 s; other gRPC servers close connections that are pinged within five minutes."""
    assert dict(connection.KEEPALIVE)["grpc.keepalive_time_ms"] <= 30_000
    assert 300_000 < dict(connection.EMULATOR_KEEPALIVE)["grpc.keepalive_time_ms"] <= 360_000


async def test_a_channel_has_a_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to an emulator."""
    given: list[Any] = []
    monkeypatch.setattr(grpc.aio, "insecure_channel", lambda _, options: given.append(options))
    settings = a_settings(emulator_host="127.0.0.1:1")
    async_channel(settings, None)
    assert ["grpc.keepalive_time_ms" in dict(options) for options in given] == [True]


@pytest.mark.parametrize("credentials", [None, AnonymousCredentials(), SimpleNamespace(), SimpleNamespace(token="t")])
def test_a_refused_token_is_not_used_again(credentials: Any) -> None:
    """The library fetches a new one for the next call; what has no token stays as it is."""
    connection.expire(credentials)
    assert getattr(credentials, "token", None) is None


async def test_channels_to_the_real_service_are_made_with_the_credentials(found: AnonymousCredentials) -> None:
    """Nothing is connected before the first call."""
    await async_channel(a_settings(), found).close(None)
