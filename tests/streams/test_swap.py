"""Another champion takes over while everything runs: nothing is lost, repeated or made by a mixture."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.mock import MockCluster
from streams.settings import Settings
from streams.topics import specs
from tests.play import Outcome, metric
from tests.swapping import WORKER, digest, name, play_on, shows, variant
from tests.traffic import Traffic
from tests.workers import Fleet, Worker, children

SWAPS = 6
KIB_FLAT = 4 * 1024  # of the worker's memory over 80 swaps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def bundles(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    """Bundles that tell themselves apart by their digests."""
    return [variant(tiny_bundle, tmp_path / f"v{number}", f"variant {number}") for number in range(4)]


@pytest.fixture
def on_mock(tmp_path: Path) -> Iterator[Settings]:
    """A deployment on the in-process cluster."""
    settings = Settings(
        topic_prefix="mock.",
        partitions=2,
        gap_ms=60_000,
        grace_ms=10_000,
        ahead_ms=600_000,
        clock="log",
        flush_ms=100,
        state_dir=tmp_path,
    )
    with MockCluster(dict.fromkeys(specs(settings), settings.partitions)) as cluster:
        yield settings.but(bootstrap_servers=cluster.bootstrap_servers)


def check(outcome: Outcome, worker: Worker) -> None:
    """Exactly once, and each prediction and shadow by the model that it names."""
    assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
    for one in outcome.ledger.predictions:
        assert one["path"] == [one["model_digest"]]
        shadow = one["shadow"]
        assert shadow is None or shadow["path"] == [shadow["model_digest"]]


def makers(outcome: Outcome) -> Counter[str]:
    return Counter(one["model_digest"] for one in outcome.ledger.predictions)


def resident_kib(worker: Worker) -> int:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1])


def test_a_hundred_swaps_under_load(on_mock: Settings, bundles: list[Path], tmp_path: Path) -> None:
    """Memory stays flat, and no process stays behind."""
    settings = on_mock.but(bundle=bundles[0])
    with Fleet([Worker(settings, tmp_path / "w", module=WORKER)]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()
        sizes = []

        def steps() -> Iterator[None]:
            for number in range(1, SWAPS + 1):
                name(settings, "champion", bundles[number % len(bundles)])
                yield from shows(worker, number, "model_swaps_total")
                sizes.append(resident_kib(worker))

        outcome = play_on(settings, fleet, Traffic(seed=41, events=20_000), steps())
        check(outcome, worker)
        assert set(makers(outcome)) == {digest(bundle) for bundle in bundles}
        assert not fleet.ended and len(children(worker.process.pid)) == 1
        assert metric(worker, "browsecast_model_loaded") == 1
        assert max(sizes[-10:]) - max(sizes[10:20]) < KIB_FLAT, sizes
        routed = {one["context"]["routing"]["digest"] for one in outcome.ledger.sessions}
        assert len(routed) == 1  # these bundles share their router
