"""The fault tests must catch workers that are broken on purpose, by the same comparison that the real one passes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from streams.settings import Settings
from tests import scenarios

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(400)]
SEEDS = (21, 22, 23)
Scenario = Callable[[Settings, Path, scenarios.Module, int], list[str]]
CASES = [
    ("offsets_outside", scenarios.killed),
    ("no_fencing", scenarios.frozen),
    ("early_eviction", scenarios.undisturbed),
    ("faust_seek", scenarios.offsets_moved),
]


def module_of(variant: str) -> tuple[str, ...]:
    """What to run for a variant."""
    return ("tests.broken", variant, "worker")


@pytest.mark.parametrize(("variant", "scenario"), CASES, ids=[variant for variant, _ in CASES])
def test_broken_worker_is_caught(
    variant: str, scenario: Scenario, sessionize_settings: Callable[[], Settings], tmp_path: Path
) -> None:
    """At least one of a few seeds shows sessions that are missing, extra or repeated."""
    for seed in SEEDS:
        faults = scenario(sessionize_settings(), tmp_path, module_of(variant), seed)
        if any(fault.startswith("session") for fault in faults):
            return
    pytest.fail(f"{variant} passed {scenario.__name__} with the seeds {SEEDS}: the scenario proves nothing")


@pytest.mark.parametrize("scenario", [scenario for _, scenario in CASES], ids=[case.__name__ for _, case in CASES])
def test_the_real_worker_passes(
    scenario: Scenario, sessionize_settings: Callable[[], Settings], tmp_path: Path
) -> None:
    """The control: the same scenario, the same way to start, nothing broken."""
    faults = scenario(sessionize_settings(), tmp_path, module_of("sound"), SEEDS[0])
    assert not faults, f"{len(faults)} differences: " + "\n".join(faults[:10])
