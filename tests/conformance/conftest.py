"""Each broker is a constructor plus declared features; the exam itself is the same for all."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.admin import Admin
from tests.support.emulator import PULL_S, NoEmulatorError, emulator, find_jar


@dataclass(frozen=True)
class Features:
    """What an implementation does as Cloud Pub/Sub documents it; what it lacks is a strict xfail."""

    first_nack_backs_off: bool = True
    """The retry policy holds from the first nack on."""
    server_flow_control: bool = True
    """`max_outstanding_messages` is honoured by the server."""
    filters: bool = True
    ordered_redelivery: bool = True
    """A nack redelivers that message and all later ones of its key, in order."""
    refuses_oversize: bool = True
    """A publish over 10 MB is answered INVALID_ARGUMENT."""
    exact_backoff: bool = True
    """Backoff is min * 2**(n-1) up to max, not an approximation."""


EMBEDDED = Features()
EMULATOR = Features(
    first_nack_backs_off=False,
    server_flow_control=False,
    filters=False,
    ordered_redelivery=False,
    refuses_oversize=False,
    exact_backoff=False,
)
"""Google's emulator 0.8.20, as measured."""


@dataclass
class Broker:
    """One implementation under examination."""

    name: str
    address: str
    features: Features
    admin: Admin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the emulator's tests time to pull its image where there is no jar; a hang is still one."""
    if find_jar() is None:
        for item in items:
            if item.get_closest_marker("emulator") is not None:
                item.add_marker(pytest.mark.timeout(PULL_S))


@pytest.fixture(scope="session")
def _emulator_address() -> Iterator[str]:
    try:
        with emulator() as address:
            yield address
    except NoEmulatorError as error:
        pytest.skip(f"Google's emulator: {error}")


@pytest.fixture(scope="session")
def _embedded_address() -> Iterator[str]:
    from worker.emulators.pubsub import LocalPubSubThread

    with LocalPubSubThread() as server:
        yield server.address


@pytest.fixture(params=["embedded", pytest.param("emulator", marks=pytest.mark.emulator)])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """One broker; names are new in every test, so tests do not see each other's messages."""
    address = request.getfixturevalue(f"_{request.param}_address")
    admin = Admin(address)
    yield Broker(request.param, address, EMBEDDED if request.param == "embedded" else EMULATOR, admin)
    admin.close()


@pytest.fixture(autouse=True)
def _lacks(request: pytest.FixtureRequest) -> None:
    """Turn `@pytest.mark.needs("filters")` into a strict xfail on a broker that declares to lack it."""
    marker = request.node.get_closest_marker("needs")
    if marker is not None and "broker" in request.fixturenames:
        found: Broker = request.getfixturevalue("broker")
        if not getattr(found.features, marker.args[0]):
            request.node.add_marker(pytest.mark.xfail(reason=f"{found.name} lacks {marker.args[0]}", strict=True))
