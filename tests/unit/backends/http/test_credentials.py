"""The key of a backend: fixed or from a file, read again when it changes, never shown."""

import json
import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.fakes import FakeClock
from worker.backends.http.credentials import CHECK_EVERY_S, REDACTED, ApiKey, Redactor
from worker.errors import SettingsError


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A file that holds `sk-one`."""
    path = tmp_path / "key"
    path.write_text("sk-one\n")
    return path


@pytest.fixture
def clock() -> FakeClock:
    """Monotonic seconds that pass when told."""
    return FakeClock()


def opened(path: Path, clock: FakeClock) -> ApiKey:
    return ApiKey(None, str(path), clock.now)


def later(clock: FakeClock) -> None:
    clock.advance(CHECK_EVERY_S)


def replace(path: Path, content: bytes) -> None:
    """Swap the file as kubelet does: the new one is complete before the name points to it."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.rename(path)


def test_no_key_is_none() -> None:
    """A backend without authentication gets no header."""
    assert ApiKey(None, None).current() is None


def test_a_fixed_key_loses_its_white_space() -> None:
    """Most ways of making a Secret add a line break."""
    assert ApiKey(SecretStr(" sk-one\r\n"), None).current() == "sk-one"


@pytest.mark.parametrize("key", ["", " \n", "sk\none", "sk-é", "sk one", "sk\x00", "sk\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_at_start(key: str, tmp_path: Path) -> None:
    """Otherwise every request would fail, and the fault would show the key."""
    with pytest.raises(SettingsError) as caught:
        ApiKey(SecretStr(key), None)
    assert "sk" not in str(caught.value)
    (tmp_path / "k").write_text(key)
    with pytest.raises(SettingsError, match=r"api_key_file: .*k: is empty, or no text"):
        ApiKey(None, str(tmp_path / "k"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes that are not ASCII are no key."""
    (tmp_path / "k").write_bytes(b"\xff\xfes\x00k\x00")
    with pytest.raises(SettingsError, match="no text"):
        ApiKey(None, str(tmp_path / "k"))


def test_a_missing_file_is_refused_at_start(tmp_path: Path) -> None:
    """The operator is told which file and why."""
    with pytest.raises(SettingsError, match=r"api_key_file: .*none: No such file or directory"):
        ApiKey(None, str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="Is a directory"):
        ApiKey(None, str(tmp_path))


def test_a_changed_file_is_read_again_after_a_second(key_file: Path, clock: FakeClock) -> None:
    """A rotation needs no restart; the file is looked at once a second at most."""
    key = opened(key_file, clock)
    replace(key_file, b"sk-two")
    assert key.current() == "sk-one"
    later(clock)
    assert key.current() == "sk-two"
    later(clock)
    assert key.current() == "sk-two"


def test_a_swapped_link_is_noticed(tmp_path: Path, clock: FakeClock) -> None:
    """Kubernetes swaps a link to a folder; size and time of the new file may be the old one's."""
    for name, content in (("a", "sk-one"), ("b", "sk-two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(content)
        os.utime(tmp_path / name / "key", (1, 1))
    (tmp_path / "data").symlink_to(tmp_path / "a")
    key = opened(tmp_path / "data" / "key", clock)
    (tmp_path / "new").symlink_to(tmp_path / "b")
    (tmp_path / "new").rename(tmp_path / "data")
    later(clock)
    assert key.current() == "sk-two"


@pytest.mark.parametrize("content", [b"", b"\n", b"sk\xff", b"two\nlines"])
def test_a_broken_file_keeps_the_old_key_until_it_is_whole(content: bytes, key_file: Path, clock: FakeClock) -> None:
    """A half-written rotation does not lock the worker out, and the finished one is taken."""
    key = opened(key_file, clock)
    replace(key_file, content)
    later(clock)
    assert key.current() == "sk-one"
    replace(key_file, b"sk-two")
    later(clock)
    assert key.current() == "sk-two"


def test_a_file_that_disappears_keeps_the_old_key(key_file: Path, clock: FakeClock) -> None:
    """Kubelet may take a volume away for a moment."""
    key = opened(key_file, clock)
    key_file.unlink()
    later(clock)
    assert key.current() == "sk-one"
    key_file.write_text("sk-two")
    later(clock)
    assert key.current() == "sk-two"


def test_the_file_wins_over_the_fixed_key(key_file: Path) -> None:
    """Settings refuse both; if they come all the same, the one that can rotate is used."""
    assert ApiKey(SecretStr("sk-fixed"), str(key_file)).current() == "sk-one"


def test_the_key_is_never_shown(key_file: Path) -> None:
    """Neither `repr` nor `str` holds it."""
    for key in (ApiKey(SecretStr("sk-one"), None), ApiKey(None, str(key_file))):
        assert "sk-one" not in repr(key) + str(key)
        assert "is_set=True" in repr(key)


# What comes back

SENT = "sk-live/1234&5678"


def a_redactor(*headers: str) -> Redactor:
    redactor = Redactor(headers)
    redactor.add_key(SENT)
    return redactor


@pytest.mark.parametrize(
    "text",
    [SENT, f"Bearer {SENT}", f"{SENT},{SENT}", "sk-live\\/1234&5678", "sk-live/1234&amp;5678", "sk-live%2F1234%265678"],
)
@pytest.mark.parametrize("is_answer", [True, False])
def test_the_key_is_replaced_however_it_is_written(text: str, is_answer: bool) -> None:
    """As it is, as JSON, in a page, in a URL; more than once."""
    redactor = a_redactor()
    for found in (redactor.text(text), redactor.body(text.encode(), is_answer=is_answer).decode()):
        assert REDACTED in found
        assert "1234" not in found


@pytest.mark.parametrize(
    "text",
    [
        SENT.replace("&", "\\u0026"),
        SENT.replace("/", "\\u002F").replace("&", "\\u0026"),
        "".join(f"\\u{ord(char):04x}" for char in SENT),
        "".join(f"\\u{ord(char):04X}" for char in SENT),
    ],
)
@pytest.mark.parametrize("is_answer", [True, False])
def test_the_key_is_replaced_where_json_escapes_its_characters(text: str, is_answer: bool) -> None:
    """Encoders that are careful about HTML do; what stays is JSON with the same other words."""
    body = f'{{"message": "\\u003c{text}\\u003e \\u00fc"}}'.encode()
    assert json.loads(a_redactor().body(body, is_answer=is_answer)) == {"message": f"<{REDACTED}> \u00fc"}


@pytest.mark.parametrize("value", ["Basic dXNlcjpwYXNzd29yZA==", "hunter2hunter2hunter2", 'tok"en-0123456789-abc'])
def test_the_operators_headers_are_replaced(value: str) -> None:
    """Also without the scheme before them, and JSON stays JSON."""
    redactor = a_redactor(value)
    body = json.dumps({"message": f"got {value} and {value.rsplit(maxsplit=1)[-1]}"}).encode()
    for is_answer in (True, False):
        assert value.rsplit(maxsplit=1)[-1] not in json.loads(redactor.body(body, is_answer=is_answer))["message"]


def test_a_good_answer_keeps_words_that_a_header_happens_to_have() -> None:
    """The name of a team is no secret; in an error it is replaced to be on the safe side."""
    redactor = a_redactor("research")
    redactor.add_key("EMPTY")
    body = b'{"choices": ["EMPTY research"]}'
    assert redactor.body(body, is_answer=True) == body
    assert b"research" not in redactor.body(body, is_answer=False)


def test_the_key_before_is_replaced_as_well() -> None:
    """Answers to requests that were sent with it are under way when a key is rotated."""
    redactor = a_redactor()
    redactor.add_key("sk-new-123456")
    assert redactor.text(f"{SENT} sk-new-123456") == f"{REDACTED} {REDACTED}"


def test_headers_without_a_secret_are_not_copied() -> None:
    """The hot path builds nothing."""
    headers = {"x-a": "1"}
    assert a_redactor().headers(headers) is headers
    assert a_redactor().headers({"x-a": SENT}) == {"x-a": REDACTED}
