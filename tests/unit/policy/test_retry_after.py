"""The backend's hint about the next attempt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.retry_after import MAX_RETRY_AFTER_S, retry_after_s, should_retry

NOW = 784_111_777.0
"""Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        ("999999999", None),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
        ("Sun Nov  6 08:50:37 1994", 60.0),
        ("Sun, 06 Nov 1994 09:50:37 +0100", 60.0),
        ("Sun, 06 Nov 1994 08:00:00 GMT", 0.0),
        ("Sun, 06 Nov 2094 08:49:37 GMT", None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("+5", None),
        ("1e3", None),
        ("nan", None),
        ("inf", None),
        ("5 seconds", None),
        ("\u0665", None),
        ("Sun, 99 Nov 1994 08:50:37 GMT", None),
        ("Sun, 06 Nov 99999 08:50:37 GMT", None),
        ("9" * 400, None),
    ],
)
def test_retry_after(value, expected):
    """Seconds and all three forms of an HTTP date are understood and capped at a day; anything else is no hint."""
    assert retry_after_s({"retry-after": value}, now_unix=NOW) == expected


def test_milliseconds_go_first():
    """The finer header wins; when it cannot be read the other one counts."""
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}, now_unix=NOW) == 0.25
    assert retry_after_s({"retry-after-ms": "soon", "retry-after": "9"}, now_unix=NOW) == 9.0
    assert retry_after_s({"retry-after-ms": "999999999"}, now_unix=NOW) == MAX_RETRY_AFTER_S


def test_no_header_no_wish():
    """Most servers say nothing."""
    assert retry_after_s({}, now_unix=NOW) is None


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), (" False ", False), ("TRUE", True), ("1", None), ("", None), (None, None)]
)
def test_should_retry(value, expected):
    """Only the two words OpenAI uses mean something."""
    assert should_retry({} if value is None else {"x-should-retry": value}) is expected


@given(st.text(max_size=60), st.text(max_size=20))
def test_no_header_breaks_it(seconds, milliseconds):
    """Whatever stands in the headers, the hint is none or between zero and the cap."""
    hint = retry_after_s({"retry-after": seconds, "retry-after-ms": milliseconds}, now_unix=NOW)
    assert hint is None or 0.0 <= hint <= MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("retry-after", "1800000002", 2.0),
        ("retry-after-ms", "1800000002", 2.0),
        ("retry-after-ms", "1800000002000", 2.0),
        ("retry-after", "2027-01-15T08:00:02Z", 2.0),
        ("retry-after", "2027-01-15T09:00:02+01:00", 2.0),
        ("retry-after", "2027-01-15 08:00:02.5", 2.5),
        ("retry-after", "2027-01-15T08:00:61Z", None),
        ("retry-after", "2127-01-15T08:00:02Z", None),
        ("retry-after", "1800000002.5", 2.5),
        ("retry-after", "1799999000", 0.0),
        ("retry-after", "1800000002000", 2.0),
        ("retry-after", "172800", 86_400.0),
        ("retry-after", "1800172800", 86_400.0),
        ("retry-after", "99999999", None),
        ("retry-after", "1900000000", None),
        ("retry-after", "999999999999999", None),
        ("retry-after-ms", "99999999999", None),
    ],
)
def test_a_time_is_read_as_a_time_and_nonsense_is_no_hint(header, value, expected):
    """A Unix time two seconds ahead is two seconds; what is more than a month away is a mistake."""
    assert retry_after_s({header: value}, now_unix=1_800_000_000.0) == expected
