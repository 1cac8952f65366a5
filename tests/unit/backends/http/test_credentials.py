"""The key of a backend: fixed or from a file, read again when it changes, never shown."""

import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.fakes import FakeClock
from worker.backends.http.credentials import CHECK_EVERY_S, ApiKey
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
