"""Keys of tenants."""

import pytest

from tests.support.fakeclock import FakeClock
from worker.batches.api.auth import NO_KEYS_TENANT, REMEMBER_S, KeyCheck, hash_of, new_key
from worker.batches.api.errors import ApiError


class Keys:
    """A store with keys; counts how often it is asked."""

    def __init__(self, **tenants: str) -> None:
        self.tenants = {hash_of(key): tenant for key, tenant in tenants.items()}
        self.asked = 0

    async def find(self, digest: str) -> str | None:
        self.asked += 1
        return self.tenants.get(digest)


async def refused(check: KeyCheck, header: str | None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await check.tenant_of(header)
    return caught.value


async def test_a_key_finds_its_tenant() -> None:
    """The scheme is read in any case."""
    check = KeyCheck(Keys(secret="acme").find, FakeClock().now, is_required=True)
    assert await check.tenant_of("Bearer secret") == "acme"
    assert await check.tenant_of("bearer secret") == "acme"


@pytest.mark.parametrize(
    "header", [None, "", "secret", "Basic secret", "Bearer", "Bearer ", "Bearer other", "Bearer \udce9"]
)
async def test_anything_else_is_refused_without_repeating_it(header: str | None) -> None:
    """A 401, in whose text no part of the key stands."""
    error = await refused(KeyCheck(Keys(secret="acme").find, FakeClock().now, is_required=True), header)
    assert error.status == 401
    assert error.headers["www-authenticate"] == "Bearer"
    assert "other" not in error.message


async def test_a_key_is_asked_for_once_and_a_revoked_one_ends_soon() -> None:
    """The store is not asked at every request; a revocation takes effect within the time that is documented."""
    clock, keys = FakeClock(), Keys(secret="acme")
    check = KeyCheck(keys.find, clock.now, is_required=True)
    for _ in range(10):
        await check.tenant_of("Bearer secret")
    assert keys.asked == 1
    keys.tenants.clear()
    clock.advance(REMEMBER_S)
    assert (await refused(check, "Bearer secret")).code == "invalid_api_key"
    assert (await refused(check, "Bearer secret")).code == "invalid_api_key"


async def test_without_keys_everybody_is_one_tenant() -> None:
    """No header is read."""
    check = KeyCheck(Keys().find, FakeClock().now, is_required=False)
    assert await check.tenant_of(None) == NO_KEYS_TENANT
    assert await check.tenant_of("Bearer whatever") == NO_KEYS_TENANT


def test_keys_are_long_random_and_plain() -> None:
    """A key has 256 bits, and stands in a header as it is."""
    first, second = new_key(), new_key()
    assert first != second
    assert len(first) > 50
    assert first.isascii()
    assert " " not in first
    assert hash_of(first) != hash_of(second)
    assert first not in hash_of(first)
