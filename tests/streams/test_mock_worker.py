"""The whole way from a click to a score on the in-process cluster: no Java, no Docker, as the demo runs."""

from pathlib import Path

import pytest

from streams.errors import BrokerUnavailable
from streams.mock import MockCluster
from streams.settings import Settings
from streams.topics import specs
from tests.play import play
from tests.traffic import Traffic
from tests.workers import Fleet, Worker


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_from_click_to_score(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without faults the mock is exact too: every session, late and rejected event, prediction and score, once."""
    settings = Settings(
        topic_prefix="mock.",
        partitions=2,
        gap_ms=60_000,
        grace_ms=10_000,
        ahead_ms=600_000,
        clock="log",
        flush_ms=100,
        bundle=tiny_bundle,
        state_dir=tmp_path,
    )
    with MockCluster(dict.fromkeys(specs(settings), settings.partitions)) as cluster:
        settings = settings.but(bootstrap_servers=cluster.bootstrap_servers)
        with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
            fleet.start()
            fleet.workers[0].wait_ready()
            outcome = play(settings, fleet, Traffic(seed=31, events=1_500, users=60), predicted=True, patience_s=20)
            assert not outcome.faults, "\n".join(outcome.faults[:10]) + fleet.workers[0].tail()
            assert outcome.ledger.scores and not fleet.ended
            fleet.workers[0].terminate()
            assert fleet.workers[0].wait(20) == 0


def test_mock_cluster_says_what_is_wrong() -> None:
    """A topic twice is an error with its name; closing twice is none."""
    with MockCluster({"a": 1}) as cluster, pytest.raises(BrokerUnavailable, match="'a'"):
        cluster.create_topic("a", 1)
    cluster.close()
