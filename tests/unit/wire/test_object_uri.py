"""URIs of objects: one spelling for each, and nothing that could mean another host, folder or object."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.wire.object_uri import ObjectUri, parse_object_prefix, parse_object_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gs://bucket/a/b.json", ObjectUri("gs", "bucket", "a/b.json")),
        ("s3://my.bucket-1/k", ObjectUri("s3", "my.bucket-1", "k")),
        ("az://container/2026-11-29/x=1/a@b:c+d,e~f_g", ObjectUri("az", "container", "2026-11-29/x=1/a@b:c+d,e~f_g")),
        ("file:///srv/payloads/1.json", ObjectUri("file", "", "srv/payloads/1.json")),
        ("gs://bucket/a/...", ObjectUri("gs", "bucket", "a/...")),
    ],
)
def test_an_object_is_named_by_scheme_bucket_and_key(text: str, expected: ObjectUri) -> None:
    """What is read is written back in the same spelling."""
    assert parse_object_uri(text) == expected
    assert str(expected) == text


REFUSED = {
    "nothing": "",
    "no scheme": "bucket/key",
    "another scheme": "http://169.254.169.254/latest/meta-data",
    "a scheme in capitals": "GS://bucket/key",
    "a scheme with white space": " gs://bucket/key",
    "a scheme inside another": "s3+http://bucket/key",
    "memory": "memory://b/k",
    "no bucket": "gs:///key",
    "no key": "gs://bucket",
    "no key but a slash": "gs://bucket/",
    "one slash": "gs:/bucket/key",
    "a user": "gs://user@bucket/key",
    "a password": "s3://key:secret@bucket/k",
    "a port": "s3://bucket:8080/key",
    "an address in brackets": "s3://[::1]/key",
    "capitals in a bucket": "s3://Bucket/key",
    "dots around a bucket": "s3://.bucket/key",
    "a bucket that climbs": "s3://../key",
    "a bucket with an escape": "s3://buck%2Fet/key",
    "a backslash in a bucket": "s3://a\\b/key",
    "a long bucket": f"s3://{'b' * 300}/key",
    "a host in a file": "file://host/etc/passwd",
    "localhost in a file": "file://localhost/etc/passwd",
    "a relative file": "file:srv/a",
    "up": "gs://bucket/a/../b",
    "up at the end": "file:///srv/payloads/..",
    "here": "gs://bucket/./a",
    "an empty segment": "gs://bucket/a//b",
    "a slash at the end": "gs://bucket/a/",
    "two slashes after the bucket": "file:////etc/passwd",
    "an escaped up": "gs://bucket/a/%2e%2e/b",
    "an escaped slash": "gs://bucket/a%2Fb",
    "an escape of an escape": "gs://bucket/%252e",
    "a query": "gs://bucket/a?versionId=1",
    "a fragment": "gs://bucket/a#b",
    "a backslash": "file:///srv\\..\\etc",
    "a line break": "gs://bucket/a\n",
    "a line break inside": "gs://bucket/a\nb",
    "a NUL": "gs://bucket/a\0b",
    "white space": "gs://bucket/a b",
    "an umlaut": "gs://bucket/ä",
    "a full-width dot": "gs://bucket/\uff0e\uff0e/b",
    "a long key": "gs://bucket/" + "k" * 1025,
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_what_could_be_read_in_two_ways_is_refused(text: str) -> None:
    """With a sentence that says what is wanted."""
    with pytest.raises(ValueError, match=r"^must "):
        parse_object_uri(text)


@given(st.text(max_size=60) | st.text("gsaz3file:/.%@?#\\ab", max_size=40).map(lambda rest: "gs://bucket/" + rest))
def test_whatever_is_read_is_written_back_as_it_was(text: str) -> None:
    """No text has a second meaning: it is refused, or it is the one spelling of an object."""
    try:
        uri = parse_object_uri(text)
    except ValueError:
        return
    assert str(uri) == text
    assert not {"", ".", ".."} & set(uri.key.split("/"))


@pytest.mark.parametrize(
    ("text", "key"),
    [("gs://bucket", ""), ("gs://bucket/", ""), ("gs://bucket/a/b", "a/b"), ("gs://bucket/a/b/", "a/b")],
)
def test_a_prefix_may_be_a_bucket_or_a_folder(text: str, key: str) -> None:
    """A slash at its end changes nothing."""
    assert parse_object_prefix(text) == ObjectUri("gs", "bucket", key)


@pytest.mark.parametrize("text", ["", "gs://", "gs:///", "http://b/", "gs://bucket//", "gs://bucket/../", "s3://B/x"])
def test_a_prefix_is_as_strict_as_an_object(text: str) -> None:
    """An operator's mistake is told at start."""
    with pytest.raises(ValueError, match=r"^must "):
        parse_object_prefix(text)


@pytest.mark.parametrize(
    ("prefix", "uri", "rest"),
    [
        ("gs://bucket", "gs://bucket/a/b", "a/b"),
        ("gs://bucket/a", "gs://bucket/a/b", "b"),
        ("gs://bucket/a", "gs://bucket/ab/c", None),
        ("gs://bucket/a", "gs://bucket/a", None),
        ("gs://bucket/a", "gs://bucket/b/a/c", None),
        ("gs://bucket/a", "s3://bucket/a/b", None),
        ("gs://bucket/a", "gs://bucket2/a/b", None),
        ("file:///srv/p", "file:///srv/p/x", "x"),
        ("file:///srv/p", "file:///srv/pp/x", None),
    ],
)
def test_only_whole_segments_are_below_a_prefix(prefix: str, uri: str, rest: str | None) -> None:
    """`requests` does not allow `requests-of-others`."""
    assert parse_object_uri(uri).below(parse_object_prefix(prefix)) == rest
