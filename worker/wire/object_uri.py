"""
The URI of an object: `gs://BUCKET/KEY`, `s3://BUCKET/KEY`, `az://CONTAINER/KEY` or `file:///PATH`.

Requesters write these URIs, so one that is read names exactly one object in exactly one spelling: nothing is decoded,
resolved or normalised, and what could be read in two ways is refused (escapes, `..`, empty segments, queries, a user, a
port).  No part of a URI ever becomes the name of a host: the host belongs to the scheme and to the operator's settings.
"""

import re

import msgspec

SCHEMES = ("gs", "s3", "az", "file")
MAX_KEY_BYTES = 1024
"""Of S3 (https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html), Google Cloud Storage and Azure."""

_URI = re.compile(r"([a-z0-9]+)://([^/]*)/(.+)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
"""Names of buckets and containers; the three services' own rules are narrower."""
_SEGMENT = re.compile(r"[A-Za-z0-9._~=+@,:-]+")
"""Characters that every service, client and file system takes as they are."""


class ObjectUri(msgspec.Struct, frozen=True):
    """One object, or as a prefix all objects whose key begins with the segments of this one's."""

    scheme: str
    bucket: str
    """Empty for `file`."""
    key: str
    """Without a slash at either end; of a prefix it may be empty."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def below(self, prefix: "ObjectUri") -> str | None:
        """Return the rest of the key below a prefix, whole segments only; `None` for what is not below it."""
        if (self.scheme, self.bucket) != (prefix.scheme, prefix.bucket):
            return None
        if not prefix.key:
            return self.key
        rest = self.key.removeprefix(prefix.key + "/")
        return rest if rest != self.key else None


def parse_object_uri(text: str) -> ObjectUri:
    """
    Return the object that a URI names.

    Raises:
        ValueError: It names none, or not beyond doubt; the text says what is wrong, for the requester.
    """
    match = _URI.fullmatch(text)
    if match is None or match[1] not in SCHEMES:
        raise ValueError("must be like gs://bucket/key, s3://bucket/key, az://container/key or file:///path")
    scheme, bucket, key = match.groups()
    if scheme == "file":
        if bucket:
            raise ValueError("must be file:///path, without a host")
    elif _BUCKET.fullmatch(bucket) is None:
        raise ValueError("must name a bucket of 3 to 222 small letters, digits, dots, dashes and underscores")
    if len(key) > MAX_KEY_BYTES:
        raise ValueError(f"must have a key of at most {MAX_KEY_BYTES} bytes")
    for segment in key.split("/"):
        if segment in {"", ".", ".."}:
            raise ValueError("must not have an empty segment, `.` or `..` in its key")
        if _SEGMENT.fullmatch(segment) is None:
            raise ValueError("must have a key of letters, digits and ._~=+@,:- only; escapes are not decoded")
    return ObjectUri(scheme, bucket, key)


def parse_object_prefix(text: str) -> ObjectUri:
    """
    Return the prefix that an operator names: a bucket, or a folder in one; a slash at its end changes nothing.

    Raises:
        ValueError: As `parse_object_uri`.
    """
    inside = "x"
    uri = parse_object_uri(text.removesuffix("/") + "/" + inside)
    return ObjectUri(uri.scheme, uri.bucket, uri.key.removesuffix(inside).removesuffix("/"))
