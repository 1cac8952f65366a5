"""The shape of errors."""

import json

import pytest

from worker.batches.api.errors import ApiError, error_body, shown, too_many, wrong_type


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (405, "invalid_request_error"),
        (409, "invalid_request_error"),
        (413, "invalid_request_error"),
        (416, "invalid_request_error"),
        (429, "rate_limit_error"),
        (431, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_type_follows_from_the_status(status: int, kind: str) -> None:
    """All four keys, always."""
    assert json.loads(error_body(status, "text")) == {
        "error": {"message": "text", "type": kind, "param": None, "code": None}
    }


def test_a_code_stands_in_the_message() -> None:
    """Where it does not stand there anyway: newer clients show nothing else."""
    assert ApiError(400, "no", code="bad").message == "no (bad)"
    assert ApiError(400, "a bad thing", code="bad").message == "a bad thing"


def test_a_conflict_is_not_to_be_sent_again() -> None:
    """The client would send it three times."""
    assert ApiError(409, "no").headers == {"x-should-retry": "false"}
    assert ApiError(404, "no").headers == {}


@pytest.mark.parametrize(("wait_s", "told"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60")])
def test_a_hint_is_whole_seconds_rounded_up(wait_s: float, told: str) -> None:
    """Never zero, never too early."""
    assert too_many("Slow down.", wait_s).headers["retry-after"] == told


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"),
        (True, "a boolean"),
        (1, "an integer"),
        (1.5, "a decimal"),
        ("", "a string"),
        ([], "an array"),
        ({}, "an object"),
    ],
)
def test_types_have_the_names_of_json(value: object, name: str) -> None:
    """Not Python's."""
    assert f"but got {name} instead" in wrong_type("x", "a word", value).message


def test_a_long_or_strange_value_is_repeated_in_part() -> None:
    """And never breaks the reply."""
    assert len(shown("x" * 10_000)) < 200
    assert json.loads(ApiError(400, shown("\ud800\n")).body)["error"]["message"] == "'?\\n'"
