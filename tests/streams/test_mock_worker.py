"""The whole way from a click to a score on the in-process cluster: no Java, no Docker, as the demo runs."""

from pathlib import Path

import pytest

from streams.errors import BrokerUnavailable
from streams.mock import MockCluster
from streams.settings import Settings
from streams.topics import specs
from tests.play import Fault, metric, play
from tests.traffic import Traffic
from tests.workers import Fleet, Worker, alive, models


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_from_click_to_score(tiny_bundle: Path, tmp_path: Path) -> None:
    """The mock is exact too: every session, late and rejected event, prediction and score, once.

    The model's process is killed on the way; the worker starts another and asks again.
    """
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
            (worker,) = fleet.workers
            worker.wait_ready()
            faults, traffic = [Fault(0.3, worker, worker.kill_model)], Traffic(seed=31, events=2_000, users=60)
            outcome = play(settings, fleet, traffic, faults, predicted=True, patience_s=30)
            assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
            assert outcome.ledger.scores and not fleet.ended
            assert metric(worker, "browsecast_model_failures_total", kind="died") == 1
            (model,) = models(worker.process.pid)
            worker.terminate()
            assert worker.wait(20) == 0
            assert not alive(model)


def test_mock_cluster_says_what_is_wrong() -> None:
    """A topic twice is an error with its name; closing twice is none."""
    with MockCluster({"a": 1}) as cluster, pytest.raises(BrokerUnavailable, match="'a'"):
        cluster.create_topic("a", 1)
    cluster.close()
