"""The short form of the chaos suite: every disaster, a tenth of its time, nothing lost."""

from pathlib import Path

import pytest

from tests.chaos.scenarios import SCENARIOS, Scenario, play
from tests.chaos.score import complaints
from tests.chaos.server import ChaosServer
from tests.chaos.soak import FAULTS, Soak
from tests.support.emulator import NoEmulatorError, emulator
from tests.support.rig import rig

SHORT = 0.08
ON_EMULATOR = ("backend refuses connections", "backend answers 500", "response topic deleted", "poison messages")
"""Those whose outcome depends on the broker; the others would measure the backend a second time."""

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_embedded(scenario: Scenario, tmp_path: Path) -> None:
    """Nothing is lost, and nothing is spent that the scenario does not allow."""
    with ChaosServer() as server, rig(server.address, tmp_path) as built:
        result = play(scenario, built, "embedded", SHORT, server)
    print(result)
    assert complaints(scenario.limits, result) == []


@pytest.mark.emulator
@pytest.mark.parametrize(
    "scenario", [each for each in SCENARIOS if each.name in ON_EMULATOR], ids=lambda each: each.name.replace(" ", "-")
)
def test_emulator(scenario: Scenario, tmp_path: Path) -> None:
    """The same against Google's emulator."""
    try:
        with emulator() as address, rig(address, tmp_path) as built:
            result = play(scenario, built, "emulator", SHORT, None)
    except NoEmulatorError as error:
        pytest.skip(f"Google's emulator: {error}")
    print(result)
    assert complaints(scenario.limits, result) == []


def test_soak(tmp_path: Path) -> None:
    """One round of every fault, one after the other: all is answered, and the samples are those of the process."""
    with ChaosServer() as server, rig(server.address, tmp_path) as built:
        soak = Soak(built, server, tmp_path, broken_s=1.0, mended_s=1.5)
        soak.run(len(FAULTS) * 2.5)
    assert built.answers.count == built.sent > 0
    assert built.answers.malformed == 0
    assert all(sample.rss_mb > 20 and sample.tasks > 0 and sample.descriptors > 5 for sample in soak.samples[1:])
