"""Names and channels: what a short name becomes, and what is asked of whom."""

import google.auth
import pytest
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError

from worker.brokers import connection
from worker.brokers.connection import Names, async_channel, full_topic, resolve, sync_channel
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
    sync_channel(settings, None).close()
    await async_channel(settings, None).close(None)


async def test_channels_to_the_real_service_are_made_with_the_credentials(found: AnonymousCredentials) -> None:
    """Both kinds of channel can be made; nothing is connected before the first call."""
    sync_channel(a_settings(), found).close()
    await async_channel(a_settings(), found).close(None)
