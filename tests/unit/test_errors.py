"""The exception tree is the one drawn at the top of its module."""

import re

import pytest

from worker import errors
from worker.errors import BackendError, MessageError, SettingsError, WorkerError


def drawn() -> dict[str, str]:
    """Child to parent, as the picture says: four columns a level."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if match is not None:
            level = len(match[1]) // 4
            above[level:] = [match[2]]
            if level:
                parents[match[2]] = above[level - 1]
    return parents


def test_the_picture_is_the_tree() -> None:
    """Every class stands in the picture below its base, and nothing else does."""
    real = {
        name: item.__base__.__name__
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, WorkerError) and item is not WorkerError
    }
    assert drawn() == real


def test_unusable_settings_name_every_fault() -> None:
    """One message, one line for each."""
    error = SettingsError(["a: wrong", "b: wrong"])
    assert str(error) == "unusable settings:\n  - a: wrong\n  - b: wrong"
    assert error.faults == ["a: wrong", "b: wrong"]
    assert error.one_line == "unusable settings: a: wrong; b: wrong"


@pytest.mark.parametrize(("detail", "text"), [("", "connect"), ("refused", "connect: refused")])
def test_a_backend_error_says_what_broke(detail: str, text: str) -> None:
    """The fault, and the library's words where there are any."""
    assert str(BackendError("connect", detail)) == text


def test_a_message_error_has_metadata_to_echo() -> None:
    """Without any it is an empty object, never nothing."""
    error = MessageError("body is missing", param="body")
    assert (str(error), error.param, error.metadata) == ("body is missing", "body", b"{}")
