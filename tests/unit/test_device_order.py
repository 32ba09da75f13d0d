"""Nothing on a device is read before it is made, or made anew while it is read.

The reducer, all transports and buffers of models run on the test double under a thousand seeds.
That the double would have found a mistake is shown by planting some: a wait left out, an event
recorded on the wrong stream, memory reused early.
"""

from __future__ import annotations

import pytest

from tests.double import plants, scenarios
from tests.double.plants import Plant
from tests.double.scenarios import ALL, BUFFERED, CODED, FLOWS, HALVED, TRAININGS, Made
from tests.shim import host as shim

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = 1000
FEWER = 15  # seeds of what takes longer; the rest is shared by the other flows
ENOUGH = 60  # seeds for a planted bug; all but a few are found under the first


def seeds_of(scenario: Made) -> range:
    slow = (*HALVED, *CODED, *TRAININGS, *BUFFERED)
    shared = SEEDS - FEWER * len(slow)
    return range(FEWER if scenario in slow else -(-shared // len(FLOWS)))


def named(name: str) -> Made:
    """The scenario; skips the test if its codecs' kernels cannot be compiled."""
    found = scenarios.named(name)
    if found in CODED and shim.MISSING:
        pytest.skip(shim.MISSING)
    return found


def test_there_are_a_thousand_seeds() -> None:
    assert sum(len(seeds_of(each)) for each in ALL) >= SEEDS


@pytest.mark.parametrize("name", [each.name for each in ALL])
def test_the_right_code_is_right_under_every_seed(name: str) -> None:
    scenario = named(name)
    assert not scenarios.first_fault(scenario, seeds_of(scenario))


@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    scenario = named(plant.scenario)
    seeds = seeds_of(scenario)[:ENOUGH]
    with plants.planted(plant) as hits:
        try:
            found = scenarios.first_fault(scenario, seeds)
        except Exception as error:  # a job that fails has found it, too
            found = repr(error)
    assert hits, "the code that the bug is planted in is never reached"
    assert found
