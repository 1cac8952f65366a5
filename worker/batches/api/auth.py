"""
API keys: a key is shown once, when it is made; the database has its hash, the tenant and a name.

A key is 256 random bits, so a plain SHA-256 cannot be searched and needs no salt.  A tenant sees its own files and
batches alone; several keys may belong to one tenant.  A key that was found is remembered for `REMEMBER_S`, which is
also how long a revoked key may still work.
"""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from worker.batches.api.errors import ApiError

PREFIX = "sk-batch-"
REMEMBER_S = 30.0
_MAX_REMEMBERED = 10_000
_SCHEME = "bearer "
NO_KEYS_TENANT = "default"
"""Owner of everything where no keys are asked for."""

FindTenant = Callable[[str], Awaitable[str | None]]
"""Returns the tenant of a key's hash, `None` for one that is unknown or revoked."""


def new_key() -> str:
    """Return a new key, which is printable ASCII."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return what is stored of a key: 64 hex digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyCheck:
    """
    Finds the tenant of a request.

    Args:
        find: Asks the store.
        clock: Monotonic seconds.
        is_required: Whether a key is needed; without, every request belongs to `NO_KEYS_TENANT`.
    """

    def __init__(self, find: FindTenant, clock: Callable[[], float], *, is_required: bool) -> None:
        self._find = find
        self._clock = clock
        self._is_required = is_required
        self._known: dict[str, tuple[str, float]] = {}

    async def tenant_of(self, authorization: str | None) -> str:
        """
        Return the tenant that a request's `Authorization` header belongs to.

        Raises:
            ApiError: 401; there is no key, or it is not known.

        Cancellation: leaves nothing behind.
        """
        if not self._is_required:
            return NO_KEYS_TENANT
        if authorization is None or not authorization.lower().startswith(_SCHEME):
            raise _refused("You didn't provide an API key: send it as Authorization: Bearer YOUR_KEY.", None)
        digest = hash_of(authorization[len(_SCHEME) :].strip())
        now = self._clock()
        tenant, until = self._known.get(digest, ("", now))
        if now < until:
            return tenant
        found = await self._find(digest)
        if found is None:
            self._known.pop(digest, None)
            raise _refused("Incorrect API key provided.", "invalid_api_key")
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[digest] = (found, now + REMEMBER_S)
        return found


def _refused(message: str, code: str | None) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, message, code=code, headers={"www-authenticate": "Bearer"})
